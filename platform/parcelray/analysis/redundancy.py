"""How much the visual tokens of one image repeat each other: effective rank and mean pairwise cosine.

Queries of a resampler can collapse onto a few directions while pooled anchors keep theirs; both numbers, logged for
anchors and queries apart, show it before the scores do.

Shapes: B images, K tokens, D width.
"""

import torch
from torch import Tensor


def effective_rank(tokens_BKD: Tensor) -> Tensor:
    """Effective rank of each image's tokens: exp of the entropy of the normalised singular values (Roy and Vetterli, EUSIPCO 2007).

    The tokens are not centred: a direction that all of them share counts as one, so identical tokens have rank 1 and K
    orthogonal tokens of one length have rank K. Computed in float32 or above, without gradients.

    Args:
        tokens_BKD: visual tokens [B, K, D].

    Returns:
        [B], from 1 to min(K, D); NaN where there is nothing to rank (K = 0, or all tokens zero).
    """
    values_BR = torch.linalg.svdvals(_at_least_float32(tokens_BKD))
    # 0 / 0 is the documented NaN of all-zero tokens; an empty row would sum to entropy 0, that is rank 1.
    shares_BR = values_BR / values_BR.sum(dim=-1, keepdim=True)
    rank_B = torch.special.entr(shares_BR).sum(dim=-1).exp()
    return rank_B if tokens_BKD.shape[1] else torch.full_like(rank_B, float("nan"))


def mean_pairwise_cosine(tokens_BKD: Tensor) -> Tensor:
    """Mean cosine over all pairs of two different tokens of an image. Computed in float32 or above, without gradients.

    Args:
        tokens_BKD: visual tokens [B, K, D]. A zero token has cosine 0 with every other.

    Returns:
        [B], from -1 / (K - 1) to 1; NaN for K < 2, where there is no pair.
    """
    unit_BKD = torch.nn.functional.normalize(_at_least_float32(tokens_BKD), dim=-1)
    num_tokens = unit_BKD.shape[1]
    # The sum over ordered pairs is |sum of unit tokens|^2 less the K squared lengths: no K x K matrix.
    pairs_B = unit_BKD.sum(dim=1).square().sum(dim=-1) - unit_BKD.square().sum(dim=(1, 2))
    if num_tokens < 2:
        return torch.full_like(pairs_B, float("nan"))
    return pairs_B / (num_tokens * (num_tokens - 1))


def _at_least_float32(tokens_BKD: Tensor) -> Tensor:
    if tokens_BKD.ndim != 3:
        raise ValueError(f"tokens must have shape [B, K, D], not {list(tokens_BKD.shape)}; add a batch dimension")
    tokens_BKD = tokens_BKD.detach()
    return tokens_BKD if tokens_BKD.dtype == torch.float64 else tokens_BKD.float()
