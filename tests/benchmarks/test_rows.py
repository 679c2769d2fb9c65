"""The rows of a training as a benchmark: each turn is one question, and unusable rows are reported."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from parcelray.benchmarks.catalog import builtin
from parcelray.benchmarks.open import open_reader
from parcelray.config.benchmark import BenchmarkConfig
from parcelray.config.evaluate import EvaluateJob
from parcelray.errors import UserError
from parcelray.evaluation.run import run_evaluation
from tests.datasets.conversation_data import CASES, names_of, rows_of, write_folder


def _benchmark(**source: Any) -> BenchmarkConfig:
    config = builtin()["rows"].model_dump(mode="json")
    return BenchmarkConfig.model_validate(config | {"source": {"type": "rows"} | source})


def _data(folder: Path, **changes: Any) -> dict[str, Any]:
    path = folder / "rows.json"
    return {"type": "conversations", "path": str(path), "images": str(folder / "images")} | changes


def test_every_turn_is_a_question_and_rows_that_share_an_image_are_together(tmp_path: Path) -> None:
    write_folder(tmp_path, 12)
    rows = json.loads((tmp_path / "rows.json").read_text())
    rows[7]["image"] = "0.png"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    reader = open_reader(_benchmark(data=_data(tmp_path), split="all"))
    order = list(reader.order())
    assert sorted(order) == list(range(12))
    assert order[order.index(0) + 1] == 7
    assert reader.cluster(7) == reader.cluster(0) != reader.cluster(1)
    samples = [sample for row in order for sample in reader.read(row).samples]
    assert {sample.benchmark for sample in samples} == {"rows"}
    turns = sum(len(row["conversations"]) // 2 for row in rows_of(12))
    assert len({sample.id for sample in samples}) == len(samples) == turns
    assert [(sample.prompt, sample.answers) for sample in reader.read(4).samples] == [
        ("what is 4?", ("number 4",)),
        ("and then?", ("5",)),
    ]
    assert all(len(reader.read(number).samples[0].images) == len(names_of(row)) for number, row in enumerate(rows))


def test_unusable_rows_are_problems_of_an_evaluation_of_all_rows() -> None:
    data = {"path": str(CASES / "rows" / "conversations_bad.jsonl"), "images": str(CASES), "type": "conversations"}
    reader = open_reader(_benchmark(data=data, split="all"))
    found = [reader.read(row) for row in reader.order()]
    assert [problem.row for each in found for problem in each.problems] == [
        "missing-file",
        "no-answer",
        "more-placeholders-than-images",
    ]
    assert {sample.id for each in found for sample in each.samples} == {"null-metadata", "cut-image", "control-text"}
    assert reader.fingerprint().rows == 6


def test_without_rows_the_message_says_where_to_describe_them() -> None:
    with pytest.raises(UserError, match=r"describe them in source\.data"):
        open_reader(builtin()["rows"])


@pytest.mark.usefixtures("without_pictures")
def test_one_job_file_evaluates_a_held_out_split_next_to_chance_and_blind(
    tmp_path: Path, tiny_start: dict[str, Any]
) -> None:
    write_folder(tmp_path, 30)
    source = {"data": _data(tmp_path, held_out={"test": 0.3}), "split": "test"}
    job = EvaluateJob.model_validate(
        {
            "kind": "evaluate",
            "name": "own",
            "model": {"reference": tiny_start["reference"]},
            "benchmarks": [{"name": "rows", "metric": "anls", "source": source, "max_new_tokens": 3}],
            "budgets": ["blind", 16],
            "compute": {"actors": 0},
            "tracking": {"uri": None},
            "storage": str(tmp_path),
        }
    )
    console = Console(file=io.StringIO(), record=True, width=200)
    (split,) = run_evaluation(job, console).summary.splits
    assert set(split.scores) == {0, 16}
    assert split.metric.startswith("anls")
    assert 0 < len(split.samples) < 30
    assert "chance" in console.export_text()
