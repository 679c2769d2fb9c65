"""Intervals of proportions and means, and bootstrap draws that many rows share."""

import math

import numpy as np
import pytest

from parcelray.evaluation.scoring.intervals import bootstrap_mean, cluster_draws, shared_draws, wilson
from parcelray.evaluation.scoring.paired import holm


def test_wilson_has_the_textbook_values() -> None:
    # 15 of 20: centre (0.75 + z2 / 40) / (1 + z2 / 20) with z2 = 3.8415.
    assert wilson(15, 20)[:3] == pytest.approx((0.75, 0.5313, 0.8881), abs=1e-4)
    assert wilson(0, 10)[:3] == pytest.approx((0.0, 0.0, 0.2775), abs=1e-4)
    assert math.isnan(wilson(0, 0).value)


def test_the_bootstrap_of_independent_samples_has_the_normal_width() -> None:
    values = [float(index % 2) for index in range(400)]
    interval = bootstrap_mean(values, [str(index) for index in range(400)])
    assert interval.value == 0.5
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.08)


def test_samples_of_one_scene_count_as_one() -> None:
    values = [float(index // 4 % 2) for index in range(400)]
    clustered = bootstrap_mean(values, [str(index // 4) for index in range(400)])
    assert clustered.high - clustered.low == pytest.approx(2 * 1.96 * 0.5 / 10, rel=0.1)


def test_groups_that_share_their_scenes_vary_together() -> None:
    values = [float(index % 2) for index in range(200)]
    scenes = [str(index) for index in range(200)]
    shared = cluster_draws({"a": (values, scenes), "b": (values, scenes)}, seed=1)
    apart = cluster_draws({"a": (values, scenes), "b": (values, [f"other {scene}" for scene in scenes])}, seed=1)
    assert (shared["a"] == shared["b"]).all()
    assert abs(np.corrcoef(apart["a"], apart["b"])[0, 1]) < 0.1
    # Standard error of a mean of 200 coin flips: 0.5 / sqrt(200).
    assert apart["a"].std() == pytest.approx(0.03536, rel=0.06)


def test_the_draws_have_the_standard_error_of_a_mean_and_rows_are_paired() -> None:
    values = np.random.default_rng(0).normal(3, 2, size=500)
    names = [str(index) for index in range(500)]
    draws = shared_draws(np.stack([values, values + 1]), ["all"] * 500, names, seed=1, draws=4000)["all"]
    assert draws.shape == (2, 4000)
    assert draws[0].mean() == pytest.approx(values.mean(), abs=0.01)
    assert draws[0].std() == pytest.approx(values.std() / np.sqrt(500), rel=0.05)
    assert np.allclose(draws[1] - draws[0], 1)


def test_whole_clusters_are_drawn() -> None:
    # Ten scenes of ten equal values: as uncertain as ten values, not as a hundred.
    scenes = np.random.default_rng(0).normal(size=10)
    draws = shared_draws(
        np.repeat(scenes, 10)[None], ["all"] * 100, [str(index // 10) for index in range(100)], seed=0, draws=4000
    )["all"][0]
    assert draws.std() == pytest.approx(scenes.std() / np.sqrt(10), rel=0.05)


def test_unscored_samples_are_left_out_of_means() -> None:
    values = np.array([[1.0, np.nan, 3.0, 5.0]])
    draws = shared_draws(values, ["a", "a", "a", "b"], ["s", "s", "s", "t"], seed=0, draws=200)
    assert set(draws["a"][0][~np.isnan(draws["a"][0])]) == {2.0}
    assert np.isnan(draws["b"]).any(), "some draws hold no sample of the group"


def test_holm_correction_matches_the_paper() -> None:
    # 4 x 0.01 = 0.04; 3 x 0.02 = 0.06; 2 x 0.03 = 0.06; 1 x 0.04 is below the last and takes its value.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    found = holm([0.01, float("nan")])
    assert found[0] == 0.01
    assert np.isnan(found[1])
    assert holm([]) == []
