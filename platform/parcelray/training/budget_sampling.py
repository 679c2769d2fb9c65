"""The visual-token budgets of a training step, a pure function of seed and step.

So all ranks draw the same budgets, and a resumed run draws the same as an uninterrupted one.
"""

import numpy as np

from parcelray.config.train import BudgetConfig, SandwichBudgets, WeightedBudgets
from parcelray.models.connectors import Connector


class BudgetSampler:
    """Draws the budgets of each step (random budget per step: arXiv 2605.30126, Appendix E).

    Args:
        config: the legal budgets and the distribution.
        seed: seed of the draws.
    """

    def __init__(self, config: BudgetConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self._budgets = config.values()
        weights = np.array(config.weights) if isinstance(config, WeightedBudgets) else np.ones(len(self._budgets))
        self._probabilities = weights / weights.sum()

    def check(self, connector: Connector) -> None:
        """Refuse budgets, or anchor grids for them, that the connector does not support.

        Raises:
            UnsupportedBudgetError: the connector does not support a budget.
            UserError: the connector does not support an anchor grid.
        """
        for budget in self._budgets:
            if self.config.anchor_grids is None:
                connector.check_budget(budget)
            for side in self._fitting(budget):
                connector.check_split(budget, side)

    def budgets(self, step: int) -> tuple[int, ...]:
        """The budgets of a step: one, or with the sandwich rule the smallest, a random one and the largest.

        The largest comes last because it uses every parameter. Distributed data parallel exchanges gradients in the
        step's last backward pass, and skips the gradients of parameters that this pass did not use.
        """
        draw = int(np.random.default_rng((self.seed, step)).choice(self._budgets, p=self._probabilities))
        if isinstance(self.config, SandwichBudgets):
            return (self._budgets[0], draw, self._budgets[-1])
        return (draw,)

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
        return {"seed": self.seed, "config": self.config.model_dump(mode="json")}
