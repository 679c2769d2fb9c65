"""ToMe (ICLR 2023, arXiv 2210.09461): merges tokens in each layer of the vision tower, between attention and MLP."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parcelray.errors import UnsupportedBudgetError
from parcelray.models.backbones.base import Depths
from parcelray.models.token_reduction.base import Reads, Reduction, ReductionContext, TokenReducer, encoder_of
from parcelray.models.token_reduction.encoder_view import EncoderView
from parcelray.models.token_reduction.kmeans import cluster_sums
from parcelray.models.token_reduction.merging import sorted_by_position


@dataclass(frozen=True)
class ToMe(TokenReducer):
    """Runs the vision tower a second time and merges about the same number of tokens in each layer, down to the budget.

    In a layer, every other token is in the first half, the others are in the second half. Each token of the first half
    has an edge to the token of the second half with the most similar key (mean over heads). The strongest edges are
    merged to means, weighted by the number of patches in each token. In later layers, log(size) is added to the
    attention logits of merged tokens. The class token is the first of the first half and is never merged.

    As in the released code, the tokens of the first half that stay precede the second half in the next layer. The
    tokens of the output are in the order of the grid.
    """

    name = "tome"

    @property
    def reads(self) -> Reads:
        """The vision tower, which is run again."""
        return "encoder"

    def budgets_of(self, num_tokens: int, depths: Depths) -> tuple[int, ...]:
        """See `TokenReducer`: a layer merges at most half of its tokens."""
        return tuple(
            budget
            for budget in range(1, num_tokens + 1)
            if merge_counts(num_tokens, budget, depths.encoder) is not None
        )

    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        """See `TokenReducer`.

        Raises:
            UnsupportedBudgetError: the tower has too few layers to halve the tokens down to the budget.
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
        positions_BN = torch.arange(owner_BN.shape[1], device=owner_BN.device).expand_as(owner_BN)
        # A merged token has the position of its first member.
        firsts_BK = torch.full_like(sizes_BK, owner_BN.shape[1]).scatter_reduce_(1, owner_BN, positions_BN, "amin")
        return sorted_by_position(Reduction(view.project(features_BKD), firsts_BK, sizes_BK, owner_BN))


def merge_counts(num_tokens: int, budget: int, num_layers: int) -> list[int] | None:
    """Returns the number of tokens that each layer merges, as even as possible with at most half per layer.

    Returns None if there are too few layers.
    """
    counts = []
    for left in range(num_layers, 0, -1):
        # After this layer, at most budget * 2 ** (left - 1) tokens may remain; otherwise the later layers cannot reach
        # the budget.
        count = max(-(-(num_tokens - budget) // left), num_tokens - budget * 2 ** (left - 1))
        if count > num_tokens // 2:
            return None
        counts.append(count)
        num_tokens -= count
    return counts


class _Tower:
    """The vision tower with merging between attention and MLP of its layers."""

    def __init__(self, view: EncoderView) -> None:
        self._model = view.model
        self._tower = view.model.vision_tower
        self._pixels = view.pixel_values_ICHW
        self.num_layers = view.feature_layer + 1
        self._first = int(view.model.has_class_token)

    def run(self, counts: list[int]) -> tuple[Tensor, Tensor]:
        """Returns the patch features [B, K, D] and the output token of each patch [B, N]."""
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
            # Without merged tokens the bias is zero, and the stock path is faster.
            attended, _ = layer.self_attn(normed, attention_mask=bias if sizes.shape[1] < length - first else None)
            hidden = hidden + attended
            if count:
                keys = (
                    layer.self_attn.k_proj(normed)[:, first:].unflatten(2, (layer.self_attn.num_heads, -1)).mean(dim=2)
                )
                merged, sizes, step_owner = merge(hidden[:, first:], keys, sizes, count, after_class=first == 1)
                hidden = torch.cat([hidden[:, :first], merged], dim=1)
                owner = step_owner.gather(1, owner)
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        return self._features(hidden), owner

    def _features(self, hidden: Tensor) -> Tensor:
        """Returns the patch features, after the tower's last norm if they pass it."""
        outputs: Any = self._tower.post_layernorm(hidden) if self._model.features_are_normed else hidden
        features: Tensor = outputs[:, self._first :]
        return features


def merge(
    tokens_BND: Tensor, keys_BNC: Tensor, sizes_BN: Tensor, count: int, *, after_class: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Merges `count` tokens away by bipartite soft matching.

    Args:
        tokens_BND: tokens in the order of the sequence, without the class token.
        keys_BNC: keys that define the similarity.
        sizes_BN: number of patches in each token.
        count: number of tokens to merge away, at most N / 2.
        after_class: whether the tokens follow a class token in the sequence. It belongs to the first half, so that the
            first token belongs to the second one.

    Returns:
        Tokens [B, N - count, D], their sizes, and the output token of each input token [B, N]. The tokens of the first
        half that stay come first: in their order if they follow a class token, otherwise by falling similarity.
    """
    batch, num_tokens, _ = tokens_BND.shape
    directions = F.normalize(keys_BNC.float(), dim=2)
    start = int(after_class)
    similarity_BAO = directions[:, start::2] @ directions[:, 1 - start :: 2].transpose(1, 2)
    strength_BA, target_BA = similarity_BAO.max(dim=2)
    falling_BA = strength_BA.sort(dim=1, descending=True, stable=True).indices
    merging_BC, staying_BS = falling_BA[:, :count], falling_BA[:, count:]
    if after_class:
        staying_BS = staying_BS.sort(dim=1).values
    num_staying = staying_BS.shape[1]
    numbers_N = torch.arange(num_tokens, device=tokens_BND.device)
    owner_BN = numbers_N.repeat(batch, 1)
    owner_BN[:, 1 - start :: 2] = num_staying + numbers_N[: similarity_BAO.shape[2]]
    # Token a of the first half is token 2 a + start of the sequence.
    owner_BN.scatter_(1, 2 * staying_BS + start, numbers_N[:num_staying].expand(batch, -1))
    owner_BN.scatter_(1, 2 * merging_BC + start, num_staying + target_BA.gather(1, merging_BC))
    # The sizes are float32, so half-precision tokens are summed in float32; double precision is kept.
    weighted = tokens_BND * sizes_BN[:, :, None]
    sums = cluster_sums(weighted, owner_BN, num_tokens - count)
    sizes = cluster_sums(sizes_BN[:, :, None], owner_BN, num_tokens - count)
    return (sums / sizes).to(tokens_BND.dtype), sizes.squeeze(2), owner_BN
