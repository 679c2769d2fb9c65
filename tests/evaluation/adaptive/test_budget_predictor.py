"""The budget predictor: its fit, the effect of the price, and saving and loading."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from parcelray.errors import UserError
from parcelray.evaluation.adaptive.budget_predictor import BudgetPredictor, FitSettings, fit_predictor

NAMES = ("hardness", "noise")
BUDGETS = (16, 64, 256)


def _questions(count: int = 600) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Two signals: one decides which budgets are correct (below 1: all; below 2: from 64; else 256), one is noise."""
    rng = np.random.default_rng(0)
    signals_NS = np.stack([rng.uniform(0, 3, count), rng.normal(size=count)], axis=1)
    return signals_NS, signals_NS[:, :1] < np.array([1.0, 2.0, 3.0])


@pytest.fixture(scope="module", params=[(), (8,)], ids=["logistic", "hidden layer"])
def predictor(request: pytest.FixtureRequest) -> BudgetPredictor:
    signals_NS, correct_NB = _questions()
    return fit_predictor(
        signals_NS,
        correct_NB,
        budgets=BUDGETS,
        names=NAMES,
        reads_answer=False,
        settings=FitSettings(request.param, decay=0.01),
    )


def test_it_predicts_which_budgets_are_correct(predictor: BudgetPredictor) -> None:
    chances_NB = predictor.chances(np.array([[0.2, 0.0], [1.5, 0.0], [2.8, 0.0]]))
    assert ((chances_NB > 0.5) == [[True, True, True], [False, True, True], [False, False, True]]).all()
    assert [predictor.choose(signals, price=1e-4) for signals in ([0.2, 0.0], [1.5, 0.0], [2.8, 0.0])] == [16, 64, 256]


def test_a_higher_price_never_buys_more_tokens(predictor: BudgetPredictor) -> None:
    signals_NS, _ = _questions(100)
    spent = [np.array(BUDGETS)[predictor.choose_all(signals_NS, price=price)] for price in (0.0, 1e-3, 1e-2, 1.0)]
    assert all((less >= more).all() for less, more in itertools.pairwise(spent))
    assert set(spent[-1]) == {16}


def test_the_budget_of_an_existing_answer_costs_nothing() -> None:
    signals_NS, correct_NB = _questions()
    known = fit_predictor(signals_NS, correct_NB, budgets=BUDGETS, names=NAMES, reads_answer=True)
    plain = fit_predictor(signals_NS, correct_NB, budgets=BUDGETS, names=NAMES, reads_answer=False)
    price = 0.01
    np.testing.assert_array_equal(known.chances(signals_NS), plain.chances(signals_NS))
    worth = known.chances(signals_NS) - price * np.array([0, 64, 256])
    np.testing.assert_array_equal(known.choose_all(signals_NS, price=price), worth.argmax(axis=1))


def test_a_saved_predictor_is_the_same(predictor: BudgetPredictor, tmp_path: Path) -> None:
    predictor.save(tmp_path / "p")
    loaded = BudgetPredictor.load(tmp_path / "p")
    signals_NS, _ = _questions(50)
    np.testing.assert_array_equal(loaded.chances(signals_NS), predictor.chances(signals_NS))
    assert (loaded.budgets, loaded.signals, loaded.price, loaded.flops) == (
        predictor.budgets,
        predictor.signals,
        predictor.price,
        predictor.flops,
    )
    assert sorted(path.suffix for path in (tmp_path / "p").iterdir()) == [".json", ".safetensors"]


def test_a_damaged_predictor_is_refused(predictor: BudgetPredictor, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no budget predictor"):
        BudgetPredictor.load(tmp_path)
    predictor.save(tmp_path)
    card = json.loads((tmp_path / "predictor.json").read_text())
    (tmp_path / "predictor.json").write_text(json.dumps(card | {"budgets": [16, 64]}))
    with pytest.raises(UserError, match="do not match"):
        BudgetPredictor.load(tmp_path)
    (tmp_path / "predictor.json").write_text(json.dumps(card | {"format": 9}))
    with pytest.raises(UserError, match="of format 9"):
        BudgetPredictor.load(tmp_path)
    with pytest.raises(ValueError, match="reads 2 per question"):
        predictor.chances(np.zeros((1, 3)))


def test_budgets_that_are_always_or_never_correct() -> None:
    signals_NS, correct_NB = _questions()
    correct_NB = np.stack(
        [np.zeros(len(correct_NB), dtype=bool), correct_NB[:, 0], np.ones(len(correct_NB), dtype=bool)], axis=1
    )
    for hidden in ((), (4,)):
        found = fit_predictor(
            signals_NS, correct_NB, budgets=BUDGETS, names=NAMES, reads_answer=False, settings=FitSettings(hidden, 0.01)
        )
        chances_NB = found.chances(signals_NS)
        assert chances_NB[:, 0].max() < 1e-6
        assert chances_NB[:, 2].min() > 1 - 1e-6
        assert 0.2 < chances_NB[:, 1].mean() < 0.5
    with pytest.raises(UserError, match="no predictor can be fitted"):
        fit_predictor(signals_NS, correct_NB[:, [0, 2]], budgets=(16, 256), names=NAMES, reads_answer=False)
