"""Whether confidence means what it says: of the answers given with 0.8, are eight of ten right?

The expected calibration error is that of Naeini et al. (AAAI 2015) with equally wide bins; temperature scaling is that
of Guo et al. (ICML 2017) with the answer as the one class that counts; isotonic regression is that of Zadrozny and
Elkan (KDD 2002).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.isotonic import IsotonicRegression

BINS = 10
_LEAST = 1e-6
"""Confidence is kept this far from 0 and 1, where its logit is finite."""
_TEMPERATURES = (0.05, 20.0)

Floats = NDArray[np.float64]


class ReliabilityBin(NamedTuple):
    """The answers whose confidence lies in one interval."""

    low: float
    high: float
    confidence: float
    """Their mean confidence."""
    accuracy: float
    """Their share of right answers."""
    n: int


class Calibration(NamedTuple):
    """A rising map from confidence to the chance of being right: straight lines between knots."""

    confidence: tuple[float, ...]
    chance: tuple[float, ...]

    def __call__(self, confidence_N: Floats) -> Floats:
        """The chances of answers; beyond the knots the nearest one's."""
        return np.interp(confidence_N, self.confidence, self.chance)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {"confidence": list(self.confidence), "chance": list(self.chance)}


def reliability(confidence_N: Floats, right_N: Floats, bins: int = BINS) -> list[ReliabilityBin]:
    """Answers by confidence, in equally wide intervals from 0 to 1; those without answers are left out."""
    place_N = np.minimum((confidence_N * bins).astype(int), bins - 1)
    found = []
    for index in range(bins):
        inside = place_N == index
        if inside.any():
            found.append(
                ReliabilityBin(
                    index / bins,
                    (index + 1) / bins,
                    float(confidence_N[inside].mean()),
                    float(right_N[inside].mean()),
                    int(inside.sum()),
                )
            )
    return found


def calibration_error(confidence_N: Floats, right_N: Floats, bins: int = BINS) -> float:
    """Expected calibration error: the mean over answers of their bin's distance between confidence and accuracy."""
    return sum(
        each.n * abs(each.confidence - each.accuracy) for each in reliability(confidence_N, right_N, bins)
    ) / len(confidence_N)


def fit_isotonic(confidence_N: Floats, right_N: Floats) -> Calibration:
    """The rising map with the least squared error."""
    model = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(confidence_N, right_N)
    return Calibration(tuple(map(float, model.X_thresholds_)), tuple(map(float, model.y_thresholds_)))


def fit_temperature(confidence_N: Floats, right_N: Floats) -> float:
    """The temperature under which the right answers are likeliest."""

    def loss(log_temperature: float) -> float:
        chance_N = np.clip(cool(confidence_N, float(np.exp(log_temperature))), _LEAST, 1 - _LEAST)
        return -float(np.mean(right_N * np.log(chance_N) + (1 - right_N) * np.log(1 - chance_N)))

    low, high = np.log(_TEMPERATURES)
    return float(np.exp(minimize_scalar(loss, bounds=(low, high), method="bounded").x))


def cool(confidence_N: Floats, temperature: float) -> Floats:
    """Confidence with its logit divided by a temperature."""
    clipped_N = np.clip(confidence_N, _LEAST, 1 - _LEAST)
    scaled: Floats = 1 / (1 + ((1 - clipped_N) / clipped_N) ** (1 / temperature))
    return scaled


def folds_by_group(groups: Sequence[str], count: int, seed: int = 0) -> NDArray[np.int64]:
    """A fold for each member, the same for all of a group (a scene), so that nothing of a group is on both sides of a split.

    Args:
        groups: by member.
        count: folds.
        seed: of their assignment.
    """
    names, place_N = np.unique(np.array(groups), return_inverse=True)
    fold_G = np.random.default_rng(seed).permutation(len(names)) % count
    found: NDArray[np.int64] = fold_G[place_N]
    return found
