"""The study of adaptive budgets from a job to files and MLflow, on a tiny checkpoint, and its errors."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient
from PIL import Image
from rich.console import Console

from parcelray.config.evaluate import EvaluateJob
from parcelray.datasets.sample import Sample
from parcelray.errors import UserError
from parcelray.evaluation.adaptive import study
from parcelray.evaluation.adaptive.adaptive_budget import AFTER, BEFORE, FIXED, ORACLE
from parcelray.evaluation.adaptive.budget_predictor import BudgetPredictor
from parcelray.evaluation.adaptive.study import PREDICTOR_FOLDERS, study_adaptive
from parcelray.evaluation.run import run_evaluation

from ...stores import new_store
from ...tiny import own_benchmark, tiny_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload``:DeprecationWarning"),
    pytest.mark.usefixtures("without_pictures"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), 1)


def _job(storage: Path, checkpoint: Path, data: Path, **changes: Any) -> EvaluateJob:
    content = {
        "kind": "evaluate",
        "name": "adaptive",
        "model": {"reference": str(checkpoint)},
        "benchmarks": [{"name": "own", "data": str(data)}],
        "catalog": [str(data / "own.yaml")],
        "budgets": ["blind", 16, 64],
        "compute": {"actors": 0},
        "tracking": {"uri": None},
        "storage": str(storage),
    }
    return EvaluateJob.model_validate(content | changes)


def _console() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_a_study_writes_curves_a_plot_and_predictors(checkpoint: Path, tmp_path: Path) -> None:
    # An untrained model is never correct, so the reference of every other question becomes its own answer at 16 tokens.
    evaluated = run_evaluation(
        _job(tmp_path / "before", checkpoint, own_benchmark(tmp_path / "a", [["nothing"]] * 40)),
        _console(),
        tables=False,
    )
    texts = [answer.text for answer in evaluated.summary.splits[0].answers[16]]
    data = own_benchmark(tmp_path / "b", [[text if number % 2 else "nothing"] for number, text in enumerate(texts)])
    uri = new_store(tmp_path)
    run = study_adaptive(_job(tmp_path, checkpoint, data, tracking={"uri": uri}), _console(), folder=tmp_path / "study")
    found = json.loads((tmp_path / "study" / "adaptive.json").read_text())
    assert found["budgets"] == [16, 64], "the blind baseline is not among the budgets"
    assert found["questions"] == 40
    assert {FIXED, BEFORE, AFTER, ORACLE, "escalate 16 > 64"} <= {point["method"] for point in found["points"]}
    with Image.open(tmp_path / "study" / "adaptive.png") as image:
        assert image.width > 300
    for method, name in PREDICTOR_FOLDERS.items():
        predictor = BudgetPredictor.load(tmp_path / "study" / name)
        assert predictor.budgets == (16, 64)
        assert predictor.reads_answer == (method == AFTER)
        assert predictor.choose([0.0] * len(predictor.signals)) in (16, 64)
    spent = {point.setting: point.spent for point in run.study.curve(FIXED)}
    assert spent[16].score.value == pytest.approx(50)
    assert spent[16].tokens.value == 16
    assert spent[16].gflops.value < spent[64].gflops.value
    client = MlflowClient(uri)
    (logged,) = client.search_runs(
        [each.experiment_id for each in client.search_experiments()], "attributes.run_name LIKE 'analyze-adaptive-%'"
    )
    assert logged.info.status == "FINISHED"
    assert "predictor/score" in logged.data.metrics


def test_answers_of_a_beam_search_are_refused_because_they_have_no_confidence(checkpoint: Path, tmp_path: Path) -> None:
    data = own_benchmark(tmp_path / "a", [["red"]] * 40, "decoding: beam\nnum_beams: 2\n")
    with pytest.raises(UserError, match="have no confidence"):
        study_adaptive(_job(tmp_path, checkpoint, data, budgets=[16]), _console(), folder=tmp_path / "study")


def test_signals_are_read_for_scored_samples_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples without a score have problems, such as an image that cannot be decoded."""

    def sample(number: int) -> Sample:
        return Sample(str(number), "b", "general", "t", (b"",), "how many", ("1",))

    rows = SimpleNamespace(read=lambda row: SimpleNamespace(samples=(sample(row),)))
    benchmark = SimpleNamespace(rows=range(3 * study._CHUNK), reader=rows)
    monkeypatch.setattr(study, "prepare", lambda job, image_size: [benchmark])
    seen: list[str] = []

    def read(samples: list[Sample]) -> list[list[float]]:
        assert samples
        seen.extend(each.id for each in samples)
        return [[float(each.id)] for each in samples]

    splits = [SimpleNamespace(benchmark="b", samples=(sample(2 * study._CHUNK + 1), sample(1)))]
    reader: Any = SimpleNamespace(read=read)
    signals = study._read_signals(None, splits, reader, 64)  # type: ignore[arg-type]
    assert signals.tolist() == [[2 * study._CHUNK + 1], [1]]
    assert len(seen) == 2
