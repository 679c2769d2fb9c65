"""The redundancy of the visual tokens of an image: effective rank and mean pairwise cosine.

The queries of a resampler can collapse to a few directions while pooled anchors do not. Both numbers, logged separately
for anchors and queries, show this earlier than the scores.

Shapes: B images, K tokens, D width.
"""

import torch
from torch import Tensor


def effective_rank(tokens_BKD: Tensor) -> Tensor:
    """Computes the effective rank of each image's tokens (Roy and Vetterli, EUSIPCO 2007).

    It is the exponential of the entropy of the normalised singular values. The tokens are not centred, so identical
    tokens have rank 1, and K orthogonal tokens of equal length have rank K. It is computed in float32 or higher,
    without gradients.

    Args:
        tokens_BKD: visual tokens [B, K, D].

    Returns:
        The ranks [B], from 1 to min(K, D); NaN for K = 0 and for tokens that are all zero.
    """
    values_BR = torch.linalg.svdvals(_at_least_float32(tokens_BKD))
    # For all-zero tokens, 0 / 0 gives the documented NaN. An empty row would sum to entropy 0, which is rank 1.
    shares_BR = values_BR / values_BR.sum(dim=-1, keepdim=True)
    rank_B = torch.special.entr(shares_BR).sum(dim=-1).exp()
    return rank_B if tokens_BKD.shape[1] else torch.full_like(rank_B, float("nan"))


def mean_pairwise_cosine(tokens_BKD: Tensor) -> Tensor:
    """Computes the mean cosine over all pairs of distinct tokens of an image, in float32 or higher, without gradients.

    Args:
        tokens_BKD: visual tokens [B, K, D]. A zero token has cosine 0 with every other token.

    Returns:
        The mean cosines [B], from -1 / (K - 1) to 1; NaN for K < 2.
    """
    unit_BKD = torch.nn.functional.normalize(_at_least_float32(tokens_BKD), dim=-1)
    num_tokens = unit_BKD.shape[1]
    # The sum over ordered pairs is |sum of unit tokens|^2 minus the K squared lengths; this needs no K x K matrix.
    pairs_B = unit_BKD.sum(dim=1).square().sum(dim=-1) - unit_BKD.square().sum(dim=(1, 2))
    if num_tokens < 2:
        return torch.full_like(pairs_B, float("nan"))
    return pairs_B / (num_tokens * (num_tokens - 1))


def _at_least_float32(tokens_BKD: Tensor) -> Tensor:
    if tokens_BKD.ndim != 3:
        raise ValueError(f"tokens must have shape [B, K, D], not {list(tokens_BKD.shape)}; add a batch dimension")
    tokens_BKD = tokens_BKD.detach()
    return tokens_BKD if tokens_BKD.dtype == torch.float64 else tokens_BKD.float()
