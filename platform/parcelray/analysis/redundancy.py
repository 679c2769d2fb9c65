"""The redundancy of visual tokens: effective rank, mean pairwise cosine, and the share of variance from the image.

The queries of a resampler can collapse to a few directions, or to values that hardly depend on the image, while pooled
anchors do not. The numbers, logged separately for anchors and queries, show this earlier than the scores.

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


def image_dependent_share(tokens_BKD: Tensor) -> Tensor:
    """Computes the share of the variance of visual tokens that depends on the image.

    The variance of all tokens about their overall mean is the sum of two parts. The first is the variance of each token
    over the images about its own mean, averaged over the tokens. The second is the variance of these means about the
    overall mean: what the tokens are whatever the image. The share is the first part divided by the sum. Both parts are
    estimated without bias from a few images (B - 1 instead of B, and the noise of the means subtracted from the second
    part), so that it does not depend on the size of the batch. Computed in float32 or higher, without gradients.

    Args:
        tokens_BKD: visual tokens [B, K, D] of different images, the same budget for each.

    Returns:
        The share, a scalar from 0 (constant tokens) to 1; always 1 for K = 1; NaN for B < 2, K = 0 and for tokens that
        are all equal.
    """
    tokens_BKD = _at_least_float32(tokens_BKD)
    num_images, num_tokens, _ = tokens_BKD.shape
    if num_images < 2 or num_tokens == 0:
        return tokens_BKD.new_tensor(float("nan"))
    means_KD = tokens_BKD.mean(dim=0)
    deviations_BKD = tokens_BKD - means_KD
    over_images = deviations_BKD.square().sum() / (num_tokens * (num_images - 1))
    # The mean of a token over B images has 1 / B of the variance of the token. The part of it that is common to all
    # tokens cancels in the differences to the overall mean.
    noise_BKD = deviations_BKD - deviations_BKD.mean(dim=1, keepdim=True)
    noise = noise_BKD.square().sum() / (num_tokens * num_images * (num_images - 1))
    of_means = (means_KD - means_KD.mean(dim=0)).square().sum() / num_tokens - noise
    return over_images / (over_images + of_means.clamp(min=0))


def _at_least_float32(tokens_BKD: Tensor) -> Tensor:
    if tokens_BKD.ndim != 3:
        raise ValueError(f"tokens must have shape [B, K, D], not {list(tokens_BKD.shape)}; add a batch dimension")
    tokens_BKD = tokens_BKD.detach()
    return tokens_BKD if tokens_BKD.dtype == torch.float64 else tokens_BKD.float()
