"""Crops of real photographs, for benches whose time or quality depends on what tokens look like."""

import numpy as np
import torch
from torch import Tensor


def photographs(count: int, side: int, seed: int = 0) -> Tensor:
    """Square crops of scikit-learn's two photographs: [count, 3, side, side], from -1 to 1."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(seed)
    pictures = load_sample_images().images
    crops = []
    for _ in range(count):
        picture = pictures[rng.integers(len(pictures))]
        top, left = (rng.integers(max(1, picture.shape[axis] - side)) for axis in (0, 1))
        crop = torch.tensor(picture[top : top + side, left : left + side] / 127.5 - 1, dtype=torch.float32).permute(
            2, 0, 1
        )
        if crop.shape[1:] != (side, side):
            crop = torch.nn.functional.interpolate(crop[None], size=(side, side), mode="bilinear")[0]
        crops.append(crop)
    return torch.stack(crops)
