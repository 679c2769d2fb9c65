"""Draws that many rows share."""

import numpy as np
import pytest

from parcelray.evaluation.scoring.paired import holm
from parcelray.evaluation.scoring.shared_draws import shared_draws


def test_the_draws_have_the_standard_error_of_a_mean_and_rows_are_paired() -> None:
    values = np.random.default_rng(0).normal(3, 2, size=500)
    names = [str(place) for place in range(500)]
    draws = shared_draws(np.stack([values, values + 1]), ["all"] * 500, names, seed=1, draws=4000)["all"]
    assert draws.shape == (2, 4000)
    assert draws[0].mean() == pytest.approx(values.mean(), abs=0.01)
    assert draws[0].std() == pytest.approx(values.std() / np.sqrt(500), rel=0.05)
    assert np.allclose(draws[1] - draws[0], 1)


def test_whole_clusters_are_drawn() -> None:
    # Ten scenes of ten equal values: as uncertain as ten values, not as a hundred.
    scenes = np.random.default_rng(0).normal(size=10)
    draws = shared_draws(
        np.repeat(scenes, 10)[None], ["all"] * 100, [str(place // 10) for place in range(100)], seed=0, draws=4000
    )["all"][0]
    assert draws.std() == pytest.approx(scenes.std() / np.sqrt(10), rel=0.05)


def test_samples_without_a_score_are_in_no_mean() -> None:
    values = np.array([[1.0, np.nan, 3.0, 5.0]])
    draws = shared_draws(values, ["a", "a", "a", "b"], ["s", "s", "s", "t"], seed=0, draws=200)
    assert set(draws["a"][0][~np.isnan(draws["a"][0])]) == {2.0}
    assert np.isnan(draws["b"]).any(), "some draws hold no sample of the group"


def test_holm_is_that_of_the_paper() -> None:
    # 4 x 0.01 = 0.04; 3 x 0.02 = 0.06; 2 x 0.03 = 0.06; 1 x 0.04 is below the last and takes its value.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    found = holm([0.01, float("nan")])
    assert found[0] == 0.01
    assert np.isnan(found[1])
    assert holm([]) == []
