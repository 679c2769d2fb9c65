"""FastV (ECCV 2024, arXiv 2403.06764): keeps the tokens that the prompt's last token attends to most."""

from dataclasses import dataclass

from torch import Tensor

from parcelray.config.reducer import Positions
from parcelray.models.token_reduction.base import Reduction, ReductionContext, prompt_of, selection, top_positions
from parcelray.models.token_reduction.in_decoder import InDecoderReducer, Stage


@dataclass(frozen=True)
class FastV(InDecoderReducer):
    """Drops visual tokens once, after the first layers, by the attention in the layer before, averaged over heads.

    Args:
        positions: see `TokenReducer`; the published method keeps the original ones.
        layer: K of the paper, the first layer with fewer tokens, counted from 0; less than the number of layers.
    """

    positions: Positions = "image"
    layer: int = 2
    name = "fastv"

    def stages(self, num_layers: int, num_tokens: int, budget: int) -> tuple[Stage, ...]:
        """See `InDecoderReducer`: K layers process all N tokens, the others as many as make the mean the budget."""
        self.check_first_layer("layer", self.layer, num_layers)
        layer = self.layer
        left = (num_layers * budget - layer * num_tokens) // (num_layers - layer)
        if left < 1:
            raise self.budget_error(budget, -(-(layer * num_tokens + num_layers - layer) // num_layers), num_tokens)
        return (Stage(layer, left, layer - 1),) if left < num_tokens else ()

    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        """See `TokenReducer`."""
        scores_BN = prompt_of(context, self.name).attention(-1).mean(dim=1)[:, -1]
        return selection(tokens_BND, top_positions(scores_BN, num_visual_tokens))
