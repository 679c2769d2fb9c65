"""The choice for a family does not fall for the best of many noisy trials."""

import numpy as np

from parcelray.evaluation.scoring.split_scores import Estimate
from parcelray.tuning.nearly_best import choose_families


def test_the_cheapest_trial_within_one_standard_error_is_chosen_with_its_interval() -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 5, 2000)

    def estimate(value: float, noise: float) -> Estimate:
        return Estimate(value, value + shared + rng.normal(0, noise, 2000), 100)

    families = {
        "video": {0: estimate(80.0, 2.0), 1: estimate(79.0, 2.0), 2: estimate(60.0, 2.0)},
        "general": {0: estimate(70.0, 0.1), 1: estimate(68.0, 0.1)},
    }
    general, video = choose_families(families, lambda place: [256, 64, 8][place])
    assert (video.family, video.trial, video.best, video.near) == ("video", 1, 0, 2)
    assert video.retention.low < 79.0 < video.retention.high
    assert video.best_retention.value == 80.0
    assert (general.trial, general.best, general.near) == (0, 0, 1), "paired, two points are many errors"
