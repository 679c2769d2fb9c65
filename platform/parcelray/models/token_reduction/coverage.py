"""Facility location: tokens that cover what is asked for as well as so many tokens can, found greedily."""

import torch
from torch import Tensor


def covering(benefits_BRN: Tensor, count: int, weights_BN: Tensor | None = None) -> Tensor:
    """Again and again the token with the largest sum over the rows of what it adds to the best benefit so far, at first 0.

    Args:
        benefits_BRN: what each of N tokens does for each of R rows.
        count: tokens to take.
        weights_BN: what the sum of a token counts; None: 1.

    Returns:
        Places, ascending, int64 [B, count]; of equal gains the first one is taken.
    """
    batch, _, num_tokens = benefits_BRN.shape
    covered_BR = torch.zeros_like(benefits_BRN[:, :, 0])
    taken_BN = torch.zeros(batch, num_tokens, dtype=torch.bool, device=benefits_BRN.device)
    images_B = torch.arange(batch, device=benefits_BRN.device)
    for _ in range(count):
        gains_BN = (benefits_BRN - covered_BR[:, :, None]).clamp_(min=0).sum(dim=1)
        if weights_BN is not None:
            gains_BN = gains_BN * weights_BN
        chosen_B = gains_BN.masked_fill(taken_BN, -torch.inf).argmax(dim=1)
        taken_BN[images_B, chosen_B] = True
        covered_BR = torch.maximum(covered_BR, benefits_BRN[images_B, :, chosen_B])
    return taken_BN.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]
