"""A small network that chooses the visual-token budget of a question from cheap signals.

It gives the chance of a right answer at each budget, learnt from which budgets answered rightly in an evaluation. A
price for visual tokens turns chances into a choice, so one predictor serves every point between cheap and careful:

    chosen = the budget with the largest (chance of being right - price x visual tokens that are still to be paid)

Nothing here needs torch or a cluster, and nothing is pickled: a predictor is a folder with `predictor.safetensors` and
`predictor.json`.
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
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier

from parcelray.errors import UserError

_WEIGHTS, _CARD = "predictor.safetensors", "predictor.json"
_FORMAT = 1
_LEAST_SPREAD = 1e-6
"""A signal that hardly varies where it was learnt is left at this spread, so that it cannot become huge elsewhere."""
_SURE = 20.0
"""Logit of what was always so."""
_FARTHEST = 5.0
"""Standard deviations that a signal may lie from its mean."""

Floats = NDArray[np.float64]


class Layer(NamedTuple):
    """One affine layer."""

    weight_IO: Floats
    bias_O: Floats


class Learning(NamedTuple):
    """How a predictor is fitted."""

    hidden: tuple[int, ...] = ()
    """Widths of hidden layers; none: a logistic regression."""
    decay: float = 100.0
    """Weight of the squared weights in the loss, against the sum over samples of the negative log-likelihood."""
    seed: int = 0
    """Of the hidden layers' first weights."""


LOGISTIC = Learning()
"""What a few thousand questions can carry."""


@dataclass(frozen=True)
class BudgetPredictor:
    """Chooses budgets; see the module."""

    budgets: tuple[int, ...]
    """Visual tokens per image, ascending."""
    signals: tuple[str, ...]
    """What it is told, by name and in order; see `budget_signals`."""
    reads_answer: bool
    """Whether the last signals are of the smallest budget's answer: then that answer is there already, and staying with it costs nothing more."""
    price: float
    """Chance of a right answer that a visual token must buy, where a caller names no price."""
    mean_S: Floats
    spread_S: Floats
    layers: tuple[Layer, ...]
    """The last one has an output for each budget, the logit of its chance; before it stand rectifiers."""

    def chances(self, signals_NS: Floats) -> Floats:
        """Chance that each budget answers rightly: [N, budgets].

        Raises:
            ValueError: there are more or fewer signals than it was fitted on.
        """
        if signals_NS.ndim != 2 or signals_NS.shape[1] != len(self.signals):
            raise ValueError(
                f"signals have the shape {signals_NS.shape}, and the predictor reads {len(self.signals)} a question:"
                f" give [N, {len(self.signals)}]"
            )
        hidden_NO = np.clip((signals_NS - self.mean_S) / self.spread_S, -_FARTHEST, _FARTHEST)
        for number, layer in enumerate(self.layers, 1):
            hidden_NO = hidden_NO @ layer.weight_IO + layer.bias_O
            if number < len(self.layers):
                hidden_NO = np.maximum(hidden_NO, 0.0)
        chances: Floats = expit(hidden_NO)
        return chances

    def choose_all(self, signals_NS: Floats, *, price: float | None = None) -> NDArray[np.int64]:
        """For each question the place of its budget in `budgets`; of budgets that are worth the same the smaller."""
        chosen: NDArray[np.int64] = self._worth(signals_NS, price).argmax(axis=1)
        return chosen

    def _worth(self, signals_NS: Floats, price: float | None) -> Floats:
        """[N, budgets]."""
        tokens_B = np.array(self.budgets, dtype=np.float64)
        if self.reads_answer:
            tokens_B[0] = 0.0
        worth_NB: Floats = self.chances(signals_NS) - (self.price if price is None else price) * tokens_B
        return worth_NB

    def choose(
        self, signals: Sequence[float], *, price: float | None = None, among: Sequence[int] | None = None
    ) -> int:
        """The budget for one question.

        Args:
            signals: in the order of `signals`.
            price: chance of a right answer that a visual token must buy; 0: as many tokens as help at all; None: the
                predictor's own.
            among: budgets to choose from, at least one of them the predictor's; None: all of its own.

        Returns:
            Visual tokens per image.
        """
        (worth_B,) = self._worth(np.array([signals], dtype=np.float64), price)
        allowed = [place for place, budget in enumerate(self.budgets) if among is None or budget in among]
        return self.budgets[max(allowed, key=lambda place: (worth_B[place], -place))]

    @property
    def flops(self) -> int:
        """Of one choice."""
        return sum(2 * layer.weight_IO.size for layer in self.layers)

    def save(self, folder: Path) -> None:
        """Writes the two files of a predictor."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"mean": self.mean_S, "spread": self.spread_S}
        for number, layer in enumerate(self.layers):
            tensors |= {
                f"layers.{number}.weight": np.ascontiguousarray(layer.weight_IO),
                f"layers.{number}.bias": layer.bias_O,
            }
        save_file(tensors, folder / _WEIGHTS)
        card = {
            "format": _FORMAT,
            "budgets": list(self.budgets),
            "signals": list(self.signals),
            "reads_answer": self.reads_answer,
            "price": self.price,
            "layers": len(self.layers),
        }
        (folder / _CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "BudgetPredictor":
        """Reads what `save` wrote.

        Raises:
            UserError: the folder holds no predictor, or one whose two files do not belong together.
        """
        try:
            card: dict[str, Any] = json.loads((folder / _CARD).read_text(encoding="utf-8"))
            tensors: dict[str, Any] = load_file(folder / _WEIGHTS)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{folder} holds no budget predictor ({error}); give the folder that `parcelray analyze adaptive`"
                " wrote."
            ) from error
        if card.get("format") != _FORMAT:
            raise UserError(
                f"{folder} holds a budget predictor of format {card.get('format')!r}; this version reads {_FORMAT}. Fit"
                " it again."
            )
        layers = tuple(
            Layer(tensors[f"layers.{number}.weight"], tensors[f"layers.{number}.bias"])
            for number in range(card["layers"])
        )
        widths = (len(tensors["mean"]), layers[0].weight_IO.shape[0], layers[-1].weight_IO.shape[1])
        if widths != (len(card["signals"]), len(card["signals"]), len(card["budgets"])):
            raise UserError(
                f"{folder}: {_WEIGHTS} and {_CARD} do not belong together (widths {widths}); fit the predictor again."
            )
        return cls(
            budgets=tuple(card["budgets"]),
            signals=tuple(card["signals"]),
            reads_answer=card["reads_answer"],
            price=card["price"],
            mean_S=tensors["mean"],
            spread_S=tensors["spread"],
            layers=layers,
        )


def fit_predictor(
    signals_NS: Floats,
    right_NB: NDArray[np.bool_],
    *,
    budgets: tuple[int, ...],
    names: tuple[str, ...],
    reads_answer: bool,
    learning: Learning = LOGISTIC,
) -> BudgetPredictor:
    """Fits a predictor at price 0.

    Args:
        signals_NS: of the questions.
        right_NB: which budgets answer them rightly.
        budgets: visual tokens per image, ascending.
        names: of the signals.
        reads_answer: see `BudgetPredictor`.
        learning: how.

    Raises:
        UserError: every budget is right or wrong on all questions, so there is nothing to learn.
    """
    varies_B: NDArray[np.bool_] = np.asarray(right_NB.any(axis=0)) & ~np.asarray(right_NB.all(axis=0))
    if not varies_B.any():
        raise UserError(
            f"Each budget is right on all {len(right_NB)} questions or on none, so no predictor can be fitted; evaluate"
            " more questions, or others."
        )
    mean_S, spread_S = signals_NS.mean(axis=0), np.maximum(signals_NS.std(axis=0), _LEAST_SPREAD)
    standard_NS = np.clip((signals_NS - mean_S) / spread_S, -_FARTHEST, _FARTHEST)
    fit = _network if learning.hidden else _logistic
    layers = fit(standard_NS, right_NB[:, varies_B].astype(np.int64), learning)
    return BudgetPredictor(
        budgets,
        names,
        reads_answer,
        0.0,
        mean_S,
        spread_S,
        (*layers[:-1], _all_budgets(layers[-1], right_NB, varies_B)),
    )


def _logistic(standard_NS: Floats, right_NV: NDArray[np.int64], learning: Learning) -> list[Layer]:
    """One regression for each budget, as one layer."""
    models = [
        LogisticRegression(C=1 / learning.decay, max_iter=2000).fit(standard_NS, right_N) for right_N in right_NV.T
    ]
    return [
        Layer(
            np.stack([model.coef_[0] for model in models], axis=1), np.array([model.intercept_[0] for model in models])
        )
    ]


def _network(standard_NS: Floats, right_NV: NDArray[np.int64], learning: Learning) -> list[Layer]:
    model = MLPClassifier(
        hidden_layer_sizes=learning.hidden,
        alpha=learning.decay,
        solver="lbfgs",
        max_iter=300,
        random_state=learning.seed,
    )
    with warnings.catch_warnings():
        # That the steps end before the gradient is nought is a regularisation, too.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(standard_NS, right_NV if right_NV.shape[1] > 1 else right_NV[:, 0])
    return [Layer(weight_IO, bias_O) for weight_IO, bias_O in zip(model.coefs_, model.intercepts_, strict=True)]


def _all_budgets(last: Layer, right_NB: NDArray[np.bool_], varies_B: NDArray[np.bool_]) -> Layer:
    """An output for every budget; one that was always right, or never, has that chance whatever the signals."""
    weight_IO = np.zeros((last.weight_IO.shape[0], len(varies_B)))
    bias_O = np.where(right_NB.all(axis=0), _SURE, -_SURE).astype(np.float64)
    weight_IO[:, varies_B], bias_O[varies_B] = last.weight_IO, last.bias_O
    return Layer(weight_IO, bias_O)
