"""SparseVLM (ICML 2025, arXiv 2410.04417): three stages ranked by relevant words, with recycling of pruned tokens."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from parcelray.models.token_reduction.base import (
    PromptView,
    Reduction,
    ReductionContext,
    gather_tokens,
    other_positions,
    prompt_of,
    top_positions,
)
from parcelray.models.token_reduction.in_decoder import InDecoderReducer, Stage, mean_tokens
from parcelray.models.token_reduction.kmeans import cluster_sums

_LAYERS, _OF_LAYERS, _OF_TOKENS = (2, 6, 15), 32, 576
_SCHEDULES: dict[int, tuple[int, int, int]] = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)}
"""Tokens kept at each stage by budget, as published for 32 layers and 576 tokens.

Recycled tokens are added to these numbers; with them, the mean over the layers is the budget.
"""
_RECYCLED_SHARE, _TOKENS_A_CLUSTER = 0.3, 10


@dataclass(frozen=True)
class SparseVLM(InDecoderReducer):
    """Drops tokens at layers 2, 6 and 15 of 32, ranked by the attention of the raters, averaged over heads.

    Raters are the words that matter for the image. For each visual token, a softmax over the words is taken of the
    inner products with the text embeddings. Words whose mean over the visual tokens is above the mean of all words are
    raters. Of n tokens that a stage drops, the best m = int(0.3 n) + 1 are recycled: density peaks (Rodriguez and Laio,
    Science 2014) cluster them to c = int(m / 10) + 1 clusters. The means of the clusters follow the kept tokens.

    Departures from the released code (version 1.5):

    - A stage acts on the input of its layer, with the attention of that layer. The released code drops the tokens from
      the output of the layer, so that one more layer runs on all of them. The published budgets fit only the count
      here: the schedule of 192 has a mean of 192.0 tokens, against 206.5 in the released code.
    - Ties of the density, which the released code breaks by random noise, go to the token with the higher score.
    - Fewer than half of the remaining tokens are recycled ones, which matters only at budgets of a few tokens.
    """

    name = "sparsevlm"

    def stages(self, num_layers: int, num_tokens: int, budget: int) -> tuple[Stage, ...]:
        """See `InDecoderReducer`: scales the published schedule of the nearest budget, at the same relative depths."""
        share = budget / num_tokens
        pattern = _SCHEDULES[min(_SCHEDULES, key=lambda known: abs(known / _OF_TOKENS - share))]
        wanted: dict[int, float] = {}
        for layer, left in zip(_LAYERS, pattern, strict=True):
            # In a shallow decoder, stages can fall on the same layer; the last of them counts.
            wanted[min(num_layers - 1, max(1, round(layer * num_layers / _OF_LAYERS)))] = left / _OF_TOKENS

        def at(scale: float) -> tuple[Stage, ...]:
            stages, before = [], num_tokens
            for layer, left in wanted.items():
                kept = max(1, int(num_tokens * left * scale))
                left_over = kept + min(_recycling(before - kept).num_clusters, kept - 1)
                if left_over < before:
                    before = left_over
                    stages.append(Stage(layer, before, layer))
            return tuple(stages)

        smallest = mean_tokens(at(0.0), num_layers, num_tokens)
        if smallest > budget:
            raise self.budget_error(budget, math.ceil(smallest), num_tokens)
        low, high = 0.0, 1 / min(wanted.values())
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if mean_tokens(at(middle), num_layers, num_tokens) <= budget else (low, middle)
        return at(low)

    def reduce(self, tokens_BND: Tensor, num_visual_tokens: int, context: ReductionContext) -> Reduction:
        """See `TokenReducer`."""
        prompt = prompt_of(context, self.name)
        raters_BT = raters(prompt)
        attention_BTN = prompt.attention(-1).mean(dim=1)
        scores_BN = (attention_BTN * raters_BT[:, :, None]).sum(dim=1) / raters_BT.sum(dim=1, keepdim=True)
        return recycled(tokens_BND, scores_BN, num_visual_tokens)


def raters(prompt: PromptView) -> Tensor:
    """Returns the words that rate the visual tokens, bool [B, T]; at least one per prompt."""
    products_BVT = prompt.visual_BVL.float() @ prompt.embeddings_BTL.float().transpose(1, 2)
    shares_BT = products_BVT.masked_fill(~prompt.valid_BT[:, None], -torch.inf).softmax(dim=2).mean(dim=1)
    mean_B1 = shares_BT.sum(dim=1, keepdim=True) / prompt.valid_BT.sum(dim=1, keepdim=True)
    # If all words are equal, rounding can put their mean above each of them.
    return (shares_BT >= torch.minimum(mean_B1, shares_BT.amax(dim=1, keepdim=True))) & prompt.valid_BT


def recycled(tokens_BND: Tensor, scores_BN: Tensor, count: int) -> Reduction:
    """Returns the best tokens in order, then means of clusters of the best dropped tokens; `count` tokens in total."""
    batch, num_tokens, _ = tokens_BND.shape
    num_recycled, num_clusters = recycling_of(num_tokens, count)
    kept_BK = top_positions(scores_BN, count - num_clusters)
    rest_BR = other_positions(kept_BK, num_tokens)
    order_BR = scores_BN.gather(1, rest_BR).argsort(dim=1, descending=True, stable=True)
    recycled_BM = rest_BR.gather(1, order_BR[:, :num_recycled])
    numbers_BK = torch.arange(kept_BK.shape[1], device=kept_BK.device).expand_as(kept_BK)
    assignment_BN = torch.full((batch, num_tokens), -1, dtype=torch.int64, device=kept_BK.device).scatter_(
        1, kept_BK, numbers_BK
    )
    tokens, positions, sizes = [gather_tokens(tokens_BND, kept_BK)], [kept_BK], [torch.ones_like(kept_BK)]
    if num_clusters > 0:
        members_BMD = gather_tokens(tokens_BND, recycled_BM).float()
        centres_BC, cluster_BM = density_peaks(members_BMD, num_clusters)
        sizes_BC = torch.zeros_like(centres_BC).scatter_add_(1, cluster_BM, torch.ones_like(cluster_BM))
        tokens.append((cluster_sums(members_BMD, cluster_BM, num_clusters) / sizes_BC[:, :, None]).to(tokens_BND.dtype))
        positions.append(recycled_BM.gather(1, centres_BC))
        sizes.append(sizes_BC)
        assignment_BN.scatter_(1, recycled_BM, cluster_BM + kept_BK.shape[1])
    return Reduction(torch.cat(tokens, dim=1), torch.cat(positions, dim=1), torch.cat(sizes, dim=1), assignment_BN)


class Recycling(NamedTuple):
    """The dropped tokens of a stage that are recycled."""

    num_tokens: int
    """Number of recycled tokens."""
    num_clusters: int
    """Number of clusters that they form."""


def recycling_of(num_tokens: int, count: int) -> Recycling:
    """Returns the recycling of a stage that leaves `count` of N tokens, clusters included."""
    # Each cluster replaces a kept token, so that one more token is dropped. Chosen is the smallest number of clusters
    # that is consistent with the number of dropped tokens. At any count, more than half of the tokens are kept ones.
    most = (count - 1) // 2
    clusters = next(
        (number for number in range(most) if _recycling(num_tokens - count + number).num_clusters <= number), most
    )
    return Recycling(_recycling(num_tokens - count + clusters).num_tokens, clusters)


def _recycling(num_dropped: int) -> Recycling:
    """Returns how many of the dropped tokens are recycled, and into how many clusters."""
    if num_dropped < 1:
        return Recycling(0, 0)
    num_tokens = int(_RECYCLED_SHARE * num_dropped) + 1
    return Recycling(num_tokens, num_tokens // _TOKENS_A_CLUSTER + 1)


def density_peaks(tokens_BMD: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Clusters tokens around density peaks, as in the released code.

    The density of a token is exp(-mean of the squared distances to its C nearest tokens, itself included). A centre
    has a large product of density and distance to the nearest denser token.

    Args:
        tokens_BMD: tokens; of two tokens with equal density, the earlier one counts as denser.
        num_clusters: C, at most M.

    Returns:
        The centres by falling product, int64 [B, C], and the cluster of each token [B, M]: its nearest centre.
    """
    num_tokens, width = tokens_BMD.shape[1:]
    # Exact distances: by a matrix product, the distance of a token to itself would not be 0.
    distances_BMM = torch.cdist(tokens_BMD, tokens_BMD, compute_mode="donot_use_mm_for_euclid_dist") / width**0.5
    near_BMC = distances_BMM.topk(num_clusters, dim=2, largest=False).values
    density_BM = (-near_BMC.square().mean(dim=2)).exp()
    rank_BM = density_BM.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
    denser_BMM = rank_BM[:, None, :] < rank_BM[:, :, None]
    gap_BM = distances_BMM.masked_fill(~denser_BMM, torch.inf).amin(dim=2)
    # The densest token has no denser neighbour; its gap is the largest distance of the image.
    gap_BM = torch.where(gap_BM.isinf(), distances_BMM.amax(dim=(1, 2))[:, None], gap_BM)
    centres_BC = (density_BM * gap_BM).sort(dim=1, descending=True, stable=True).indices[:, :num_clusters]
    cluster_BM = distances_BMM.gather(2, centres_BC[:, None].expand(-1, num_tokens, -1)).argmin(dim=2)
    numbers_BC = torch.arange(num_clusters, device=centres_BC.device).expand_as(centres_BC)
    return centres_BC, cluster_BM.scatter_(1, centres_BC, numbers_BC)
