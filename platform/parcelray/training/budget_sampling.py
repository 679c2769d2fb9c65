"""Which visual-token budgets a training step uses: a pure function of seed and step, so every rank and every resume agrees."""

import numpy as np

from parcelray.config.train import BudgetConfig, SandwichBudgets, WeightedBudgets
from parcelray.models.connectors import Connector


class BudgetSampler:
    """Draws the budgets of a step (random budget per step: arXiv 2605.30126, Appendix E).

    Args:
        config: what to draw from, and how.
        seed: of the draws.
    """

    def __init__(self, config: BudgetConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self._budgets = config.values()
        weights = np.array(config.weights) if isinstance(config, WeightedBudgets) else np.ones(len(self._budgets))
        self._probabilities = weights / weights.sum()

    def check(self, connector: Connector) -> None:
        """Refuses budgets, or splits of them, that the connector cannot give, before any step runs."""
        for budget in self._budgets:
            if self.config.anchor_grids is None:
                connector.check_budget(budget)
            for side in self._fitting(budget):
                connector.check_split(budget, side)

    def budgets(self, step: int) -> tuple[int, ...]:
        """Budgets of a step: one, or for the sandwich rule the smallest, a random one and the largest.

        The largest comes last because it uses every parameter: distributed data parallel exchanges gradients in the
        step's last backward pass, and passes over the gradients of parameters that this pass did not use.
        """
        draw = int(np.random.default_rng((self.seed, step)).choice(self._budgets, p=self._probabilities))
        if isinstance(self.config, SandwichBudgets):
            return (self._budgets[0], draw, self._budgets[-1])
        return (draw,)

    def anchor_grid(self, step: int, place: int, num_visual_tokens: int) -> int | None:
        """Side of the anchor grid of a step's pass; None: as the connector's routing says.

        Args:
            step: the step.
            place: of the pass among the step's budgets.
            num_visual_tokens: its budget.
        """
        fitting = self._fitting(num_visual_tokens)
        return int(np.random.default_rng((self.seed, step, 1 + place)).choice(fitting)) if fitting else None

    def _fitting(self, num_visual_tokens: int) -> list[int]:
        return [side for side in self.config.anchor_grids or () if side * side <= num_visual_tokens]

    def state(self) -> dict[str, object]:
        """For the checkpoint: what the draws depend on besides the step."""
        return {"seed": self.seed, "config": self.config.model_dump(mode="json")}
