"""ToMe (ICLR 2023, arXiv 2210.09461): tokens merged inside the vision tower, between attention and MLP of each layer."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parcelray.errors import UnsupportedBudgetError
from parcelray.models.backbones.base import Depths
from parcelray.models.token_reduction.base import Reads, Reduction, TokenReducer, encoder_of
from parcelray.models.token_reduction.context import ReductionContext
from parcelray.models.token_reduction.encoder_view import EncoderView
from parcelray.models.token_reduction.kmeans import cluster_sums
from parcelray.models.token_reduction.merging import in_order


@dataclass(frozen=True)
class ToMe(TokenReducer):
    """Runs the vision tower a second time, merging about as many tokens in each layer until the budget is left.

    In a layer the tokens are split into every other one; each of the first half has an edge to the token of the second
    half whose keys, as a mean over the heads, are most similar, and the strongest edges merge, as means weighed by the
    tokens that are in them already. Larger tokens get log(size) more in the attention of later layers. The class token
    is left alone.
    """

    name = "tome"

    @property
    def reads(self) -> Reads:
        """The vision tower, which it runs again."""
        return "encoder"

    def budgets_of(self, num_tokens: int, depths: Depths) -> tuple[int, ...]:
        """See `TokenReducer`: a layer merges half of the tokens away at most."""
        return tuple(
            budget
            for budget in range(1, num_tokens + 1)
            if merge_counts(num_tokens, budget, depths.encoder) is not None
        )

    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        """See `TokenReducer`.

        Raises:
            UnsupportedBudgetError: the tower has too few layers to halve the tokens as often as the budget asks for.
        """
        view = encoder_of(context, self.name)
        tower = _Tower(view)
        counts = merge_counts(tokens_BND.shape[1], num_visual_tokens, tower.num_layers)
        if counts is None:
            legal = self.budgets_of(tokens_BND.shape[1], Depths(tower.num_layers, 0))
            raise UnsupportedBudgetError(num_visual_tokens, legal, self.name)
        features_BKD, owner_BN = tower.run(counts)
        sizes_BK = torch.zeros_like(owner_BN[:, :num_visual_tokens]).scatter_add_(
            1, owner_BN, torch.ones_like(owner_BN)
        )
        places_BN = torch.arange(owner_BN.shape[1], device=owner_BN.device).expand_as(owner_BN)
        # A token lies where its first member does.
        firsts_BK = torch.full_like(sizes_BK, owner_BN.shape[1]).scatter_reduce_(1, owner_BN, places_BN, "amin")
        return in_order(Reduction(view.project(features_BKD), firsts_BK, sizes_BK, owner_BN))


def merge_counts(num_tokens: int, budget: int, num_layers: int) -> list[int] | None:
    """Tokens that each layer merges away, as even as halving at most allows; None: the layers are too few."""
    counts = []
    for left in range(num_layers, 0, -1):
        # After this layer at most budget * 2 ** (left - 1) may be left, or the layers after it could not get down to
        # the budget.
        count = max(-(-(num_tokens - budget) // left), num_tokens - budget * 2 ** (left - 1))
        if count > num_tokens // 2:
            return None
        counts.append(count)
        num_tokens -= count
    return counts


class _Tower:
    def __init__(self, view: EncoderView) -> None:
        self._model = view.model
        self._tower = view.model.vision_tower
        self._pixels = view.pixel_values_ICHW
        self.num_layers = view.feature_layer + 1
        self._first = int(view.model.has_class_token)

    def run(self, counts: list[int]) -> tuple[Tensor, Tensor]:
        """Patch features [B, K, D], and for each patch the token that it ended in [B, N]."""
        hidden = self._tower.embeddings(self._pixels)
        if hasattr(self._tower, "pre_layrnorm"):
            hidden = self._tower.pre_layrnorm(hidden)
        first = self._first
        batch, length, _ = hidden.shape
        sizes = torch.ones(batch, length - first, device=hidden.device)
        owner = torch.arange(length - first, device=hidden.device).expand(batch, -1)
        for layer, count in zip(self._tower.encoder.layers[: self.num_layers], counts, strict=True):
            normed = layer.layer_norm1(hidden)
            bias = F.pad(sizes.log(), (first, 0))[:, None, None, :].expand(-1, -1, normed.shape[1], -1).to(hidden.dtype)
            # Without merged tokens the bias is nothing, and the stock path is the faster one.
            attended, _ = layer.self_attn(normed, attention_mask=bias if sizes.shape[1] < length - first else None)
            hidden = hidden + attended
            if count:
                keys = (
                    layer.self_attn.k_proj(normed)[:, first:].unflatten(2, (layer.self_attn.num_heads, -1)).mean(dim=2)
                )
                merged, sizes, step_owner = merge(hidden[:, first:], keys, sizes, count)
                hidden = torch.cat([hidden[:, :first], merged], dim=1)
                owner = step_owner.gather(1, owner)
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        return self._features(hidden), owner

    def _features(self, hidden: Tensor) -> Tensor:
        """As the tower ends: with its last norm where the patch features pass it."""
        outputs: Any = self._tower.post_layernorm(hidden) if self._model.features_are_normed else hidden
        features: Tensor = outputs[:, self._first :]
        return features


def merge(tokens_BND: Tensor, keys_BNC: Tensor, sizes_BN: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bipartite soft matching: merges `count` tokens away.

    Args:
        tokens_BND: tokens in order.
        keys_BNC: what similarity goes by.
        sizes_BN: patches in each token.
        count: at most half of N.

    Returns:
        Tokens [B, N - count, D] in order, their sizes, and for each token before the one after [B, N].
    """
    batch, num_tokens, _ = tokens_BND.shape
    directions = F.normalize(keys_BNC.float(), dim=2)
    similarity_BAO = directions[:, ::2] @ directions[:, 1::2].transpose(1, 2)
    strength_BA, target_BA = similarity_BAO.max(dim=2)
    merging_BC = strength_BA.sort(dim=1, descending=True, stable=True).indices[:, :count]
    # Tokens of the first half have even places, those of the second half odd ones.
    new_BN = torch.arange(num_tokens, device=tokens_BND.device).repeat(batch, 1)
    new_BN.scatter_(1, 2 * merging_BC, 2 * target_BA.gather(1, merging_BC) + 1)
    alive_BN = torch.ones(batch, num_tokens, dtype=torch.int64, device=tokens_BND.device).scatter_(1, 2 * merging_BC, 0)
    number_BN = alive_BN.cumsum(dim=1) - 1
    owner_BN = number_BN.gather(1, new_BN)
    # Sizes are float32: half precision is added up in that, double precision stays what it is.
    weighted = tokens_BND * sizes_BN[:, :, None]
    sums = cluster_sums(weighted, owner_BN, num_tokens - count)
    sizes = cluster_sums(sizes_BN[:, :, None], owner_BN, num_tokens - count)
    return (sums / sizes).to(tokens_BND.dtype), sizes.squeeze(2), owner_BN
