"""FastV (ECCV 2024, arXiv 2403.06764): after the first layers the visual tokens that the prompt's last token looks at are left."""

from dataclasses import dataclass

from torch import Tensor

from parcelray.config.reducer import Positions
from parcelray.models.token_reduction.base import Reduction, best, selection
from parcelray.models.token_reduction.context import ReductionContext
from parcelray.models.token_reduction.in_decoder import InDecoderReducer, Stage
from parcelray.models.token_reduction.saliency import prompt_of


@dataclass(frozen=True)
class FastV(InDecoderReducer):
    """One stage, ranked by the attention of the layer before it, mean over heads.

    Args:
        positions: the original ones, as published.
        layer: K, the first layer that sees fewer tokens.
    """

    positions: Positions = "original"
    layer: int = 2
    name = "fastv"

    def stages(self, num_layers: int, num_tokens: int, budget: int) -> tuple[Stage, ...]:
        """See `InDecoderReducer`: the first K layers see all N tokens, the others what makes the mean the budget."""
        layer = min(self.layer, num_layers - 1)
        left = (num_layers * budget - layer * num_tokens) // (num_layers - layer)
        if left < 1:
            raise self.refused(budget, -(-(layer * num_tokens + num_layers - layer) // num_layers), num_tokens)
        return (Stage(layer, left, layer - 1),) if left < num_tokens else ()

    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        """See `TokenReducer`."""
        scores_BN = prompt_of(context, self.name).attention(-1).mean(dim=1)[:, -1]
        return selection(tokens_BND, best(scores_BN, num_visual_tokens))
