"""A search space as Ray Tune's own domains."""

from typing import Any

from ray import tune

from parcelray.config.search_space import Assignment, ChoiceDomain, IntegerDomain, SearchSpace


def tune_domains(space: SearchSpace) -> dict[str, Any]:
    """Tune's domain of each parameter. What Tune draws goes through `assignment_of`, because conditions are not Tune's."""
    return {name: _domain(domain) for name, domain in space.parameters.items()}


def assignment_of(space: SearchSpace, drawn: dict[str, Any]) -> Assignment:
    """What a trial changes in the job: of the values that Tune drew, those that are active."""
    return space.active(drawn)


def _domain(domain: Any) -> Any:
    if isinstance(domain, ChoiceDomain):
        return tune.choice(list(domain.values))
    if isinstance(domain, IntegerDomain):
        # Tune's upper ends are outside for randint and inside for qrandint.
        if domain.step == 1:
            return tune.lograndint(domain.low, domain.high + 1) if domain.log else tune.randint(domain.low, domain.high + 1)
        return tune.qlograndint(domain.low, domain.high, domain.step) if domain.log else tune.qrandint(domain.low, domain.high, domain.step)
    return tune.loguniform(domain.low, domain.high) if domain.log else tune.uniform(domain.low, domain.high)
