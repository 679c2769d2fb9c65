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
from math import isqrt
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
_BATCH = 8

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
    power_BHW: Tensor = torch.fft.fftshift(power_BHWD.mean(dim=3), dim=(1, 2))
    return power_BHW


def attended_spectrum(maps_BQN: Tensor, grid_BHWD: Tensor) -> Tensor:
    """Computes the power of a grid weighted by each of several maps, averaged over the maps.

    Equals the mean over the maps of `power_spectrum` of map x grid, except at the frequency 0, which keeps the mean. It
    is computed from the N x N second moments, so that the cost of the transforms depends on neither Q nor D: with w the
    maps and f the features, the power at u is e_u^H M e_u / N^2 for M = mean_q(w_q w_q^T) * mean_d(f_d f_d^T).

    Args:
        maps_BQN: non-negative maps; each is rescaled to a spatial mean of 1.
        grid_BHWD: feature grids [B, H, W, D]; computed in float64.

    Returns:
        Powers [B, H, W], with the zero frequency in the middle.
    """
    scaled_BQN = maps_BQN.double() / maps_BQN.double().mean(dim=2, keepdim=True)
    features_BND = grid_BHWD.double().flatten(1, 2)
    moments_BNN = scaled_BQN.mT @ scaled_BQN / scaled_BQN.shape[1]
    moments_BNN *= features_BND @ features_BND.mT / features_BND.shape[2]
    batch, height, width, _ = grid_BHWD.shape
    moments_BHWHW = moments_BNN.view(batch, height, width, height, width)
    # The inverse transform of the second pair of axes conjugates e_u, and both together divide by N^2.
    power_BHWHW = torch.fft.ifft2(torch.fft.fft2(moments_BHWHW, dim=(1, 2), norm="forward"), dim=(3, 4))
    power_BN = power_BHWHW.flatten(3, 4).flatten(1, 2).diagonal(dim1=1, dim2=2).real
    power_BHW: Tensor = torch.fft.fftshift(power_BN.reshape(batch, height, width), dim=(1, 2))
    return power_BHW


def radial_mean(power_BHW: Tensor) -> Tensor:
    """Averages powers over rings of unit width.

    Args:
        power_BHW: powers with the zero frequency in the middle.

    Returns:
        P(r) [B, R] for r = 1..r_max, with R = min(H, W) // 2.
    """
    height, width = power_BHW.shape[1:]
    rows, columns = (
        torch.fft.fftshift(torch.fft.fftfreq(side, 1 / side, dtype=torch.float64, device=power_BHW.device))
        for side in (height, width)
    )
    radius_HW = torch.hypot(rows[:, None], columns[None])
    largest = min(height, width) / 2
    radii_R11 = torch.arange(1, int(largest) + 1, device=power_BHW.device)[:, None, None]
    ring_RHW = (radii_R11 - 0.5 <= radius_HW) & (radius_HW < radii_R11 + 0.5) & (radius_HW <= largest)
    weights_RHW = ring_RHW / ring_RHW.sum(dim=(1, 2), keepdim=True)
    return torch.einsum("bhw,rhw->br", power_BHW, weights_RHW.to(power_BHW.dtype))


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
        patches_BHWD = features_BND.reshape(len(features_BND), side, side, -1)
        spectra = {(PATCHES, side**2): power_spectrum(patches_BHWD)}
        for budget in budgets:
            anchor_grid = isqrt(connector.num_anchors(budget))
            # A grid of one token has no frequency but zero.
            if anchor_grid > 1:
                tokens_BKD = connector(features_BND, num_visual_tokens=budget)[:, : anchor_grid**2]
                spectra[ANCHORS, budget] = power_spectrum(
                    tokens_BKD.reshape(len(tokens_BKD), anchor_grid, anchor_grid, -1)
                )
            maps_BQN = connector.query_attention(features_BND, num_visual_tokens=budget)
            if maps_BQN.shape[1]:
                spectra[QUERIES, budget] = attended_spectrum(maps_BQN, patches_BHWD)
                spectra[MAPS, budget] = attended_spectrum(maps_BQN, torch.ones_like(patches_BHWD[..., :1]))
        for key, power_BHW in spectra.items():
            found.setdefault(key, []).append(radial_mean(power_BHW))
    return {key: torch.cat(batches).cpu().numpy() for key, batches in found.items()}


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
    compared = sorted(
        (each for each in spectra if each.grid.part != MAPS), key=lambda each: order.index(each.grid.part)
    )
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
