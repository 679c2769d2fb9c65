"""Calibration of confidence: of the answers with confidence 0.8, 80 % should be correct.

The expected calibration error follows Naeini et al. (AAAI 2015), with bins of equal width. Temperature scaling follows
Guo et al. (ICML 2017), with the answer as the only class. Isotonic regression follows Zadrozny and Elkan (KDD 2002).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.isotonic import IsotonicRegression

BINS = 10
_LEAST = 1e-6
"""Confidence is clipped to this distance from 0 and 1, so that its logit is finite."""
_TEMPERATURES = (0.05, 20.0)
"""Bounds of a fitted temperature."""

Floats = NDArray[np.float64]


class ReliabilityBin(NamedTuple):
    """The answers with a confidence in one interval."""

    low: float
    high: float
    confidence: float
    """Mean confidence of the answers."""
    accuracy: float
    """Share of correct answers."""
    n: int


class Calibration(NamedTuple):
    """A monotonic, piecewise linear map from confidence to the probability of a correct answer."""

    confidence: tuple[float, ...]
    chance: tuple[float, ...]

    def __call__(self, confidence_N: Floats) -> Floats:
        """Maps confidences to probabilities; beyond the knots, to that of the nearest knot."""
        return np.interp(confidence_N, self.confidence, self.chance)

    def to_dict(self) -> dict[str, Any]:
        """Returns the knots as JSON-serialisable values."""
        return {"confidence": list(self.confidence), "chance": list(self.chance)}


def reliability(confidence_N: Floats, correct_N: Floats, bins: int = BINS) -> list[ReliabilityBin]:
    """Groups answers by confidence, in bins of equal width from 0 to 1; empty bins are left out."""
    bin_N = np.minimum((confidence_N * bins).astype(int), bins - 1)
    found = []
    for index in range(bins):
        inside = bin_N == index
        if inside.any():
            found.append(
                ReliabilityBin(
                    index / bins,
                    (index + 1) / bins,
                    float(confidence_N[inside].mean()),
                    float(correct_N[inside].mean()),
                    int(inside.sum()),
                )
            )
    return found


def calibration_error(confidence_N: Floats, correct_N: Floats, bins: int = BINS) -> float:
    """Computes the expected calibration error: the mean over answers of |confidence - accuracy| of their bin."""
    return sum(
        each.n * abs(each.confidence - each.accuracy) for each in reliability(confidence_N, correct_N, bins)
    ) / len(confidence_N)


def fit_isotonic(confidence_N: Floats, correct_N: Floats) -> Calibration:
    """Fits the monotonic map with the least squared error."""
    model = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(confidence_N, correct_N)
    return Calibration(tuple(map(float, model.X_thresholds_)), tuple(map(float, model.y_thresholds_)))


def fit_temperature(confidence_N: Floats, correct_N: Floats) -> float:
    """Fits the temperature that maximizes the likelihood of which answers are correct."""

    def loss(log_temperature: float) -> float:
        chance_N = np.clip(apply_temperature(confidence_N, float(np.exp(log_temperature))), _LEAST, 1 - _LEAST)
        return -float(np.mean(correct_N * np.log(chance_N) + (1 - correct_N) * np.log(1 - chance_N)))

    low, high = np.log(_TEMPERATURES)
    return float(np.exp(minimize_scalar(loss, bounds=(low, high), method="bounded").x))


def apply_temperature(confidence_N: Floats, temperature: float) -> Floats:
    """Divides the logit of a confidence by a temperature."""
    clipped_N = np.clip(confidence_N, _LEAST, 1 - _LEAST)
    scaled: Floats = 1 / (1 + ((1 - clipped_N) / clipped_N) ** (1 / temperature))
    return scaled


def folds_by_group(groups: Sequence[str], count: int, seed: int = 0) -> NDArray[np.int64]:
    """Assigns members to folds; all members of a group (a scene) are in the same fold.

    Args:
        groups: group of each member.
        count: number of folds.
        seed: seed of the assignment.
    """
    names, group_N = np.unique(np.array(groups), return_inverse=True)
    fold_G = np.random.default_rng(seed).permutation(len(names)) % count
    found: NDArray[np.int64] = fold_G[group_N]
    return found
