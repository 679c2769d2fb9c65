"""Rotary positions of a prompt whose visual tokens stand at their places in the image.

Shapes: B prompts, S tokens of a prompt, K visual tokens of an image, N patches of an image.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def image_position_ids(
    contiguous_BS: Tensor, is_visual_BS: Tensor, places_K: Sequence[int], num_patches: int
) -> Tensor:
    """Returns the positions of prompts in which every image takes as many positions as it has patches.

    A visual token stands at the place of its patch in the patch grid, and the text after an image where it would stand
    without compression. The positions of visual tokens need not ascend.

    Args:
        contiguous_BS: consecutive positions of the same prompts, with any first position and any padding.
        is_visual_BS: True for visual tokens; the K tokens of an image are adjacent.
        places_K: raster index (row x side of the grid + column) of each visual token of an image.
        num_patches: number N of patches of an image.

    Returns:
        Position ids [B, S], int64; with N visual tokens in raster order, those of `contiguous_BS`.
    """
    if not places_K:
        return contiguous_BS.expand_as(is_visual_BS)
    budget = len(places_K)
    seen_BS = is_visual_BS.long().cumsum(dim=1) - is_visual_BS.long()
    moved_K = torch.tensor(places_K, device=contiguous_BS.device) - torch.arange(budget, device=contiguous_BS.device)
    within_BS = moved_K[seen_BS % budget].where(is_visual_BS, 0)
    return contiguous_BS + seen_BS // budget * (num_patches - budget) + within_BS
