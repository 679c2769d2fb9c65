"""Search spaces: `search_spaces/*.yaml`. Any key of a job file can be searched."""

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from parcelray.config.base import StrictModel

Assignment = dict[str, Any]
"""Values by key path of the job, for the active parameters only."""
_TRIES = 1000
"""Number of draws after which a space counts as empty."""


class _Domain(StrictModel):
    when: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Condition: the parameter is active only if each of these other parameters has one of the listed values.

    The job's own value applies while the parameter is inactive.
    """


class ChoiceDomain(_Domain):
    """One of several listed values."""

    type: Literal["choice"] = "choice"
    values: tuple[Any, ...] = Field(min_length=1)
    """Legal values, of any YAML type."""

    @property
    def steps(self) -> tuple[Any, ...]:
        """All values."""
        return self.values

    @property
    def ends(self) -> tuple[Any, ...]:
        """All values, since choices have no order."""
        return self.values

    def draw(self, rng: random.Random) -> Any:
        """Draws one of the values with equal probability."""
        return rng.choice(self.values)


class IntegerDomain(_Domain):
    """An integer from a range."""

    type: Literal["integer"] = "integer"
    low: int
    """Smallest value."""
    high: int
    """Largest value, included."""
    step: int = Field(default=1, ge=1)
    """Difference between two values."""
    log: bool = False
    """Whether values are drawn uniformly on a logarithmic scale."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.high < self.low or (self.log and self.low < 1):
            raise ValueError(
                f"{self.low} to {self.high} is not a valid{' logarithmic' if self.log else ''} range; give low <="
                f" high{' and low >= 1' if self.log else ''}"
            )
        return self

    @property
    def steps(self) -> tuple[int, ...]:
        """All values, ascending."""
        return tuple(range(self.low, self.high + 1, self.step))

    @property
    def ends(self) -> tuple[int, int]:
        """Smallest and largest value."""
        return self.low, self.high

    def draw(self, rng: random.Random) -> int:
        """Draws a value."""
        if not self.log:
            return rng.choice(self.steps)
        drawn = math.exp(rng.uniform(math.log(self.low), math.log(self.high + 1)))
        return self.low + (min(self.high, int(drawn)) - self.low) // self.step * self.step


class RealDomain(_Domain):
    """A real number from an interval."""

    type: Literal["real"] = "real"
    low: float
    """Smallest value."""
    high: float
    """Largest value."""
    log: bool = False
    """Whether values are drawn uniformly on a logarithmic scale."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.high <= self.low:
            raise ValueError(f"{self.low} to {self.high} is not a valid range; give low < high")
        if self.log and self.low <= 0:
            raise ValueError(f"{self.low} to {self.high} is not a valid logarithmic range; give low > 0")
        return self

    @property
    def steps(self) -> None:
        """Always None, because an interval has no list of values."""
        return

    @property
    def ends(self) -> tuple[float, float]:
        """Smallest and largest value."""
        return self.low, self.high

    def draw(self, rng: random.Random) -> float:
        """Draws a value."""
        return (
            math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
            if self.log
            else rng.uniform(self.low, self.high)
        )


Domain = Annotated[ChoiceDomain | IntegerDomain | RealDomain, Field(discriminator="type")]


class AnchorsFit(StrictModel):
    """Constraint of anchor/query splits.

    The anchor grid must divide the patch grid, and the number of queries N_q = budget - N_p must be at least 0.
    """

    type: Literal["anchors_fit"] = "anchors_fit"
    anchor_grid: str
    """Name of the parameter with the side of the anchor grid; 0: no anchors."""
    budget: str
    """Name of the parameter with the budget, an integer or a list of one integer."""
    patch_grid: int = Field(ge=1)
    """Side of the patch grid, in patches."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the parameters that the constraint uses."""
        return (self.anchor_grid, self.budget)

    def allows(self, assignment: Assignment) -> bool:
        """Whether an assignment satisfies the constraint; true if one of the parameters is inactive."""
        if any(key not in assignment for key in self.keys):
            return True
        side, budget = assignment[self.anchor_grid], assignment[self.budget]
        tokens = min(budget) if isinstance(budget, list | tuple) else budget
        return bool((side == 0 or self.patch_grid % side == 0) and side * side <= tokens <= self.patch_grid**2)


Constraint = AnchorsFit


class SearchSpace(StrictModel):
    """The keys of a job that a search may change, with their domains."""

    kind: Literal["search_space"]
    """Kind of the file."""
    name: str = Field(pattern=r"^[\w.-]+$")
    """Name of the space."""
    job: str
    """Path of the job file that the search changes."""
    parameters: dict[str, Domain] = Field(min_length=1)
    """Domains by key path of the job, such as `reducer.metric`; a parameter can depend only on earlier ones."""
    constraints: tuple[Constraint, ...] = ()
    """Constraints between parameters; assignments that violate one are not part of the space."""

    @field_validator("parameters")
    @classmethod
    def _in_order(cls, parameters: dict[str, Domain]) -> dict[str, Domain]:
        known: dict[str, Domain] = {}
        for name, domain in parameters.items():
            for other, values in domain.when.items():
                if other not in known:
                    raise ValueError(
                        f"{name} depends on {other}, which is not an earlier parameter; list {other} first"
                    )
                legal = known[other].steps
                unknown = [value for value in values if legal is not None and value not in legal]
                if unknown:
                    raise ValueError(
                        f"{name} depends on {other} being {unknown[0]!r}, which is not a value of {other}; legal:"
                        f" {list(legal or ())}"
                    )
            known[name] = domain
        return parameters

    @model_validator(mode="after")
    def _known(self) -> Self:
        for constraint in self.constraints:
            for key in constraint.keys:
                if key not in self.parameters:
                    raise ValueError(
                        f"constraint {constraint.type} uses {key}, which is not a parameter; legal:"
                        f" {', '.join(self.parameters)}"
                    )
        return self

    def allows(self, assignment: Assignment) -> bool:
        """Whether an assignment satisfies all constraints."""
        return all(constraint.allows(assignment) for constraint in self.constraints)

    @cached_property
    def size(self) -> int | None:
        """Number of distinct assignments; None: infinite."""
        domains = self.parameters.values()
        columns = [domain.steps for domain in domains if domain.steps is not None]
        if len(columns) < len(self.parameters):
            return None
        if self.constraints or any(domain.when for domain in domains):
            return sum(1 for _ in self.grid())
        return math.prod(len({repr(value) for value in column}) for column in columns)

    def grid(self) -> Iterator[Assignment]:
        """Yields every assignment once.

        Raises:
            ValueError: a parameter is real-valued.
        """
        names = list(self.parameters)
        seen = set()
        columns = []
        for name in names:
            steps = self.parameters[name].steps
            if steps is None:
                raise ValueError(f"{name} is real-valued, so the space has no grid; use random or optuna")
            columns.append(steps)
        for values in itertools.product(*columns):
            assignment = self.active(dict(zip(names, values, strict=True)))
            key = repr(sorted(assignment.items()))
            if key not in seen and self.allows(assignment):
                seen.add(key)
                yield assignment

    def needs(self, name: str) -> Assignment:
        """Returns values of other parameters that make a parameter active."""
        needed: Assignment = {}
        for other, values in self.parameters[name].when.items():
            needed |= self.needs(other) | {other: values[0]}
        return needed

    def sample(self, rng: random.Random) -> Assignment:
        """Draws a random assignment.

        Inactive parameters are drawn as well, so that the draws of a parameter do not depend on the others.

        Raises:
            ValueError: none of many draws satisfies the constraints.
        """
        for _ in range(_TRIES):
            assignment = self.active({name: domain.draw(rng) for name, domain in self.parameters.items()})
            if self.allows(assignment):
                return assignment
        raise ValueError(f"none of {_TRIES} draws from {self.name} satisfies its constraints; widen the domains")

    def active(self, values: Mapping[str, Any]) -> Assignment:
        """Selects the values of the active parameters from values for all parameters."""
        chosen: Assignment = {}
        for name, domain in self.parameters.items():
            if all(other in chosen and chosen[other] in legal for other, legal in domain.when.items()):
                chosen[name] = values[name]
        return chosen
