"""An evaluation from its job to tables and MLflow, in this process; passes/test_ray_pass.py tests the pass on Ray."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from rich.console import Console

from parcelray.config.evaluate import EvaluateJob
from parcelray.errors import SystemFailure, UnsupportedBudgetError, UserError
from parcelray.evaluation.compare import compare_evaluations, compare_seeds
from parcelray.evaluation.plan import evaluation_plan
from parcelray.evaluation.predict.confidence import Confidence, ConfidenceRecorder
from parcelray.evaluation.results import plot_evaluation
from parcelray.evaluation.run import EvaluatedRun, run_evaluation
from parcelray.evaluation.scoring.summary import rescore
from parcelray.models.decoding import NOT_FINITE

from ..benchmarks.table_data import png
from ..stores import new_store
from ..tiny import OWN, tiny_checkpoint

pytestmark = pytest.mark.usefixtures("without_pictures")
QUESTIONS = 12
"""Number of samples of the mini suite, equally many of each of its four families."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage of the tests that do not count computed predictions, so that they share stored predictions."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), 1)


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("other"), 2)


def _job(storage: Path, checkpoint: Path, **changes: Any) -> EvaluateJob:
    data = {
        "kind": "evaluate",
        "name": "e",
        "model": {"reference": str(checkpoint)},
        "benchmarks": [{"name": "mini", "source": {"samples": QUESTIONS // 4}, "max_new_tokens": 3}],
        "budgets": ["blind", 16, "full"],
        "compute": {"actors": 0, "rows_per_shard": 5},
        "tracking": {"uri": None},
        "storage": str(storage),
    }
    return EvaluateJob.model_validate(data | changes)


def _run(job: EvaluateJob, parent: str | None = None) -> EvaluatedRun:
    return run_evaluation(job, Console(file=io.StringIO(), width=200), parent_run_id=parent)


def _table(folder: Path, rows: int = 12, broken: int = 0) -> Path:
    """A benchmark outside the catalog: questions about images that cannot all be decoded."""
    (folder / "own.yaml").write_text(OWN % 12)
    table = [
        {
            "name": f"row {number}",
            "question": "what color",
            "answer": ["red"],
            "image": {"bytes": png() if number >= broken else b"no image", "path": None},
        }
        for number in range(rows)
    ]
    pq.write_table(pa.Table.from_pylist(table), folder / "test.parquet")
    return folder


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"benchmarks": [{"name": "pope_random", "data": "nothere"}]}, "nothere"),
        ({"benchmarks": [{"name": "no_such_benchmark"}]}, "no_such_benchmark"),
        ({"budgets": [7777]}, "7777"),
    ],
)
def test_a_mistake_in_a_job_does_not_reserve_its_name(
    checkpoint: Path, shared: Path, mistake: dict[str, Any], message: str
) -> None:
    job = _job(shared, checkpoint, name=f"mistaken-{message}")
    with pytest.raises(UserError, match=message):
        _run(EvaluateJob.model_validate(job.model_dump(mode="json") | mistake))
    run = _run(job)
    assert run.computed + run.present == QUESTIONS * 3


def test_an_evaluation_writes_tables_a_plot_and_every_prediction(checkpoint: Path, tmp_path: Path) -> None:
    uri = new_store(tmp_path)
    job = _job(tmp_path, checkpoint, tracking={"uri": uri})
    threads = (os.cpu_count() or 1) + 1
    torch.set_num_threads(threads)
    run = _run(job)
    assert torch.get_num_threads() == threads, "an evaluation in this process leaves its threads as they are"
    assert (run.computed, run.present) == (QUESTIONS * 3, 0)
    assert run.summary.budgets == (0, 16, 256)
    result = json.loads((run.folder / "result.json").read_text())
    assert [split["name"] for split in result["splits"]] == [
        "mini/general",
        "mini/resolution",
        "mini/grounding",
        "mini/video",
    ]
    assert result["data"]["mini"]["rows"] == QUESTIONS
    assert (
        result["splits"][0]["scores"]["256"]["retention"] is None
        or result["splits"][0]["scores"]["256"]["retention"]["value"] == 100
    )
    lines = (run.folder / "result.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 * 3
    assert lines[0].startswith("split,family,metric,num_visual_tokens,score,std_error,low,high,n,unscored")
    assert "## Scores [95 %]" in (run.folder / "result.md").read_text()
    samples = pq.read_table(run.folder / "samples.parquet").to_pylist()
    assert len(samples) == QUESTIONS * 3
    assert {"prompt", "answer", "value", "right"} <= samples[0].keys()
    plot_evaluation(run.summary, tmp_path / "result.png")
    with Image.open(tmp_path / "result.png") as image:
        assert image.width > 1000
    client = MlflowClient(uri)
    assert run.mlflow_run_id is not None
    record = client.get_run(run.mlflow_run_id)
    assert record.info.status == "FINISHED"
    history = client.get_metric_history(run.mlflow_run_id, "mini/general/exact_match")
    assert [metric.step for metric in history] == [0, 16, 256]
    assert [file.path for file in client.list_artifacts(run.mlflow_run_id, "figures")] == ["figures/result.png"]
    assert {file.path for file in client.list_artifacts(run.mlflow_run_id)} >= {
        "result.json",
        "result.csv",
        "result.md",
        "samples.parquet",
        "figures",
    }
    again = _run(job)
    assert (again.computed, again.present) == (0, QUESTIONS * 3)
    assert again.mlflow_run_id == run.mlflow_run_id
    assert len(client.get_metric_history(run.mlflow_run_id, "mini/general/exact_match")) == 3


def test_predictions_are_shared_by_all_evaluations_of_the_same_weights(checkpoint: Path, tmp_path: Path) -> None:
    _run(_job(tmp_path, checkpoint))
    more = _run(_job(tmp_path, checkpoint, name="more", budgets=[16, 64]))
    assert (more.computed, more.present) == (QUESTIONS, QUESTIONS)


def test_an_evaluation_is_scored_again_without_the_model(checkpoint: Path, tmp_path: Path) -> None:
    run = _run(_job(tmp_path, checkpoint))
    summary = rescore(run.folder, {}, 5.0)
    assert summary.to_dict() == run.summary.to_dict()
    other = rescore(run.folder, {"mini": "anls"}, 5.0)
    assert {split.metric for split in other.splits} == {"anls:paper"}
    with pytest.raises(UserError, match="has no benchmark nlvr; it has mini"):
        rescore(run.folder, {"nlvr": "anls"}, 5.0)
    for shard in (tmp_path / "predictions").rglob("*.parquet"):
        shard.unlink()
    with pytest.raises(SystemFailure, match=f"{QUESTIONS * 3} predictions on mini are not in"):
        rescore(run.folder, {}, 5.0)
    with pytest.raises(UserError, match="holds no evaluation"):
        rescore(tmp_path, {}, 5.0)


def test_retention_is_relative_to_the_reference_model(checkpoint: Path, other_checkpoint: Path, tmp_path: Path) -> None:
    run = _run(_job(tmp_path, checkpoint, reference={"reference": str(other_checkpoint)}))
    assert run.computed == QUESTIONS * 4
    assert run.summary.reference != run.summary.evaluation.model
    assert run.summary.reference_budget == 256
    assert rescore(run.folder, {}, 5.0).to_dict() == run.summary.to_dict()


def test_two_evaluations_are_compared_on_the_same_samples(
    checkpoint: Path, other_checkpoint: Path, shared: Path
) -> None:
    one, two = _run(_job(shared, checkpoint)), _run(_job(shared, other_checkpoint, name="f", budgets=[16, 64]))
    found = compare_evaluations(str(one.folder), str(two.folder))
    assert [(first, second) for first, second, _ in found.pairs] == [(16, 16)]
    assert len(found.pairs[0][2]) == 4
    budgets = compare_evaluations(f"{one.folder}@full", f"{one.folder}@blind")
    assert [(first, second) for first, second, _ in budgets.pairs] == [(256, 0)]
    assert json.dumps(budgets.to_dict())
    Console(file=io.StringIO(), width=200).print(budgets.to_rich())
    with pytest.raises(UserError, match="'32' is not a budget of this evaluation; it has blind, 16, 256"):
        compare_evaluations(f"{one.folder}@32", str(two.folder))


def test_seeds_are_averaged(checkpoint: Path, other_checkpoint: Path, shared: Path) -> None:
    runs = [_run(_job(shared, model, name=name)) for name, model in (("a", checkpoint), ("b", other_checkpoint))]
    table = compare_seeds([run.folder for run in runs])
    values = [run.summary.splits[3].scores[16].estimate.value for run in runs]
    spread = table.scores["mini/video"][16]
    assert spread.mean == pytest.approx(sum(values) / 2)
    assert spread.std == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert json.dumps(table.to_dict())
    with pytest.raises(UserError, match="of the same weights"):
        compare_seeds([runs[0].folder, runs[0].folder])


def test_changed_data_are_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    data = _table(tmp_path)
    job = _job(tmp_path, checkpoint, benchmarks=[{"name": "own", "data": str(data)}], catalog=[str(data / "own.yaml")])
    assert _run(job).computed == 36
    _table(tmp_path, rows=11)
    with pytest.raises(
        UserError,
        match=r"own: the data differ from .* this evaluation's earlier run \(revision .*; rows 12 -> 11; ids .*",
    ):
        _run(job)


def test_samples_that_cannot_be_evaluated_are_counted_up_to_a_limit(checkpoint: Path, tmp_path: Path) -> None:
    data = _table(tmp_path, broken=3)
    choice = {"benchmarks": [{"name": "own", "data": str(data)}], "catalog": [str(data / "own.yaml")]}
    run = _run(_job(tmp_path, checkpoint, max_unscored=0.25, **choice))
    assert len(run.summary.splits[0].samples) == 9
    unasked = run.summary.to_dict()["data"]["own"]["unasked"]
    assert [problem["row"] for problem in unasked] == ["row 0", "row 1", "row 2"]
    assert "3 samples could not be evaluated" in (run.folder / "result.md").read_text()
    with pytest.raises(
        UserError,
        match=(
            r"own: 3 of 12 samples could not be evaluated, more than max_unscored 0.1 allows; the first: row 0: An"
            r" image of 8 bytes cannot be decoded; .* Fix the data, or raise max_unscored\."
        ),
    ):
        _run(_job(tmp_path, checkpoint, name="strict", max_unscored=0.1, **choice))
    assert _run(_job(tmp_path, checkpoint, name="strict", max_unscored=0.25, **choice)).computed == 0


def test_samples_without_finite_logits_are_problems_that_count_towards_the_limit(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At one of two budgets, three of twelve samples get logits that are not finite."""
    data = _table(tmp_path)
    confidences = ConfidenceRecorder.confidences
    calls = []

    def broken(recorder: ConfidenceRecorder, lengths: Any) -> list[Confidence | None]:
        calls.append(len(lengths))
        given = confidences(recorder, lengths)
        return [None if len(calls) == 2 and row < 3 else each for row, each in enumerate(given)]

    monkeypatch.setattr(ConfidenceRecorder, "confidences", broken)
    changes: dict[str, Any] = {
        "benchmarks": [{"name": "own", "data": str(data)}],
        "catalog": [str(data / "own.yaml")],
        "budgets": [16, "full"],
        "compute": {"actors": 0, "rows_per_shard": 12},
    }
    run = _run(_job(tmp_path, checkpoint, max_unscored=0.25, **changes))
    assert len(run.summary.splits[0].samples) == 9
    unasked = run.summary.to_dict()["data"]["own"]["unasked"]
    assert [problem["reason"] for problem in unasked] == [NOT_FINITE] * 3
    calls.clear()
    monkeypatch.setattr(ConfidenceRecorder, "confidences", lambda recorder, lengths: [None] * len(lengths))
    with pytest.raises(
        UserError, match=r"own: 12 of 12 samples could not be evaluated.* logits are not finite [^.]*\. Fix"
    ):
        _run(_job(tmp_path / "strict", checkpoint, **changes))


def test_a_job_can_choose_decoding_by_likelihood(checkpoint: Path, tmp_path: Path) -> None:
    data = _table(tmp_path)
    own = (data / "own.yaml").read_text().replace("exact_match", "multiple_choice:option")
    (data / "own.yaml").write_text(
        own.replace("image: image}", "image: image, choices: list<string>}\n  choices: [choices]")
    )
    table = pq.read_table(data / "test.parquet")
    pq.write_table(table.append_column("choices", pa.array([["red", "blue"]] * len(table))), data / "test.parquet")
    choice = {"name": "own", "data": str(data), "decoding": "likelihood"}
    run = _run(_job(tmp_path, checkpoint, benchmarks=[choice], catalog=[str(data / "own.yaml")]))
    answers = {row["answer"] for row in pq.read_table(run.folder / "samples.parquet").to_pylist()}
    assert answers <= {"red", "blue"}
    assert all(score.unparsed == 0 for split in run.summary.splits for score in split.scores.values())


def test_a_limit_is_reported_in_the_result(checkpoint: Path, tmp_path: Path) -> None:
    data = _table(tmp_path, rows=10)
    run = _run(
        _job(
            tmp_path,
            checkpoint,
            benchmarks=[{"name": "own", "data": str(data), "limit": 4}],
            catalog=[str(data / "own.yaml")],
        )
    )
    split = run.summary.to_dict()["splits"][0]
    assert (split["samples"], split["whole"]) == (4, False)
    assert (
        "own: the data have 10 rows, but 12 are expected; do not compare these scores with published ones"
        in (run.folder / "result.md").read_text()
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"budgets": [8]}, UnsupportedBudgetError, "does not support 8 visual tokens"),
        ({"benchmarks": ["nlvr"]}, UserError, "nlvr is read from local files; give their folder with data:"),
        ({"benchmarks": ["minni"]}, UserError, r"no benchmark 'minni' \(did you mean mini"),
        ({"benchmarks": [{"name": "mini", "metric": "anl"}]}, UserError, r"no metric 'anl' \(did you mean 'anls'"),
        ({"benchmarks": [{"name": "mini", "source": {"sample": 3}}]}, UserError, "sample is not a known key"),
        ({"model": {"reference": "nowhere"}}, UserError, "'nowhere' is neither an existing folder"),
    ],
)
def test_mistakes_are_reported_before_anything_runs(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        _run(_job(tmp_path, checkpoint, **changes))


def test_another_configuration_under_the_same_name_is_refused(
    checkpoint: Path, other_checkpoint: Path, shared: Path
) -> None:
    _run(_job(shared, checkpoint))
    with pytest.raises(UserError, match=r"whose configuration differs from this one \(model.reference: 'sha256:"):
        _run(_job(shared, other_checkpoint))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmarks": ["mini", {"name": "mini"}]}, "listed twice"),
        ({"budgets": [16, 16]}, "must be distinct"),
        ({"budgets": ["all"]}, "blind"),
        ({"benchmarks": []}, "at least 1 item"),
    ],
)
def test_an_invalid_job_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _job(tmp_path, tmp_path, **changes)


def test_a_plan_has_the_rows_budgets_and_flops(checkpoint: Path, shared: Path) -> None:
    plan = evaluation_plan(_job(shared, checkpoint))
    assert (plan.rows, plan.questions, plan.answers, plan.budgets) == (
        {"mini": QUESTIONS},
        QUESTIONS,
        QUESTIONS * 3,
        (0, 16, 256),
    )
    assert plan.flops > 0
    assert plan.identity == _run(_job(shared, checkpoint)).identity


_BY_FAMILY = """
name: own
family: general
source: {splits: [test], rows: 12}
columns:
  types: {name: string, question: string, answer: list<string>, image: image}
  id: [name]
  images: [image]
  answers: {column: answer, form: list}
prompts: {paligemma: "answer en {question}", llava: "{question}"}
max_new_tokens: 3
metric: {paligemma: exact_match:raw, llava: gqa:llava}
"""


def test_the_metric_of_the_prompt_family_is_stored_and_another_family_gives_a_warning(
    checkpoint: Path, tmp_path: Path
) -> None:
    data = _table(tmp_path)
    (data / "own.yaml").write_text(_BY_FAMILY)
    mini = {"name": "mini", "source": {"samples": 1}, "max_new_tokens": 3}
    own = {"benchmarks": [mini, {"name": "own", "data": str(data)}], "catalog": [str(data / "own.yaml")]}
    job = _job(tmp_path, checkpoint, budgets=[16], prompt_family="llava", **own)
    (warning,) = evaluation_plan(job).warnings
    assert "is a paligemma model, but prompt_family is llava" in warning
    assert "metrics of own are those of llava models; set prompt_family: paligemma" in warning
    output = io.StringIO()
    run = run_evaluation(job, Console(file=output, width=200))
    assert output.getvalue().count(warning) == 1
    (split,) = (split for split in run.summary.splits if split.name == "own")
    assert split.metric == "gqa:llava"
    assert rescore(run.folder, {}, 5.0).to_dict() == run.summary.to_dict()
    # A changed metric of the benchmark file counts in the next run of the same job, which reuses the predictions.
    (data / "own.yaml").write_text(_BY_FAMILY.replace("gqa:llava", "gqa:vlmevalkit"))
    assert "gqa:llava" in {split.metric for split in rescore(run.folder, {}, 5.0).splits}
    again = _run(job)
    assert again.computed == 0
    assert "gqa:vlmevalkit" in {split.metric for split in again.summary.splits}
    matching = job.model_copy(update={"prompt_family": "paligemma"})
    assert evaluation_plan(matching).warnings == ()
    assert evaluation_plan(_job(tmp_path, checkpoint, prompt_family="llava")).warnings == (), "mini has no families"
    (data / "own.yaml").write_text(_BY_FAMILY.replace("gqa:llava", "gqa:lava"))
    with pytest.raises(UserError, match="gqa has no variant 'lava'"):
        evaluation_plan(job)


def test_a_plan_accounts_for_reducers_and_splits(tmp_path: Path) -> None:
    vanilla = tiny_checkpoint(tmp_path / "vanilla", 1, connector=None)
    few, many = (
        evaluation_plan(_job(tmp_path, vanilla, budgets=[budget], reducer={"type": "cluster_aggregate"})).flops
        for budget in (13, 200)
    )
    assert 0 < few < many
    spatial, clusters, merging = (
        evaluation_plan(_job(tmp_path, vanilla, budgets=[128], reducer={"type": name})).flops
        for name in ("spatial_sampling", "cluster_aggregate", "tome")
    )
    assert spatial < clusters, "clusters need all projected tokens and their similarities"
    assert spatial < merging, "merging runs the vision tower once more"
    supernet = tiny_checkpoint(
        tmp_path / "supernet", 1, connector={"type": "parcel", "num_heads": 2, "anchor_grids": [0, 2]}
    )
    queries, anchors = (
        evaluation_plan(_job(tmp_path, supernet, budgets=[4], anchor_grid=side)).flops for side in (0, 2)
    )
    assert queries > anchors, "four queries cost attention, four anchors only pooling"


def test_a_training_free_reducer_is_part_of_the_prediction_key(checkpoint: Path, tmp_path: Path) -> None:
    compressing, checkpoint = checkpoint, tiny_checkpoint(tmp_path / "vanilla", 1, connector=None)
    with pytest.raises(UserError, match="and this one has the connector parcel"):
        _run(_job(tmp_path, compressing, name="twice", budgets=[16], reducer={"type": "divprune"}))
    plain = _run(_job(tmp_path, checkpoint, budgets=["full"]))
    reduced = _run(
        _job(tmp_path, checkpoint, name="reduced", budgets=[13, "full"], reducer={"type": "random_sampling", "seed": 1})
    )
    assert reduced.summary.budgets == (13, 256)
    assert reduced.computed == 2 * QUESTIONS
    # At the full budget a reducer changes nothing, but it is another setting.
    texts = [[answer.text for split in run.summary.splits for answer in split.answers[256]] for run in (plain, reduced)]
    assert texts[0] == texts[1]
    other = _run(_job(tmp_path, checkpoint, name="other", budgets=[13], reducer={"type": "random_sampling", "seed": 2}))
    assert other.computed == QUESTIONS
    with pytest.raises(UnsupportedBudgetError, match="average_pooling does not support 13 visual tokens"):
        _run(_job(tmp_path, checkpoint, name="pooled", budgets=[13], reducer={"type": "average_pooling"}))


def test_a_supernet_is_evaluated_at_any_split(tmp_path: Path) -> None:
    grids = [0, 2, 4, 8]
    supernet = tiny_checkpoint(
        tmp_path / "supernet", 1, connector={"type": "parcel", "num_heads": 2, "anchor_grids": grids}
    )
    by_routing = _run(_job(tmp_path, supernet, budgets=[16, 40]))
    split = {
        side: _run(_job(tmp_path, supernet, name=f"grid{side}", budgets=[16, 40], anchor_grid=side)) for side in (0, 4)
    }
    # Another split is another setting with other predictions; the paper's routing has four anchors per side.
    assert split[4].computed == 2 * QUESTIONS
    assert _answers(split[4], 40) == _answers(by_routing, 40)
    assert _answers(split[0], 40) != _answers(by_routing, 40)
    with pytest.raises(UserError, match="40 visual tokens cannot be split into 64 anchors and queries"):
        _run(_job(tmp_path, supernet, name="large", budgets=[40], anchor_grid=8))


def _answers(run: EvaluatedRun, budget: int) -> list[str]:
    return [answer.text for split in run.summary.splits for answer in split.answers[budget]]
