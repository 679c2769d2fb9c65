"""Calibration: errors computed by hand, fitted maps that reduce them, and folds that keep scenes together."""

import numpy as np
import pytest

from parcelray.evaluation.adaptive.calibration import (
    apply_temperature,
    calibration_error,
    fit_isotonic,
    fit_temperature,
    folds_by_group,
    reliability,
)


def test_the_error_of_two_bins_by_hand() -> None:
    confidence_N = np.array([0.65, 0.65, 0.95, 0.95])
    correct_N = np.array([0.0, 1.0, 1.0, 1.0])
    bins = reliability(confidence_N, correct_N)
    assert [(each.low, each.accuracy, each.n) for each in bins] == [(0.6, 0.5, 2), (0.9, 1.0, 2)]
    assert calibration_error(confidence_N, correct_N) == pytest.approx((2 * 0.15 + 2 * 0.05) / 4)
    assert calibration_error(np.array([1.0, 1.0]), np.array([1.0, 1.0])) == 0


def test_a_temperature_corrects_overconfidence() -> None:
    rng = np.random.default_rng(0)
    chance_N = rng.uniform(0.05, 0.95, 20_000)
    correct_N = (rng.uniform(size=chance_N.size) < chance_N).astype(float)
    overconfident_N = apply_temperature(chance_N, 0.4)
    temperature = fit_temperature(overconfident_N, correct_N)
    assert temperature == pytest.approx(2.5, rel=0.05)
    assert (
        calibration_error(apply_temperature(overconfident_N, temperature), correct_N)
        < 0.02
        < calibration_error(overconfident_N, correct_N)
    )


def test_an_isotonic_map_is_monotonic_and_fits_a_nonlinear_truth() -> None:
    rng = np.random.default_rng(1)
    confidence_N = rng.uniform(size=20_000)
    truth_N = np.where(confidence_N < 0.5, 0.1, 0.7)
    correct_N = (rng.uniform(size=truth_N.size) < truth_N).astype(float)
    fitted = fit_isotonic(confidence_N, correct_N)
    assert np.all(np.diff(fitted.chance) >= 0)
    np.testing.assert_allclose(fitted(np.array([-1.0, 0.25, 0.75, 2.0])), [0.1, 0.1, 0.7, 0.7], atol=0.12)
    assert abs(fitted(np.array([0.25]))[0] - 0.1) < 0.03


def test_a_scene_is_never_in_two_folds() -> None:
    scenes = [f"s{index // 3}" for index in range(300)]
    folds_N = folds_by_group(scenes, 5)
    assert sorted(np.bincount(folds_N)) == [60] * 5
    for scene in set(scenes):
        assert len({int(fold) for fold, each in zip(folds_N, scenes, strict=True) if each == scene}) == 1
    assert np.array_equal(folds_N, folds_by_group(scenes, 5))
    assert not np.array_equal(folds_N, folds_by_group(scenes, 5, seed=1))
