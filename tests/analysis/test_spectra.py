"""Spatial spectra against closed forms, and the measures of a tiny model."""

import math

import numpy as np
import pytest
import torch

from parcelray.analysis.spectra import (
    ANCHORS,
    MAPS,
    PATCHES,
    QUERIES,
    GridOf,
    attended_spectrum,
    normalised_spectra,
    power_spectrum,
    radial_mean,
    spectral_differences,
)


def _cosine(height: int, width: int, u: int, v: int) -> torch.Tensor:
    rows, columns = torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64)
    return torch.cos(2 * math.pi * (u * rows[:, None] / height + v * columns[None] / width) + 0.4)[None, ..., None]


@pytest.mark.parametrize(
    ("size", "u", "v", "ring"),
    [((16, 16), 3, 0, 3), ((16, 16), 0, 1, 1), ((16, 16), 3, 2, 4), ((16, 16), -2, 5, 5), ((9, 12), 2, 2, 3)],
)
def test_a_pure_cosine_lands_in_its_ring(size: tuple[int, int], u: int, v: int, ring: int) -> None:
    power_1HW = power_spectrum(5 + 3 * _cosine(*size, u, v))
    # Amplitude 3: two frequencies with |3 / 2|^2 each.
    assert sorted(power_1HW.flatten().tolist())[-2:] == pytest.approx([2.25, 2.25])
    profile_R = radial_mean(power_1HW)[0]
    assert len(profile_R) == min(size) // 2
    assert int(profile_R.argmax()) + 1 == ring
    assert float(profile_R[ring - 1] / profile_R.sum()) == pytest.approx(1)


def test_the_corners_above_the_largest_radius_are_left_out() -> None:
    assert radial_mean(power_spectrum(_cosine(16, 16, 7, 6)))[0].tolist() == pytest.approx([0.0] * 8, abs=1e-20)


def test_the_powers_sum_to_the_spatial_variance() -> None:
    grid = 2 + torch.randn(2, 6, 8, 5, generator=torch.Generator().manual_seed(0))
    variance = grid.double().var(dim=(1, 2), correction=0).mean(dim=1)
    torch.testing.assert_close(power_spectrum(grid).sum(dim=(1, 2)), variance)


def test_a_constant_has_no_power() -> None:
    power_1HW = power_spectrum(torch.full((1, 12, 12, 3), 7.3))
    assert power_1HW.abs().max() < 1e-25
    (spectrum,) = normalised_spectra({GridOf("m", PATCHES, 144): np.zeros((4, 6))})
    assert [each.value for each in spectrum.power] == [0.0] * 6


def test_white_noise_is_flat() -> None:
    grids = torch.randn(20, 16, 16, 32, generator=torch.Generator().manual_seed(0))
    (spectrum,) = normalised_spectra({GridOf("m", PATCHES, 256): radial_mean(power_spectrum(grids)).numpy()})
    assert [each.value for each in spectrum.power] == pytest.approx([1 / 8] * 8, rel=0.03)
    assert [each.value for each in spectrum.concentration] == pytest.approx([r / 8 for r in range(1, 9)], rel=0.03)
    assert spectrum.centroid().value == pytest.approx(4.5, rel=0.02)
    assert spectrum.relative_centroid.value == pytest.approx(4.5 / 8, rel=0.02)
    centroid = spectrum.centroid().interval
    assert centroid.low < 4.5 < centroid.high
    assert centroid.high - centroid.low < 0.1


def test_attended_power_is_the_mean_over_the_weighted_grids() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 48, generator=generator).softmax(dim=2)
    grid = torch.randn(2, 6, 8, 5, generator=generator)
    weights = (maps / maps.mean(dim=2, keepdim=True)).view(2, 3, 6, 8, 1)
    expected = power_spectrum((weights * grid[:, None]).flatten(0, 1)).view(2, 3, 6, 8).mean(dim=1)
    found = attended_spectrum(maps, grid)
    found[:, 3, 4] = 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_uniform_attention_has_the_spectrum_of_the_patches() -> None:
    grid = torch.randn(1, 8, 8, 5, generator=torch.Generator().manual_seed(0))
    uniform = torch.full((1, 4, 64), 1 / 64)
    torch.testing.assert_close(
        radial_mean(attended_spectrum(uniform, grid)), radial_mean(power_spectrum(grid)), rtol=1e-6, atol=1e-9
    )


def test_differences_are_paired_by_image_and_queries_come_first() -> None:
    scale_I1 = np.random.default_rng(0).lognormal(size=(40, 1))
    low_4, high_8 = np.array([4.0, 2, 1, 1]), np.array([1.0, 1, 1, 1, 1, 1, 1, 1])
    spectra = normalised_spectra(
        {
            GridOf("a", PATCHES, 64): scale_I1 * high_8,
            GridOf("a", ANCHORS, 64): scale_I1 * low_4,
            GridOf("a", MAPS, 64): scale_I1 * high_8,
            GridOf("a", QUERIES, 64): scale_I1 * high_8,
            GridOf("b", PATCHES, 64): scale_I1 * high_8,
        }
    )
    differences = spectral_differences(spectra)
    assert [(each.first.part, each.second.model, each.second.part) for each in differences] == [
        (QUERIES, "a", ANCHORS),
        (QUERIES, "a", PATCHES),
    ]
    interval = differences[0].centroid.interval
    # The scale of an image cancels: every image has the same shapes.
    assert interval[:3] == pytest.approx([4.5 - 15 / 8] * 3)
    assert differences[0].common_centroid.value == pytest.approx(2.5 - 15 / 8)
    assert differences[1].centroid.interval[:3] == pytest.approx([0.0] * 3, abs=1e-9)
