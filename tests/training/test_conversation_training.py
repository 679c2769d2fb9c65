"""A training on conversations: every turn is learned, bad rows are skipped up to a limit, and a resume is exact."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from parcelray.config.evaluate import EvaluateJob
from parcelray.config.train import TrainJob
from parcelray.datasets.source import BadRowsError
from parcelray.evaluation.run import run_evaluation
from parcelray.files import open_storage
from parcelray.tracking.metric_logger import NoMetrics
from parcelray.training.batches.ray_reading import ray_batches
from parcelray.training.batches.schedule import in_process_batches
from parcelray.training.run import run_training
from parcelray.training.start import build_start, step_reader
from parcelray.training.train_loop import fit_in_process
from tests.datasets.conversation_data import CASES, write_folder, write_shards
from tests.processes import LIMIT_S, wait_until

from .conftest import tiny_job


def _job(storage: Path, model: dict[str, Any], data: dict[str, Any], **changes: Any) -> TrainJob:
    held_out = {"validation": 0.2}
    return tiny_job(storage, model=model, data={"type": "conversations", "held_out": held_out} | data, **changes)


def _weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model" / "model.safetensors")


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("layout", ["folder", pytest.param("shards", marks=pytest.mark.nightly)])
def test_an_interrupted_training_resumes_to_the_same_bits(
    tmp_path: Path, tiny_start: dict[str, Any], layout: str
) -> None:
    path = str(write_folder(tmp_path, 16)) if layout == "folder" else write_shards(tmp_path / "shards", 16)
    data = {"path": path} | ({"images": str(tmp_path / "images")} if layout == "folder" else {})

    class Interrupted(NoMetrics):
        def log_metrics(self, metrics: Any, step: int) -> None:
            if step == 5:
                raise KeyboardInterrupt

    job = _job(tmp_path, tiny_start, data)
    model = Path(tiny_start["reference"])
    whole, metrics = fit_in_process(job, tmp_path / "whole", checkpoint=model, logger=NoMetrics())
    assert metrics["train/loss"] > 0
    assert "val/score@16" in metrics
    with pytest.raises(KeyboardInterrupt):
        fit_in_process(job, tmp_path / "cut", checkpoint=model, logger=Interrupted())
    resumed, _ = fit_in_process(job, tmp_path / "cut", checkpoint=model, logger=NoMetrics())
    assert _same(_weights(whole), _weights(resumed))


@pytest.mark.nightly
@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("layout", ["folder", "object storage"])
def test_a_killed_command_continues_and_its_model_is_evaluated(
    tmp_path: Path, tiny_start: dict[str, Any], s3: str, layout: str
) -> None:
    data: dict[str, Any]
    if layout == "folder":
        data = {"path": str(write_folder(tmp_path, 40)), "images": str(tmp_path / "images")}
    else:
        write_shards(tmp_path / "shards", 40)
        filesystem, folder = open_storage(s3)
        filesystem.put(f"{tmp_path}/shards/", f"{folder}/set/", recursive=True)
        data = {"path": f"{s3}/set/part-*.tar"}
    data |= {"type": "conversations", "held_out": {"validation": 0.2, "test": 0.2}}
    training = {"steps": 60, "images_per_step": 4, "log_every_steps": 5}
    job = _job(tmp_path / "runs", tiny_start, data, training=training, checkpointing={"every_steps": 5})
    file = tmp_path / "job.json"
    file.write_text(job.model_dump_json())
    command = [sys.executable, "-m", "parcelray.cli", "train", str(file)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_until(lambda: list(tmp_path.glob("runs/train/tiny/*/checkpoint_*/state.json")), "a checkpoint", first)
    first.kill()
    first.communicate()
    assert not (tmp_path / "runs" / "train" / "tiny" / "result.json").exists()
    subprocess.run(command, check=True, capture_output=True, timeout=LIMIT_S)
    evaluation = EvaluateJob.model_validate(
        {
            "kind": "evaluate",
            "name": "own",
            "model": {"reference": str(tmp_path / "runs" / "train" / "tiny" / "model")},
            "benchmarks": [{"name": "rows", "source": {"split": "test", "data": data}}],
            "budgets": ["blind", 16, 256],
            "compute": {"actors": 0},
            "storage": str(tmp_path / "runs"),
            "tracking": {"uri": None},
        }
    )
    (split,) = run_evaluation(evaluation, Console(file=io.StringIO())).summary.splits
    assert set(split.scores) == {0, 16, 256}


def test_samples_of_similar_length_are_in_one_step(tmp_path: Path, tiny_start: dict[str, Any]) -> None:
    path = write_folder(tmp_path, 16)
    rows = json.loads(path.read_text())
    for number, row in enumerate(rows):
        row["image"] = row["image"] if isinstance(row["image"], str) else row["image"][0]
        answer = "one two " * (1 if number % 2 else 10)
        row["conversations"] = [{"from": "human", "value": "<image>count"}, {"from": "gpt", "value": answer}]
    path.write_text(json.dumps(rows))
    data = {"path": str(path), "images": str(tmp_path / "images"), "held_out": {}}
    training = {"steps": 2, "images_per_step": 8, "group_by_tokens": True}
    job = _job(tmp_path, tiny_start, data, training=training)
    processor = build_start(job, Path(tiny_start["reference"]))[1]
    lengths = [step_reader(job, processor, 0, 1).read(step)["attention_mask"].sum(1) for step in (0, 1)]
    assert all(len(set(each.tolist())) == 1 for each in lengths)
    assert lengths[0][0] != lengths[1][0]


def test_every_row_of_the_cases_is_read_and_trained_on(tmp_path: Path, tiny_start: dict[str, Any]) -> None:
    data = {"path": str(CASES / "rows" / "conversations.json"), "images": str(CASES), "held_out": {}}
    job = _job(tmp_path, tiny_start, data, training={"steps": 8, "images_per_step": 4})
    assert run_training(job, Console(file=io.StringIO())).metrics["train/loss"] > 0
    assert not (tmp_path / "train" / "tiny" / "bad_rows.jsonl").exists()


BAD = {
    "missing-file": "the image images/not_there.jpg does not exist",
    "no-answer": "no answer",
    "more-placeholders-than-images": "2 <image> markers, but 1 images",
    "cut-image": "An image of",
}


def test_bad_rows_of_the_cases_are_written_aside_and_the_others_trained_on(
    tmp_path: Path, tiny_start: dict[str, Any]
) -> None:
    data = {"path": str(CASES / "rows" / "conversations_bad.jsonl"), "images": str(CASES), "held_out": {}}
    job = _job(tmp_path, tiny_start, data | {"max_bad_rows": 0.7}, training={"steps": 4, "images_per_step": 3})
    console = Console(file=io.StringIO(), record=True, width=200)
    metrics = run_training(job, console).metrics
    file = tmp_path / "train" / "tiny" / "bad_rows.jsonl"
    written = {row["id"]: row["reason"] for row in map(json.loads, file.read_text().splitlines())}
    assert written.keys() == BAD.keys()
    assert all(written[name].startswith(reason) for name, reason in BAD.items())
    assert "4 rows of the training data were skipped" in console.export_text()
    assert metrics["data/skipped_rows"] == 1, "the image that cannot be decoded; the others have a wrong structure"


@pytest.mark.parametrize(("limit", "found"), [(0.0, 3), (0.5, 4)])
def test_more_bad_rows_than_the_limit_end_the_training(
    tmp_path: Path, tiny_start: dict[str, Any], limit: float, found: int
) -> None:
    data = {"path": str(CASES / "rows" / "conversations_bad.jsonl"), "images": str(CASES), "held_out": {}}
    job = _job(tmp_path, tiny_start, data | {"max_bad_rows": limit}, training={"steps": 4, "images_per_step": 3})
    with pytest.raises(BadRowsError) as caught:
        run_training(job, Console(file=io.StringIO()))
    assert "no-answer: no answer" in str(caught.value) or found == 4
    lines = (tmp_path / "train" / "tiny" / "bad_rows.jsonl").read_text().splitlines()
    assert len(lines) == found
    assert not (tmp_path / "train" / "tiny" / "job.json").exists(), "the name is free for a job with another limit"


def test_the_length_of_a_row_can_be_limited(tmp_path: Path, tiny_start: dict[str, Any]) -> None:
    data = {"path": str(CASES / "rows" / "conversations.json"), "images": str(CASES), "held_out": {}}
    job = _job(tmp_path, tiny_start, data, training={"steps": 4, "images_per_step": 4, "max_text_tokens": 2})
    with pytest.raises(BadRowsError, match=r"too long: [0-9]+ text tokens, at most 2 are legal"):
        run_training(job, Console(file=io.StringIO()))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_ray_reads_the_same_batches_as_this_process(tmp_path: Path, tiny_start: dict[str, Any]) -> None:
    job = _job(tmp_path, tiny_start, {"path": write_shards(tmp_path / "shards", 12), "max_bad_rows": 0.1})
    reader = step_reader(job, build_start(job, Path(tiny_start["reference"]))[1], 0, 1)
    here = list(in_process_batches(reader, 0, 6))
    there = list(ray_batches(reader, 0, 6, concurrency=1))
    for one, two in zip(here, there, strict=True):
        assert one.keys() == two.keys()
        assert all((one[name] == two[name]).all() for name in one)
