"""How a training step draws its visual-token budgets, as data."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from parcelray.config.base import StrictModel


class BudgetRange(StrictModel):
    """Budgets start, start + step, ... up to stop (included)."""

    start: int = Field(ge=1)
    """Smallest budget, visual tokens per image."""
    stop: int = Field(ge=1)
    """Largest budget."""
    step: int = Field(default=2, ge=1)
    """Distance between budgets (the paper: even budgets, so 2)."""

    @model_validator(mode="after")
    def _check(self) -> "BudgetRange":
        if self.stop < self.start:
            raise ValueError(f"stop {self.stop} is below start {self.start}; write the smaller one first")
        return self

    def values(self) -> tuple[int, ...]:
        """The budgets, ascending."""
        return tuple(range(self.start, self.stop + 1, self.step))


class _Budgets(StrictModel):
    budgets: BudgetRange | tuple[int, ...] = BudgetRange(start=16, stop=256)
    """The budgets to draw from: a range, or a list."""
    anchor_grids: tuple[int, ...] | None = None
    """A supernet over splits: the side of the anchor grid is drawn, too, among those of these that fit the budget (0: no anchors). null: the
    connector's routing decides."""

    @model_validator(mode="after")
    def _not_empty(self) -> "_Budgets":
        if not self.values():
            raise ValueError("budgets is empty; list at least one visual-token budget")
        if self.anchor_grids is not None and not any(
            side >= 0 and side * side <= min(self.values()) for side in self.anchor_grids
        ):
            raise ValueError(
                f"none of the anchor_grids {list(self.anchor_grids)} fits the smallest budget, {min(self.values())};"
                " add one with at most as many cells"
            )
        return self

    def values(self) -> tuple[int, ...]:
        """The budgets, ascending."""
        return self.budgets.values() if isinstance(self.budgets, BudgetRange) else tuple(sorted(self.budgets))


class UniformBudgets(_Budgets):
    """One budget per step, each as likely (arXiv 2605.30126, Appendix E)."""

    type: Literal["uniform"] = "uniform"


class WeightedBudgets(_Budgets):
    """One budget per step, drawn with the given weights."""

    type: Literal["weighted"] = "weighted"
    weights: tuple[float, ...] = Field(min_length=1)
    """One positive weight per budget, ascending budgets."""

    @model_validator(mode="after")
    def _check(self) -> "WeightedBudgets":
        if len(self.weights) != len(self.values()) or not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(
                f"weights has {len(self.weights)} entries for {len(self.values())} budgets; give one positive weight"
                " per budget"
            )
        return self


class SandwichBudgets(_Budgets):
    """Three budgets per step on the same batch: the smallest, the largest and a random one between."""

    type: Literal["sandwich"] = "sandwich"


BudgetConfig = Annotated[UniformBudgets | WeightedBudgets | SandwichBudgets, Field(discriminator="type")]
