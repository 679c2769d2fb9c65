"""The visual-token budgets of a training step, a pure function of seed and step.

So all ranks draw the same budgets, and a resumed run draws the same as an uninterrupted one.
"""

from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from parcelray.config.train import (
    BudgetConfig,
    LogUniformBudgets,
    SandwichBudgets,
    StratifiedBudgets,
    Stratum,
    WeightedBudgets,
)
from parcelray.models.connectors import Connector

_ANCHORS_ONLY_SHARE = 0.25
"""Share of the steps at the smallest budgets of all routing intervals, if the strata follow the routing."""


class BudgetSampler:
    """Draws the budgets of each step (random budget per step: arXiv 2605.30126, Appendix E).

    Args:
        config: the legal budgets and the distribution.
        seed: seed of the draws.
        connector: the connector that is trained.
        with_largest: whether each step also runs the largest budget, as the teacher of the others.

    Raises:
        UnsupportedBudgetError: the connector does not support a budget.
        UserError: the connector does not support an anchor grid.
    """

    def __init__(self, config: BudgetConfig, seed: int, connector: Connector, *, with_largest: bool = False) -> None:
        self.config = config
        self.seed = seed
        self.with_largest = with_largest
        self._budgets = config.values()
        self._check(connector)
        weights = _weights(config, connector)
        self._probabilities = weights / weights.sum()

    def _check(self, connector: Connector) -> None:
        for budget in self._budgets:
            if self.config.anchor_grids is None:
                connector.check_budget(budget)
            for side in self._fitting(budget):
                connector.check_split(budget, side)

    def budgets(self, step: int) -> tuple[int, ...]:
        """The budgets of a step, in the order of its passes: one, or several on the same batch.

        The sandwich rule has the smallest, a random one and the largest. With the largest as the teacher, it comes
        first and once.
        """
        draw = int(np.random.default_rng((self.seed, step)).choice(self._budgets, p=self._probabilities))
        return self._passes(draw)

    def mean_per_step(self, value: Callable[[int], float]) -> float:
        """The mean, over the distribution of the steps, of a value summed over the passes of a step.

        Args:
            value: the value of one pass by budget, for example its FLOPs.
        """
        values = {budget: value(budget) for budget in self._budgets}
        return sum(
            float(probability) * sum(values[budget] for budget in self._passes(draw))
            for draw, probability in zip(self._budgets, self._probabilities, strict=True)
        )

    def _passes(self, draw: int) -> tuple[int, ...]:
        smallest, largest = self._budgets[0], self._budgets[-1]
        passes = (smallest, draw, largest) if isinstance(self.config, SandwichBudgets) else (draw,)
        return (largest, *(budget for budget in passes if budget != largest)) if self.with_largest else passes

    def anchor_grid(self, step: int, index: int, num_visual_tokens: int) -> int | None:
        """Side of the anchor grid of one forward pass of a step; None if the connector's routing decides.

        Args:
            step: the step.
            index: index of the pass among the step's budgets.
            num_visual_tokens: budget of the pass.
        """
        fitting = self._fitting(num_visual_tokens)
        return int(np.random.default_rng((self.seed, step, 1 + index)).choice(fitting)) if fitting else None

    def _fitting(self, num_visual_tokens: int) -> list[int]:
        return [side for side in self.config.anchor_grids or () if side * side <= num_visual_tokens]

    def state(self) -> dict[str, object]:
        """The values, other than the step, that the draws depend on; stored in the checkpoint."""
        return {"seed": self.seed, "config": self.config.model_dump(mode="json"), "with_largest": self.with_largest}


def _weights(config: BudgetConfig, connector: Connector) -> NDArray[np.float64]:
    """The relative frequency of each budget, in ascending order of the budgets."""
    budgets = config.values()
    if isinstance(config, WeightedBudgets):
        return np.array(config.weights)
    if isinstance(config, LogUniformBudgets):
        return _log_cells(budgets)
    if isinstance(config, StratifiedBudgets):
        weights = np.zeros(len(budgets))
        for stratum in config.strata if config.strata is not None else _routing_strata(budgets, connector):
            members = stratum.values()
            within = _log_cells(members) if stratum.draw == "log_uniform" else np.ones(len(members))
            weights[np.searchsorted(budgets, members)] += stratum.share * within / within.sum()
        return weights
    return np.ones(len(budgets))


def _log_cells(budgets: Sequence[int]) -> NDArray[np.float64]:
    """The width of each budget's cell on a logarithmic scale, up to the middles between it and its neighbours.

    Drawing a number uniformly on this scale and rounding it to the nearest budget gives these probabilities. The cells
    of the first and the last budget reach as far outwards as inwards.
    """
    if len(budgets) == 1:
        return np.ones(1)
    gaps = np.diff(np.log(budgets))
    return (np.append(gaps[0], gaps) + np.append(gaps, gaps[-1])) / 2


def _routing_strata(budgets: Sequence[int], connector: Connector) -> list[Stratum]:
    """The strata of budgets by the connector's routing; see `StratifiedBudgets.strata`."""
    intervals = [tuple(interval) for _, interval in groupby(budgets, key=connector.num_anchors)]
    strata = [Stratum(share=_ANCHORS_ONLY_SHARE / len(intervals), budgets=interval[:1]) for interval in intervals]
    others = {index: interval[1:] for index, interval in enumerate(intervals) if len(interval) > 1}
    total = sum(2**index for index in others)
    return strata + [
        Stratum(share=(1 - _ANCHORS_ONLY_SHARE) * 2**index / total, budgets=rest) for index, rest in others.items()
    ]
