"""Search spaces as data: `search_spaces/*.yaml`. Any key of a job file can be searched."""

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from parcelray.config.base import StrictModel

Assignment = dict[str, Any]
"""Values by key path of the job; parameters that are not active are not in it."""
_TRIES = 1000
"""Draws before a space is said to be empty."""


class _Domain(StrictModel):
    when: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """The parameter is active only where each of these others has one of these values; else the job keeps its own."""


class ChoiceDomain(_Domain):
    """One of some values."""

    type: Literal["choice"] = "choice"
    values: tuple[Any, ...] = Field(min_length=1)
    """Any YAML."""

    @property
    def steps(self) -> tuple[Any, ...]:
        """All values."""
        return self.values

    @property
    def ends(self) -> tuple[Any, ...]:
        """All values, of which none stands for another."""
        return self.values

    def draw(self, rng: random.Random) -> Any:
        """A value, all equally likely."""
        return rng.choice(self.values)


class IntegerDomain(_Domain):
    """A whole number."""

    type: Literal["integer"] = "integer"
    low: int
    """Smallest."""
    high: int
    """Largest, itself included."""
    step: int = Field(default=1, ge=1)
    """Between two values."""
    log: bool = False
    """Whether each order of magnitude is as likely as another."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.high < self.low or (self.log and self.low < 1):
            raise ValueError(
                f"{self.low} to {self.high} is no range{' for a logarithm' if self.log else ''}; give low <="
                f" high{', low >= 1' if self.log else ''}"
            )
        return self

    @property
    def steps(self) -> tuple[int, ...]:
        """All values, ascending."""
        return tuple(range(self.low, self.high + 1, self.step))

    @property
    def ends(self) -> tuple[int, int]:
        """Smallest and largest."""
        return self.low, self.high

    def draw(self, rng: random.Random) -> int:
        """A value."""
        if not self.log:
            return rng.choice(self.steps)
        drawn = math.exp(rng.uniform(math.log(self.low), math.log(self.high + 1)))
        return self.low + (min(self.high, int(drawn)) - self.low) // self.step * self.step


class RealDomain(_Domain):
    """A number."""

    type: Literal["real"] = "real"
    low: float
    """Smallest."""
    high: float
    """Largest."""
    log: bool = False
    """Whether each order of magnitude is as likely as another."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.high <= self.low:
            raise ValueError(f"{self.low} to {self.high} is no range; give low < high")
        if self.log and self.low <= 0:
            raise ValueError(f"{self.low} to {self.high} is no range for a logarithm; give low > 0")
        return self

    @property
    def steps(self) -> None:
        """Too many to list."""
        return

    @property
    def ends(self) -> tuple[float, float]:
        """Smallest and largest."""
        return self.low, self.high

    def draw(self, rng: random.Random) -> float:
        """A value."""
        return (
            math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
            if self.log
            else rng.uniform(self.low, self.high)
        )


Domain = Annotated[ChoiceDomain | IntegerDomain | RealDomain, Field(discriminator="type")]


class AnchorsFit(StrictModel):
    """A split that a patch grid and a budget allow: the anchor grid divides the patch grid, and N_p + N_q = budget with N_q >= 0."""

    type: Literal["anchors_fit"] = "anchors_fit"
    anchor_grid: str
    """Parameter with the side of the anchor grid; 0: no anchors."""
    budget: str
    """Parameter with the budget, a number or a list of one."""
    patch_grid: int = Field(ge=1)
    """Side of the patch grid."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Parameters that it looks at."""
        return (self.anchor_grid, self.budget)

    def allows(self, assignment: Assignment) -> bool:
        """Whether an assignment is legal; where one of the parameters is not active it is."""
        if any(key not in assignment for key in self.keys):
            return True
        side, budget = assignment[self.anchor_grid], assignment[self.budget]
        tokens = min(budget) if isinstance(budget, list | tuple) else budget
        return bool((side == 0 or self.patch_grid % side == 0) and side * side <= tokens <= self.patch_grid**2)


Constraint = AnchorsFit


class SearchSpace(StrictModel):
    """What a search may change in a job."""

    kind: Literal["search_space"]
    """What this file describes."""
    name: str = Field(pattern=r"^[\w.-]+$")
    """Of the space."""
    job: str
    """The job file that is changed."""
    parameters: dict[str, Domain] = Field(min_length=1)
    """Domains by key path of the job, such as `reducer.metric`; a parameter can only depend on those before it."""
    constraints: tuple[Constraint, ...] = ()
    """What values have to be together; assignments that break one are not part of the space."""

    @field_validator("parameters")
    @classmethod
    def _in_order(cls, parameters: dict[str, Domain]) -> dict[str, Domain]:
        known: dict[str, Domain] = {}
        for name, domain in parameters.items():
            for other, values in domain.when.items():
                if other not in known:
                    raise ValueError(f"{name} depends on {other}, which is not a parameter before it; put it first")
                legal = known[other].steps
                unknown = [value for value in values if legal is not None and value not in legal]
                if unknown:
                    raise ValueError(
                        f"{name} depends on {other} being {unknown[0]!r}, which it never is; its values are"
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
                        f"constraint {constraint.type} names {key}, which is no parameter; legal:"
                        f" {', '.join(self.parameters)}"
                    )
        return self

    def allows(self, assignment: Assignment) -> bool:
        """Whether no constraint is broken."""
        return all(constraint.allows(assignment) for constraint in self.constraints)

    @cached_property
    def size(self) -> int | None:
        """Number of different assignments; None: not finite."""
        domains = self.parameters.values()
        columns = [domain.steps for domain in domains if domain.steps is not None]
        if len(columns) < len(self.parameters):
            return None
        if self.constraints or any(domain.when for domain in domains):
            return sum(1 for _ in self.grid())
        return math.prod(len({repr(value) for value in column}) for column in columns)

    def grid(self) -> Iterator[Assignment]:
        """All assignments, each once.

        Raises:
            ValueError: a parameter has no list of values.
        """
        names = list(self.parameters)
        seen = set()
        columns = []
        for name in names:
            steps = self.parameters[name].steps
            if steps is None:
                raise ValueError(f"{name} is a real number, so there is no grid; sample the space instead")
            columns.append(steps)
        for values in itertools.product(*columns):
            assignment = self.active(dict(zip(names, values, strict=True)))
            key = repr(sorted(assignment.items()))
            if key not in seen and self.allows(assignment):
                seen.add(key)
                yield assignment

    def needs(self, name: str) -> Assignment:
        """Values under which a parameter is active."""
        found: Assignment = {}
        for other, values in self.parameters[name].when.items():
            found |= self.needs(other) | {other: values[0]}
        return found

    def sample(self, rng: random.Random) -> Assignment:
        """A random assignment; inactive parameters draw, too, so that a parameter's draws do not depend on the others.

        Raises:
            ValueError: of many draws none keeps the constraints.
        """
        for _ in range(_TRIES):
            assignment = self.active({name: domain.draw(rng) for name, domain in self.parameters.items()})
            if self.allows(assignment):
                return assignment
        raise ValueError(f"none of {_TRIES} draws from {self.name} keeps its constraints; widen the domains")

    def active(self, values: Mapping[str, Any]) -> Assignment:
        """Of values for all parameters those that are active."""
        chosen: Assignment = {}
        for name, domain in self.parameters.items():
            if all(other in chosen and chosen[other] in legal for other, legal in domain.when.items()):
                chosen[name] = values[name]
        return chosen
