"""Measures how redundant the tokens of a vision tower are (arXiv 2504.17892, encoder dependency).

The more redundant the tokens, the more of them a reducer can merge without a loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from parcelray.analysis.redundancy import effective_rank, mean_pairwise_cosine
from parcelray.evaluation.scoring.intervals import Interval, mean_interval
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.token_reduction.kmeans import kmeans

SHARES = (0.05, 0.11, 0.20, 0.30)
"""Numbers of clusters, as shares of the tokens, at which the explained variance is measured."""
_BATCH = 16


@dataclass(frozen=True)
class RedundancyProfile:
    """Redundancy measures of patch features and of projected tokens: means over images with t intervals."""

    measures: dict[str, Interval]

    def to_dict(self) -> dict[str, Any]:
        """Returns the measures as JSON-serialisable data."""
        return {name: interval._asdict() for name, interval in self.measures.items()}


@torch.inference_mode()
def redundancy_profile(
    model: ElasticVLM, processor: ElasticProcessor, images: Sequence[Image.Image]
) -> RedundancyProfile:
    """Measures the redundancy of a model's tokens on some images.

    The measures are:

    - the effective rank, as a share of its maximum;
    - the mean cosine of all pairs, and of adjacent patches;
    - the share of the tokens' variance that K-means explains with 5 to 30 % as many centres.
    """
    device = next(model.parameters()).device
    found: dict[str, list[float]] = {}
    for start in range(0, len(images), _BATCH):
        pixels = processor.pixel_values(images[start : start + _BATCH]).to(device, model.dtype)
        features_BND = model.model.encode_patches(pixels)
        for stage, tokens in (
            ("patch features", features_BND),
            ("projected tokens", model.model.multi_modal_projector(features_BND)),
        ):
            for name, values_B in _measures(tokens.float(), int(model.config.grid_size)).items():
                found.setdefault(f"{stage}: {name}", []).extend(values_B.tolist())
    return RedundancyProfile({name: mean_interval(values) for name, values in found.items()})


def _measures(tokens_BND: Tensor, grid: int) -> dict[str, Tensor]:
    batch, count, width = tokens_BND.shape
    unit_BHWD = torch.nn.functional.normalize(tokens_BND, dim=2).view(batch, grid, grid, width)
    neighbours = torch.cat(
        [
            (unit_BHWD[:, :, 1:] * unit_BHWD[:, :, :-1]).sum(3).flatten(1),
            (unit_BHWD[:, 1:] * unit_BHWD[:, :-1]).sum(3).flatten(1),
        ],
        dim=1,
    )
    centred = tokens_BND - tokens_BND.mean(dim=1, keepdim=True)
    variance_B = centred.square().sum(dim=(1, 2)).clamp(min=torch.finfo(torch.float32).tiny)
    explained = {
        f"variance that {share:.0%} centres explain": (
            1 - kmeans(tokens_BND, max(1, round(share * count)), max_iterations=20).inertia_B / variance_B
        )
        for share in SHARES
    }
    return {
        "effective rank, share of the largest": effective_rank(centred) / min(count, width),
        "mean cosine of pairs": mean_pairwise_cosine(tokens_BND),
        "mean cosine of neighbours": neighbours.mean(dim=1),
        **explained,
    }
