"""Spatial spectra of anchors and query tokens (arXiv 2605.30126, Appendix A).

For a feature grid before the projection, at its own size: each channel's spatial mean is removed; S(u, v) is the power
of the two-dimensional DFT divided by H W, averaged over the channels, with the zero frequency in the middle; P(r) is
the mean of S over the ring r - 1/2 <= sqrt(u^2 + v^2) < r + 1/2, without frequencies above r_max = min(H, W) / 2. P is
averaged over the images and divided by its sum over r = 1..r_max. The cumulative concentration C(r) is the running sum.

Query tokens have no grid. The attention of each query to the patches, averaged over the heads, is rescaled to a spatial
mean of 1 and multiplied by the patch grid; P is then averaged over the queries.

Frequencies are in cycles per image. An anchor grid of side s has none above s / 2, so its spectrum is lower than that
of any finer grid by construction. And a query that attends to all patches equally has the spectrum of the patch grid,
whatever it carries. Two references, which are not in the paper, show this: `patches` (the patch grid itself) and `maps`
(the rescaled attention maps alone, without features).

Shapes: B images of a batch, I images of the study, N patches, Q queries, R rings, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from parcelray.evaluation.scoring.estimate import (
    ClusteredValues,
    Estimate,
    difference,
    estimate_means,
    ratio,
    weighted_sum,
)
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor

ANCHORS, QUERIES, MAPS, PATCHES = "anchors", "queries", "maps", "patches"
_EPS = 1e-15
"""Added to the sum by which a spectrum is divided."""
_BATCH = 16
_MAX_ELEMENTS = 2**22
"""Largest number of feature values whose spectrum is computed at once."""

Floats = NDArray[np.float64]


class GridOf(NamedTuple):
    """The grid that a spectrum belongs to."""

    model: str
    """Model reference."""
    part: str
    """`anchors`, `queries`, `maps` or `patches`, see the module."""
    num_visual_tokens: int
    """Budget; for `patches` the number of patches."""


@dataclass(frozen=True)
class Spectrum:
    """The normalised radial mean power of a grid; sequences are by ring, r = 1..r_max."""

    grid: GridOf
    power: Sequence[Estimate]

    @property
    def concentration(self) -> list[Estimate]:
        """Cumulative concentration C(r)."""
        rings = len(self.power)
        return [weighted_sum(self.power, [float(ring <= last) for ring in range(rings)]) for last in range(rings)]

    def centroid(self, rings: int | None = None) -> Estimate:
        """Returns the mean frequency in cycles per image, with the power P(r) of the first `rings` rings as weights."""
        power = self.power[:rings]
        radii = [float(radius) for radius in range(1, len(power) + 1)]
        return ratio(weighted_sum(power, radii), weighted_sum(power, [1.0] * len(power)))

    @property
    def relative_centroid(self) -> Estimate:
        """The mean frequency as a share of the largest one, r_max."""
        return weighted_sum([self.centroid()], [1 / len(self.power)])

    def to_dict(self) -> dict[str, Any]:
        """Returns the spectrum as JSON-serialisable data."""
        return self.grid._asdict() | {
            "power": [each.interval._asdict() for each in self.power],
            "concentration": [each.interval._asdict() for each in self.concentration],
            "centroid": self.centroid().interval._asdict(),
            "relative_centroid": self.relative_centroid.interval._asdict(),
        }


@dataclass(frozen=True)
class SpectralDifference:
    """The paired difference between the mean frequencies of two spectra of the same images, first minus second."""

    first: GridOf
    second: GridOf
    centroid: Estimate
    """Difference in cycles per image."""
    relative_centroid: Estimate
    """Difference of the shares of r_max."""
    common_centroid: Estimate
    """Difference in cycles per image over the rings that both grids have."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the difference as JSON-serialisable data."""
        return {
            "first": self.first._asdict(),
            "second": self.second._asdict(),
            "centroid": self.centroid.interval._asdict(),
            "relative_centroid": self.relative_centroid.interval._asdict(),
            "common_centroid": self.common_centroid.interval._asdict(),
        }


def power_spectrum(grid_BHWD: Tensor) -> Tensor:
    """Computes the power S(u, v) of grids, averaged over the channels, with the zero frequency in the middle.

    The sum over all frequencies is the spatial variance, averaged over the channels (Parseval).

    Args:
        grid_BHWD: feature grids [B, H, W, D]; computed in float64.

    Returns:
        Powers [B, H, W].
    """
    grid_BHWD = grid_BHWD.double()
    centred_BHWD = grid_BHWD - grid_BHWD.mean(dim=(1, 2), keepdim=True)
    power_BHWD = torch.fft.fft2(centred_BHWD, dim=(1, 2), norm="forward").abs().square()
    return torch.fft.fftshift(power_BHWD.mean(dim=3), dim=(1, 2))


def radial_power(grid_BHWD: Tensor) -> Tensor:
    """Computes the mean power P(r) of grids over rings of unit width, r = 1..r_max.

    Args:
        grid_BHWD: feature grids [B, H, W, D].

    Returns:
        Powers [B, R] with R = min(H, W) // 2, in float64.
    """
    height, width = grid_BHWD.shape[1:3]
    rows, columns = (
        torch.fft.fftshift(torch.fft.fftfreq(side, 1 / side, dtype=torch.float64, device=grid_BHWD.device))
        for side in (height, width)
    )
    radius_HW = torch.hypot(rows[:, None], columns[None])
    largest = min(height, width) / 2
    radii_R11 = torch.arange(1, int(largest) + 1, device=grid_BHWD.device)[:, None, None]
    ring_RHW = (radii_R11 - 0.5 <= radius_HW) & (radius_HW < radii_R11 + 0.5) & (radius_HW <= largest)
    weights_RHW = ring_RHW / ring_RHW.sum(dim=(1, 2), keepdim=True)
    return torch.einsum("bhw,rhw->br", power_spectrum(grid_BHWD), weights_RHW.double())


@torch.inference_mode()
def radial_powers(
    model: ElasticVLM, processor: ElasticProcessor, images: Sequence[Image.Image], budgets: Sequence[int]
) -> dict[tuple[str, int], Floats]:
    """Measures the mean power P(r) of each image, of all grids of a model.

    A connector that pools after the projector is given the patch features, so that its grid, too, is the one before the
    projection.

    Args:
        model: model in evaluation mode.
        processor: processor of the same checkpoint.
        images: RGB images.
        budgets: budgets that the model supports.

    Returns:
        Powers [I, R] by part and budget; a budget without anchors or without queries lacks that part. The patch grid
        is always there, with the number of patches as budget.
    """
    device, connector = next(model.parameters()).device, model.connector
    side = connector.grid_size
    found: dict[tuple[str, int], list[Tensor]] = {}
    for start in range(0, len(images), _BATCH):
        pixels = processor.pixel_values(images[start : start + _BATCH]).to(device, model.dtype)
        features_BND = model.model.encode_patches(pixels)
        patches_BHWD = features_BND.unflatten(1, (side, side))
        found.setdefault((PATCHES, side**2), []).append(radial_power(patches_BHWD))
        for budget in budgets:
            anchor_grid = round(connector.num_anchors(budget) ** 0.5)
            # A grid of one token has no frequency but zero.
            if anchor_grid > 1:
                tokens_BKD = connector(features_BND, num_visual_tokens=budget)[:, : anchor_grid**2]
                anchors_BHWD = tokens_BKD.unflatten(1, (anchor_grid, anchor_grid))
                found.setdefault((ANCHORS, budget), []).append(radial_power(anchors_BHWD))
            maps_BQN = connector.query_attention(features_BND, num_visual_tokens=budget)
            if maps_BQN.shape[1]:
                maps_BQHWD = maps_BQN.unflatten(2, (side, side))[..., None]
                found.setdefault((QUERIES, budget), []).append(attended_power(maps_BQHWD, patches_BHWD))
                ones_BHWD = torch.ones_like(patches_BHWD[..., :1])
                found.setdefault((MAPS, budget), []).append(attended_power(maps_BQHWD, ones_BHWD))
    return {key: torch.cat(batches).cpu().numpy() for key, batches in found.items()}


def attended_power(maps_BQHWD: Tensor, grid_BHWD: Tensor) -> Tensor:
    """Computes the mean power P(r) of a grid, weighted by each of several maps, and averages it over the maps.

    Args:
        maps_BQHWD: non-negative maps [B, Q, H, W, 1]; each is rescaled to a spatial mean of 1.
        grid_BHWD: feature grids [B, H, W, D].

    Returns:
        Powers [B, R].
    """
    scaled_BQHWD = maps_BQHWD / maps_BQHWD.mean(dim=(2, 3), keepdim=True)
    size = max(1, _MAX_ELEMENTS // grid_BHWD[0].numel())
    return torch.stack(
        [
            torch.cat([radial_power(part_QHWD * grid_HWD) for part_QHWD in scaled_QHWD.split(size)]).mean(dim=0)
            for scaled_QHWD, grid_HWD in zip(scaled_BQHWD, grid_BHWD, strict=True)
        ]
    )


def normalised_spectra(powers: Mapping[GridOf, Floats], seed: int = 0) -> list[Spectrum]:
    """Averages powers over the images and normalises them, with joint draws: all spectra are paired by image.

    Args:
        powers: mean powers P(r) of the same images [I, R].
        seed: seed of the draws.
    """
    rows_of = {
        grid: [
            ClusteredValues(values_I.tolist(), [str(image) for image in range(len(values_I))], share=False)
            for values_I in power_IR.T
        ]
        for grid, power_IR in powers.items()
    }
    estimates = iter(estimate_means([row for rows in rows_of.values() for row in rows], seed))
    spectra = []
    for grid, rows in rows_of.items():
        power = [next(estimates) for _ in rows]
        total = weighted_sum(power, [1.0] * len(power))
        total = Estimate(total.value + _EPS, total.draws + _EPS, total.n)
        spectra.append(Spectrum(grid, [ratio(each, total) for each in power]))
    return spectra


def spectral_differences(spectra: Sequence[Spectrum]) -> list[SpectralDifference]:
    """Compares the mean frequencies of all pairs of anchors and queries, and of queries with their model's patch grid.

    In each pair, queries come before anchors, and anchors before the patch grid.

    Args:
        spectra: spectra of one budget, and of the patch grids.
    """
    order = (QUERIES, ANCHORS, PATCHES)
    compared = sorted((each for each in spectra if each.grid.part != MAPS), key=lambda each: order.index(each.grid.part))
    return [
        SpectralDifference(
            first.grid,
            second.grid,
            difference(first.centroid(), second.centroid()),
            difference(first.relative_centroid, second.relative_centroid),
            difference(*(each.centroid(min(len(first.power), len(second.power))) for each in (first, second))),
        )
        for index, first in enumerate(compared)
        for second in compared[index + 1 :]
        if second.grid.part != PATCHES or (first.grid.part, first.grid.model) == (QUERIES, second.grid.model)
    ]
