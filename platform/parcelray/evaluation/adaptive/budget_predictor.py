"""A small network that chooses the visual-token budget of a question from cheap signals.

It predicts the probability of a correct answer at each budget, and is fitted on the answers of an evaluation. A price
per visual token turns the probabilities into a choice, so one predictor serves all trade-offs between cost and score:

    chosen = the budget with the largest (probability of a correct answer - price x visual tokens still to compute)

This module needs neither torch nor a cluster, and nothing is pickled: a predictor is a folder with
`predictor.safetensors` and `predictor.json`.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy.special import expit

from parcelray.errors import UserError

_WEIGHTS, _CONFIG = "predictor.safetensors", "predictor.json"
_FORMAT = 1
_MIN_SPREAD = 1e-6
"""Smallest standard deviation of a signal: one that hardly varies in the fit must not become huge elsewhere."""
_CERTAIN = 20.0
"""Logit of a budget that was always correct in the fit; its negative, of one that never was."""
_MAX_DEVIATION = 5.0
"""Signals are clipped at this many standard deviations from their mean."""

Floats = NDArray[np.float64]


class Layer(NamedTuple):
    """One affine layer."""

    weight_IO: Floats
    bias_O: Floats


class FitSettings(NamedTuple):
    """Settings of the fit of a predictor."""

    hidden: tuple[int, ...] = ()
    """Widths of hidden layers; none: a logistic regression."""
    decay: float = 100.0
    """Factor of the squared weights in the loss, which sums the negative log-likelihood over the samples."""
    seed: int = 0
    """Seed of the initial weights of hidden layers."""


LOGISTIC = FitSettings()
"""A logistic regression per budget; a few thousand questions are too few for hidden layers."""


@dataclass(frozen=True)
class BudgetPredictor:
    """Chooses the budget of a question from its signals; see the module docstring."""

    budgets: tuple[int, ...]
    """Visual tokens per image, ascending."""
    signals: tuple[str, ...]
    """Names of the input signals, in order; see `budget_signals`."""
    reads_answer: bool
    """Whether the last signals describe the smallest budget's answer.

    That answer is then already computed, so choosing it costs nothing more.
    """
    price: float
    """Default price: the probability of a correct answer that each visual token must add."""
    mean_S: Floats
    spread_S: Floats
    layers: tuple[Layer, ...]
    """The last layer outputs one logit per budget; the layers are separated by rectifiers."""

    def chances(self, signals_NS: Floats) -> Floats:
        """Predicts the probability of a correct answer at each budget: [N, budgets].

        Raises:
            ValueError: the number of signals differs from that of the fit.
        """
        if signals_NS.ndim != 2 or signals_NS.shape[1] != len(self.signals):
            raise ValueError(
                f"signals have the shape {signals_NS.shape}, but the predictor reads {len(self.signals)} per question;"
                f" give [N, {len(self.signals)}]"
            )
        hidden_NO = np.clip((signals_NS - self.mean_S) / self.spread_S, -_MAX_DEVIATION, _MAX_DEVIATION)
        for number, layer in enumerate(self.layers, 1):
            hidden_NO = hidden_NO @ layer.weight_IO + layer.bias_O
            if number < len(self.layers):
                hidden_NO = np.maximum(hidden_NO, 0.0)
        chances: Floats = expit(hidden_NO)
        return chances

    def choose_all(self, signals_NS: Floats, *, price: float | None = None) -> NDArray[np.int64]:
        """Chooses the index of a budget for each question; of equally good budgets, the smaller."""
        chosen: NDArray[np.int64] = self._worth(signals_NS, price).argmax(axis=1)
        return chosen

    def _worth(self, signals_NS: Floats, price: float | None) -> Floats:
        """Probability minus price of the remaining tokens: [N, budgets]."""
        tokens_B = np.array(self.budgets, dtype=np.float64)
        if self.reads_answer:
            tokens_B[0] = 0.0
        worth_NB: Floats = self.chances(signals_NS) - (self.price if price is None else price) * tokens_B
        return worth_NB

    def choose(
        self, signals: Sequence[float], *, price: float | None = None, among: Sequence[int] | None = None
    ) -> int:
        """Chooses the budget of one question.

        Args:
            signals: values of `signals`, in that order.
            price: probability of a correct answer that each visual token must add; 0: the most accurate budget; None:
                the predictor's default.
            among: budgets to choose from, at least one of them the predictor's; None: all budgets of the predictor.

        Returns:
            Visual tokens per image.
        """
        (worth_B,) = self._worth(np.array([signals], dtype=np.float64), price)
        allowed = [index for index, budget in enumerate(self.budgets) if among is None or budget in among]
        return self.budgets[max(allowed, key=lambda index: (worth_B[index], -index))]

    @property
    def flops(self) -> int:
        """FLOPs of one choice."""
        return sum(2 * layer.weight_IO.size for layer in self.layers)

    def save(self, folder: Path) -> None:
        """Writes the predictor's weights and configuration to a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"mean": self.mean_S, "spread": self.spread_S}
        for number, layer in enumerate(self.layers):
            tensors |= {
                f"layers.{number}.weight": np.ascontiguousarray(layer.weight_IO),
                f"layers.{number}.bias": layer.bias_O,
            }
        save_file(tensors, folder / _WEIGHTS)
        config = {
            "format": _FORMAT,
            "budgets": list(self.budgets),
            "signals": list(self.signals),
            "reads_answer": self.reads_answer,
            "price": self.price,
            "layers": len(self.layers),
        }
        (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "BudgetPredictor":
        """Reads a predictor that `save` wrote.

        Raises:
            UserError: the folder holds no predictor, or its two files do not match.
        """
        try:
            config: dict[str, Any] = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
            tensors: dict[str, Any] = load_file(folder / _WEIGHTS)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{folder} holds no budget predictor ({error}); give the folder that `parcelray analyze adaptive`"
                " wrote."
            ) from error
        if config.get("format") != _FORMAT:
            raise UserError(
                f"{folder} holds a budget predictor of format {config.get('format')!r}, but this version reads"
                f" {_FORMAT}; fit the predictor again."
            )
        layers = tuple(
            Layer(tensors[f"layers.{number}.weight"], tensors[f"layers.{number}.bias"])
            for number in range(config["layers"])
        )
        widths = (len(tensors["mean"]), layers[0].weight_IO.shape[0], layers[-1].weight_IO.shape[1])
        if widths != (len(config["signals"]), len(config["signals"]), len(config["budgets"])):
            raise UserError(
                f"{folder}: {_WEIGHTS} and {_CONFIG} do not match (widths {widths}); fit the predictor again."
            )
        return cls(
            budgets=tuple(config["budgets"]),
            signals=tuple(config["signals"]),
            reads_answer=config["reads_answer"],
            price=config["price"],
            mean_S=tensors["mean"],
            spread_S=tensors["spread"],
            layers=layers,
        )


def fit_predictor(
    signals_NS: Floats,
    correct_NB: NDArray[np.bool_],
    *,
    budgets: tuple[int, ...],
    names: tuple[str, ...],
    reads_answer: bool,
    settings: FitSettings = LOGISTIC,
) -> BudgetPredictor:
    """Fits a predictor at price 0.

    Args:
        signals_NS: signals of each question.
        correct_NB: which budgets answer each question correctly.
        budgets: visual tokens per image, ascending.
        names: names of the signals.
        reads_answer: see `BudgetPredictor`.
        settings: how to fit.

    Raises:
        UserError: every budget is correct on all questions or on none, so nothing can be fitted.
    """
    varies_B: NDArray[np.bool_] = np.asarray(correct_NB.any(axis=0)) & ~np.asarray(correct_NB.all(axis=0))
    if not varies_B.any():
        raise UserError(
            f"Each budget is correct on all {len(correct_NB)} questions or on none, so no predictor can be fitted;"
            " evaluate more or other questions."
        )
    mean_S, spread_S = signals_NS.mean(axis=0), np.maximum(signals_NS.std(axis=0), _MIN_SPREAD)
    standard_NS = np.clip((signals_NS - mean_S) / spread_S, -_MAX_DEVIATION, _MAX_DEVIATION)
    fit = _network if settings.hidden else _logistic
    layers = fit(standard_NS, correct_NB[:, varies_B].astype(np.int64), settings)
    return BudgetPredictor(
        budgets,
        names,
        reads_answer,
        0.0,
        mean_S,
        spread_S,
        (*layers[:-1], _all_budgets(layers[-1], correct_NB, varies_B)),
    )


def _logistic(standard_NS: Floats, correct_NV: NDArray[np.int64], settings: FitSettings) -> list[Layer]:
    """Fits one logistic regression per budget; returns them as one layer."""
    # Imported here: it takes more than a second, and an endpoint that uses a predictor fits none.
    from sklearn.linear_model import LogisticRegression

    models = [
        LogisticRegression(C=1 / settings.decay, max_iter=2000).fit(standard_NS, correct_N)
        for correct_N in correct_NV.T
    ]
    return [
        Layer(
            np.stack([model.coef_[0] for model in models], axis=1), np.array([model.intercept_[0] for model in models])
        )
    ]


def _network(standard_NS: Floats, correct_NV: NDArray[np.int64], settings: FitSettings) -> list[Layer]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    model = MLPClassifier(
        hidden_layer_sizes=settings.hidden,
        alpha=settings.decay,
        solver="lbfgs",
        max_iter=300,
        random_state=settings.seed,
    )
    with warnings.catch_warnings():
        # Stopping before convergence also regularises.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(standard_NS, correct_NV if correct_NV.shape[1] > 1 else correct_NV[:, 0])
    return [Layer(weight_IO, bias_O) for weight_IO, bias_O in zip(model.coefs_, model.intercepts_, strict=True)]


def _all_budgets(last: Layer, correct_NB: NDArray[np.bool_], varies_B: NDArray[np.bool_]) -> Layer:
    """Adds outputs for the budgets that were always or never correct, which ignore the signals."""
    weight_IO = np.zeros((last.weight_IO.shape[0], len(varies_B)))
    bias_O = np.where(correct_NB.all(axis=0), _CERTAIN, -_CERTAIN).astype(np.float64)
    weight_IO[:, varies_B], bias_O[varies_B] = last.weight_IO, last.bias_O
    return Layer(weight_IO, bias_O)
