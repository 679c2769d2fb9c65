"""PyramidDrop (CVPR 2025, arXiv 2410.17247): keeps the same share of tokens after each quarter of the decoder."""

import math
from dataclasses import dataclass

from torch import Tensor

from parcelray.config.reducer import Positions
from parcelray.models.token_reduction.base import Reduction, ReductionContext, prompt_of, selection, top_positions
from parcelray.models.token_reduction.in_decoder import InDecoderReducer, Stage, mean_tokens

_STAGES_AND_ONE = 4
_BISECTIONS = 60


@dataclass(frozen=True)
class PyramidDrop(InDecoderReducer):
    """Drops tokens after each quarter of the layers, ranked by the attention of the prompt's last token.

    The attention is computed with the projections of the layer after the stage. The published method keeps half of the
    tokens at each stage; here, the share is chosen so that the mean over the layers is the budget.

    Args:
        positions: see `TokenReducer`.
        first_layer: layer of the first of the three stages, which have equal distances. None: after the first quarter
            of the layers, as published; if these alone exceed the budget, layer 2 (as in FastV), or else layer 1.
    """

    positions: Positions = "contiguous"
    first_layer: int | None = None
    name = "pyramid_drop"

    def stages(self, num_layers: int, num_tokens: int, budget: int) -> tuple[Stage, ...]:
        """See `InDecoderReducer`; in a decoder with fewer than four layers, stages at the same layer are merged."""
        if self.first_layer is not None:
            self.check_first_layer("first_layer", self.first_layer, num_layers)
        layers = self._layers(num_layers, num_tokens, budget)

        def at(share: float) -> tuple[Stage, ...]:
            return tuple(
                Stage(layer, max(1, int(num_tokens * share ** (number + 1))), layer)
                for number, layer in enumerate(layers)
            )

        if not layers or mean_tokens(at(0.0), num_layers, num_tokens) > budget:
            full = layers[0] if layers else num_layers
            raise self.budget_error(budget, -(-(full * num_tokens + num_layers - full) // num_layers), num_tokens)
        low, high = 0.0, 1.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if mean_tokens(at(middle), num_layers, num_tokens) <= budget else (low, middle)
        return tuple(stage for stage in at(low) if stage.num_tokens < num_tokens)

    def _layers(self, num_layers: int, num_tokens: int, budget: int) -> list[int]:
        """Returns the layers of the stages."""
        choices = (num_layers / _STAGES_AND_ONE, 2, 1) if self.first_layer is None else (self.first_layer,)
        layers: list[int] = []
        for first in choices:
            step = (num_layers - first) / (_STAGES_AND_ONE - 1)
            layers = sorted(
                {math.ceil(first + number * step) for number in range(_STAGES_AND_ONE - 1)} & set(range(1, num_layers))
            )
            # The smallest mean has one token after the first stage.
            if layers and layers[0] * num_tokens + num_layers - layers[0] <= budget * num_layers:
                break
        return layers

    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        """See `TokenReducer`."""
        scores_BN = prompt_of(context, self.name).attention(-1).mean(dim=1)[:, -1]
        return selection(tokens_BND, top_positions(scores_BN, num_visual_tokens))
