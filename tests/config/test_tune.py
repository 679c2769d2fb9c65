"""Searches that cannot work are rejected when the job file is read."""

from typing import Any

import pytest

from parcelray.config.loader import ConfigError, set_key, validate
from parcelray.config.tune import TuneJob

from ..training.conftest import TINY

EVALUATION: dict[str, Any] = {"kind": "evaluate", "name": "e", "benchmarks": ["mini"]}
RATE = {"type": "real", "low": 1e-4, "high": 1e-2}


def _job(base: dict[str, Any], parameters: dict[str, Any], metrics: list[str], **changes: Any) -> TuneJob:
    data = {
        "kind": "tune",
        "name": "s",
        "space": {"kind": "search_space", "name": "s", "job": "j", "parameters": parameters},
        "base": base,
        "algorithm": {"type": "random", "trials": 2},
        "objectives": [{"metric": metric, "mode": "max"} for metric in metrics],
    }
    return validate(TuneJob, data | changes, "file")


@pytest.mark.parametrize(
    ("base", "key"),
    [
        (TINY, "name"),
        (TINY, "storage"),
        (TINY, "tracking.uri"),
        (TINY, "report.samples"),
        (EVALUATION, "compute.actors"),
        (EVALUATION, "reference.reference"),
    ],
)
def test_a_space_over_a_key_without_effect_on_trials_is_rejected(base: dict[str, Any], key: str) -> None:
    metric = "train/loss" if base is TINY else "score"
    with pytest.raises(
        ConfigError,
        match=rf"changes {key}, which has no effect on a trial; remove it. Not searchable: kind, name, storage",
    ):
        _job(base, {key: {"type": "choice", "values": [1]}}, [metric])


@pytest.mark.parametrize(
    "metric", ["val/score@128", "val/score", "retention", "score", "val/accuracy@16", "gflops@32", "latency_ms"]
)
def test_an_objective_that_a_training_does_not_measure_is_rejected(metric: str) -> None:
    with pytest.raises(
        ConfigError,
        match=(
            rf"objective '{metric}' is not measured by a training with validation budgets 16, 64; legal:"
            r" val/score@B"
        ),
    ):
        _job(TINY, {"optimizer.learning_rate": RATE}, [metric])


def test_objectives_that_a_training_or_its_evaluation_measures_are_accepted() -> None:
    _job(TINY, {"optimizer.learning_rate": RATE}, ["val/score@64", "gflops@16", "kv_cache_bytes@64", "train/loss"])
    _job(TINY, {"validation.budgets": {"type": "choice", "values": [[128]]}}, ["val/score@128"])
    _job(TINY, {"optimizer.learning_rate": RATE}, ["score/video", "tokens"], evaluation=EVALUATION)
    with pytest.raises(ConfigError, match=r"retention only with evaluation.reference"):
        _job(TINY, {"optimizer.learning_rate": RATE}, ["retention"], evaluation=EVALUATION)
    _job(
        TINY,
        {"optimizer.learning_rate": RATE},
        ["retention/video"],
        evaluation=EVALUATION | {"reference": {"reference": "mini_base"}},
    )


def test_early_stopping_needs_an_objective_that_is_measured_during_training() -> None:
    stopping = {"type": "asha", "grace_steps": 1}
    with pytest.raises(
        ConfigError,
        match=r"val/score@64 is only measured at the end of a training; use .* base.validation.every_steps above 0",
    ):
        _job(TINY, {"optimizer.learning_rate": RATE}, ["val/score@64"], early_stopping=stopping)
    validated = TINY | {"validation": {"every_steps": 3, "budgets": [64]}}
    _job(validated, {"optimizer.learning_rate": RATE}, ["val/score@64"], early_stopping=stopping)


def test_a_key_path_can_contain_list_indices() -> None:
    data: dict[str, Any] = {"benchmarks": [{"name": "mini"}], "budgets": [16, 64]}
    set_key(data, "benchmarks.0.limit", 5, "the search")
    set_key(data, "budgets.1", 32, "the search")
    assert data == {"benchmarks": [{"name": "mini", "limit": 5}], "budgets": [16, 32]}
    for key in ("benchmarks.1.limit", "benchmarks.limit"):
        with pytest.raises(
            ConfigError, match=r"the search: benchmarks is a list of 1 items and has no index .*; legal: 0 to 0"
        ):
            set_key(data, key, 5, "the search")


def test_adaptive_budgets_belong_to_a_split_search_by_retention_and_tokens() -> None:
    parameters = {
        "anchor_grid": {"type": "choice", "values": [0, 4]},
        "budgets": {"type": "choice", "values": [[16], [64]]},
    }
    fit = {"type": "anchors_fit", "anchor_grid": "anchor_grid", "budget": "budgets", "patch_grid": 16}
    space = {"kind": "search_space", "name": "s", "job": "j", "parameters": parameters, "constraints": [fit]}
    _job(EVALUATION, parameters, ["retention", "tokens"], space=space, adaptive={"budgets": [16, 64]})
    with pytest.raises(
        ConfigError, match=r"adaptive.budgets has 256, which the space s does not search; legal: 16, 64"
    ):
        _job(EVALUATION, parameters, ["retention", "tokens"], space=space, adaptive={"budgets": [16, 256]})
    with pytest.raises(
        ConfigError,
        match=r"needs retention or score as first objective and tokens as second, .* are retention, gflops; reorder",
    ):
        _job(EVALUATION, parameters, ["retention", "gflops"], space=space, adaptive={"budgets": [16, 64]})
    with pytest.raises(
        ConfigError, match=r"adaptive needs a space of splits: exactly two parameters under anchors_fit, unlike s;"
    ):
        _job(EVALUATION, parameters, ["retention", "tokens"], adaptive={"budgets": [16, 64]})
