"""The training loop without Ray: it learns, is deterministic, and resumes to bit-identical weights."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from parcelray.config.model import CheckpointModelConfig
from parcelray.config.train import TrainJob
from parcelray.errors import NotFiniteError, SystemFailure, UnsupportedBudgetError, UserError
from parcelray.evaluation.predict import predictor
from parcelray.models import decoding
from parcelray.models.checkpoint import resolve_checkpoint
from parcelray.models.vlm import load_vlm
from parcelray.tracking.metric_logger import NoMetrics
from parcelray.tracking.opening import model_folder
from parcelray.tracking.registry import resolve_model
from parcelray.tracking.store import UnsentMetric
from parcelray.training import train_loop
from parcelray.training.plan import training_plan
from parcelray.training.run import run_training
from parcelray.training.train_loop import fit_in_process

from ..stores import new_store
from .conftest import tiny_job


class Recorder(NoMetrics):
    """Keeps the logged metrics; raises KeyboardInterrupt at step `fail_at`."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.rows: list[tuple[int, str, float]] = []
        self.unsent: list[UnsentMetric] = []
        self.restored: list[UnsentMetric] = []
        self._fail_at = fail_at

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the metrics, or fail."""
        if step == self._fail_at:
            raise KeyboardInterrupt
        self.rows += [(step, name, value) for name, value in metrics.items()]

    def flush(self) -> list[UnsentMetric]:
        """Return the metrics of a store that does not answer."""
        return self.unsent

    def restore(self, unsent: Sequence[UnsentMetric]) -> None:
        """Keep the metrics that an earlier attempt could not send."""
        self.restored = [(key, value, time, step) for key, value, time, step in unsent]

    def curve(self, name: str) -> dict[int, float]:
        """Values of a metric by step."""
        return {step: value for step, metric, value in self.rows if metric == name}


SHORT: dict[str, Any] = {
    "training": {"steps": 4, "images_per_step": 4},
    "validation": {"samples": 1, "budgets": [16]},
    "checkpointing": {"every_steps": 2},
}
"""Changes of the tiny job for a training that is interrupted at step 3 and resumes from step 2."""


def _weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model" / "model.safetensors")


def _same(first: Path, second: Path) -> bool:
    one, two = _weights(first), _weights(second)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    recorder = Recorder()
    checkpoint, _ = fit_in_process(tiny_job(folder), folder, checkpoint=None, logger=recorder)
    return checkpoint, recorder


def test_every_metric_is_logged_once_per_step(uninterrupted: tuple[Path, Recorder]) -> None:
    recorder = uninterrupted[1]
    names = {name for _, name, _ in recorder.rows}
    assert names >= {
        "train/loss",
        "train/learning_rate",
        "train/grad_norm",
        "train/tokens_per_second",
        "train/budget",
        "val/score@16",
        "val/score@64",
    }
    assert names >= {
        f"tokens/{part}_{measure}"
        for part in ("anchors", "queries")
        for measure in ("effective_rank", "mean_cosine", "image_share")
    }
    assert "train/distillation" not in names
    assert list(recorder.curve("train/loss")) == [1, 2, 3, 4, 5, 6]
    assert len({(step, name) for step, name, _ in recorder.rows}) == len(recorder.rows)


def test_an_interrupted_run_resumes_to_identical_weights(tmp_path: Path, uninterrupted: tuple[Path, Recorder]) -> None:
    job = tiny_job(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fit_in_process(job, tmp_path, checkpoint=None, logger=Recorder(fail_at=5))
    resumed, notices = Recorder(), list[str]()
    checkpoint, _ = fit_in_process(job, tmp_path, checkpoint=None, logger=resumed, on_notice=notices.append)
    assert notices == ["The training resumes after step 3 of 6."]
    assert list(resumed.curve("train/loss")) == [4, 5, 6]
    assert resumed.curve("train/loss") == {
        step: value for step, value in uninterrupted[1].curve("train/loss").items() if step > 3
    }
    assert _same(checkpoint, uninterrupted[0])
    optimizers = [
        torch.load(path / "optimizer.pt", weights_only=True)["optimizer"]["state"]
        for path in (checkpoint, uninterrupted[0])
    ]
    assert optimizers[0].keys() == optimizers[1].keys()
    assert all(torch.equal(optimizers[0][index]["exp_avg"], optimizers[1][index]["exp_avg"]) for index in optimizers[0])


def test_a_finished_run_computes_nothing(uninterrupted: tuple[Path, Recorder]) -> None:
    again = Recorder()
    folder = uninterrupted[0].parent
    checkpoint, metrics = fit_in_process(tiny_job(folder), folder, checkpoint=None, logger=again)
    assert again.rows == []
    assert checkpoint == uninterrupted[0]
    # The metrics come from the checkpoint, although no result was stored.
    assert metrics["train/loss"] == uninterrupted[1].curve("train/loss")[6]
    assert "val/score@16" in metrics


def test_micro_batches_give_the_same_step(tmp_path: Path, uninterrupted: tuple[Path, Recorder]) -> None:
    job = tiny_job(tmp_path, training={"gradient_accumulation_steps": 3})
    recorder = Recorder()
    fit_in_process(job, tmp_path, checkpoint=None, logger=recorder)
    expected = uninterrupted[1].curve("train/loss")
    assert recorder.curve("train/loss") == pytest.approx(expected, rel=1e-4)


def test_micro_batches_give_the_same_weights(tmp_path: Path) -> None:
    # With SGD, because Adam divides by gradients that are nearly zero, which amplifies rounding errors.
    weights = []
    for steps in (1, 2):
        job = tiny_job(tmp_path, optimizer={"type": "sgd"}, training={"gradient_accumulation_steps": steps})
        weights.append(_weights(fit_in_process(job, tmp_path / str(steps), checkpoint=None, logger=NoMetrics())[0]))
    for name, expected in weights[0].items():
        assert torch.allclose(weights[1][name], expected, atol=1e-6, rtol=0), name


def test_a_repeated_step_logs_the_same_values(tmp_path: Path) -> None:
    job, before, after = tiny_job(tmp_path, checkpointing={"every_steps": 4}), Recorder(fail_at=6), Recorder()
    before.unsent = [("train/loss", 0.5, 1_700_000_000_000, 4)]
    with pytest.raises(KeyboardInterrupt):
        fit_in_process(job, tmp_path, checkpoint=None, logger=before)
    fit_in_process(job, tmp_path, checkpoint=None, logger=after)
    assert after.restored == before.unsent, "metrics of an outage are part of the checkpoint"
    assert list(before.curve("train/loss")) == [1, 2, 3, 4, 5]
    assert list(after.curve("train/loss")) == [5, 6]
    for name in (
        "train/loss",
        "train/grad_norm",
        "train/learning_rate",
        "train/budget",
        "tokens/anchors_effective_rank",
    ):
        assert after.curve(name)[5] == before.curve(name)[5], name


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"steps": 2, "precision": "bf16"}},
        {"training": {"steps": 2}, "budget": {"type": "sandwich", "budgets": [16, 40, 64]}},
        {"training": {"steps": 2}, "budget": {"type": "stratified", "budgets": [16, 40, 64, 80]}},
        {"training": {"steps": 2}, "optimizer": {"type": "sgd"}},
        {"training": {"steps": 2}, "connector": {"type": "m3"}, "budget": {"type": "uniform", "budgets": [16, 64]}},
    ],
)
def test_variants_can_be_trained(tmp_path: Path, changes: dict[str, object]) -> None:
    recorder = Recorder()
    fit_in_process(tiny_job(tmp_path, **changes), tmp_path, checkpoint=None, logger=recorder)
    assert len(recorder.curve("train/loss")) == 2


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, optimizer={"type": "sgd", "learning_rate": 1.0, "weight_decay": 1e30})
    with pytest.raises(SystemFailure, match=r"The loss at step \d is (nan|-?inf)"):
        fit_in_process(job, tmp_path, checkpoint=None, logger=NoMetrics())


def test_no_checkpoint_has_weights_that_are_not_finite(tmp_path: Path) -> None:
    job = tiny_job(
        tmp_path,
        optimizer={"type": "sgd", "learning_rate": 1.0, "weight_decay": 1e30},
        training={"log_every_steps": 100},
        checkpointing={"every_steps": 1, "keep": 6},
    )
    with pytest.raises(SystemFailure, match=r"The loss at step \d is (nan|-?inf)"):
        fit_in_process(job, tmp_path, checkpoint=None, logger=NoMetrics())
    for checkpoint in tmp_path.glob("checkpoint_*"):
        assert all(bool(values.isfinite().all()) for values in _weights(checkpoint).values())


def test_validation_of_a_model_without_finite_logits_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(*arguments: Any, on_scores: Any, **settings: Any) -> Any:
        return decoding.generate(*arguments, on_scores=lambda scores: on_scores(scores * torch.nan), **settings)

    monkeypatch.setattr(predictor, "generate", generate)
    job = tiny_job(tmp_path, validation={"samples": 1, "budgets": [16], "every_steps": 1})
    with pytest.raises(NotFiniteError, match=r"Sample '.*' of mini: The model's logits are not finite"):
        fit_in_process(job, tmp_path, checkpoint=None, logger=NoMetrics())


def test_an_unsupported_budget_is_refused_before_the_first_step(tmp_path: Path) -> None:
    job: TrainJob = tiny_job(tmp_path, budget={"type": "uniform", "budgets": [8]})
    with pytest.raises(UnsupportedBudgetError, match="parcel does not support 8"):
        fit_in_process(job, tmp_path, checkpoint=None, logger=NoMetrics())


def test_distillation_resumes_to_identical_weights(tmp_path: Path) -> None:
    changes = {"distillation": {"weight": 0.5}, "budget": {"type": "uniform", "budgets": [16, 40]}} | SHORT
    changes["training"] = {**SHORT["training"], "gradient_accumulation_steps": 2}
    whole, part = (tiny_job(tmp_path / name, **changes) for name in ("whole", "part"))
    recorder = Recorder()
    uninterrupted, _ = fit_in_process(whole, tmp_path / "whole", checkpoint=None, logger=recorder)
    divergence = recorder.curve("train/distillation")
    # A step that draws the largest budget has no student.
    assert divergence.keys() == {step for step, budget in recorder.curve("train/budget").items() if budget < 40}
    assert min(divergence.values()) > 0
    with pytest.raises(KeyboardInterrupt):
        fit_in_process(part, tmp_path / "part", checkpoint=None, logger=Recorder(fail_at=3))
    resumed, _ = fit_in_process(part, tmp_path / "part", checkpoint=None, logger=NoMetrics())
    assert _same(uninterrupted, resumed)


def test_queries_that_do_not_depend_on_the_image_are_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shares = {True: 0.9, False: 0.16}
    monkeypatch.setattr(
        train_loop, "image_dependent_share", lambda tokens: torch.tensor(shares[tokens.shape[1] == 256])
    )
    job = tiny_job(tmp_path, training={"steps": 2}, budget={"type": "uniform", "budgets": [40]})
    recorder = Recorder()
    fit_in_process(job, tmp_path, checkpoint=None, logger=recorder)
    assert list(recorder.curve("tokens/queries_image_share").values()) == pytest.approx([0.16] * 2)
    assert [record.getMessage()[:64] for record in caplog.records if record.name == train_loop.__name__] == [
        "Only 16 % of the variance of the query tokens depends on the ima"
    ]
    caplog.clear()
    shares[True] = 0.3
    fit_in_process(job, tmp_path / "similar images", checkpoint=None, logger=NoMetrics())
    anchors = tiny_job(tmp_path, training={"steps": 1}, budget={"type": "uniform", "budgets": [16]})
    fit_in_process(anchors, tmp_path / "anchors", checkpoint=None, logger=NoMetrics())
    assert not [record for record in caplog.records if record.name == train_loop.__name__]


def test_a_supernet_resumes_to_identical_weights(tmp_path: Path) -> None:
    connector = {"type": "parcel", "num_heads": 2, "anchor_grids": [0, 2, 4, 8]}
    budget = {"type": "sandwich", "budgets": [4, 16, 64, 256], "anchor_grids": [0, 2, 4, 8]}
    changes = {"connector": connector, "budget": budget} | SHORT
    whole, part = (tiny_job(tmp_path / name, **changes) for name in ("whole", "part"))
    uninterrupted, metrics = fit_in_process(whole, tmp_path / "whole", checkpoint=None, logger=NoMetrics())
    assert metrics["train/loss"] > 0
    with pytest.raises(KeyboardInterrupt):
        fit_in_process(part, tmp_path / "part", checkpoint=None, logger=Recorder(fail_at=3))
    resumed, _ = fit_in_process(part, tmp_path / "part", checkpoint=None, logger=NoMetrics())
    assert _same(uninterrupted, resumed)
    # The query bank has enough queries for a split without anchors.
    model = load_vlm(resumed / "model")
    assert model.connector.num_anchors(64) == 64
    with torch.no_grad():
        tokens = model.model.compress(torch.randn(1, 256, 24), num_visual_tokens=255, anchor_grid=0)
    assert tokens.shape[1] == 255


@pytest.mark.parametrize(("connector", "are_patches"), [("m3", True), ("parcel", False)])
def test_patch_labels_apply_only_where_tokens_are_the_patches_in_order(
    tmp_path: Path, connector: str, are_patches: bool
) -> None:
    """PARCEL has as many tokens as patches at its largest budget, but they are anchors and queries."""
    checkpoints = []
    for weight in (0.0, 1.0):
        job = tiny_job(
            tmp_path / str(weight),
            connector={"type": connector} | ({"num_heads": 2} if connector == "parcel" else {}),
            budget={"type": "uniform", "budgets": [256]},
            data={"type": "mini", "dense_fraction": 1.0},
            training={"steps": 1, "patch_supervision": weight},
            validation={"samples": 1, "budgets": [16]},
        )
        checkpoints.append(fit_in_process(job, Path(job.storage), checkpoint=None, logger=NoMetrics())[0])
    assert _same(*checkpoints) != are_patches


@pytest.mark.parametrize("tower", ["clip", "convnext"])
def test_a_llava_resumes_to_identical_weights(tower: str, tmp_path: Path) -> None:
    sizes = {"vision_width": 24, "vision_layers": 2, "vision_heads": 2, "vision_mlp_width": 32}
    sizes |= {
        "text_width": 24,
        "text_layers": 1,
        "text_heads": 2,
        "text_kv_heads": 1,
        "text_head_dim": 12,
        "text_mlp_width": 32,
    }
    changes = {
        "model": {"type": "mini_llava", "tower": tower, **sizes},
        "budget": {"type": "uniform", "budgets": [16, 256]},
    } | SHORT
    changes["training"] = {**SHORT["training"], "patch_supervision": 1.0}
    whole, part = (tiny_job(tmp_path / name, **changes) for name in ("whole", "part"))
    uninterrupted, metrics = fit_in_process(whole, tmp_path / "whole", checkpoint=None, logger=NoMetrics())
    assert {"train/loss", "val/score@16"} <= set(metrics)
    with pytest.raises(KeyboardInterrupt):
        fit_in_process(part, tmp_path / "part", checkpoint=None, logger=Recorder(fail_at=3))
    resumed, _ = fit_in_process(part, tmp_path / "part", checkpoint=None, logger=NoMetrics())
    assert _same(uninterrupted, resumed)


def test_a_mistake_in_a_job_does_not_reserve_its_name(tmp_path: Path) -> None:
    mistakes: tuple[tuple[str, dict[str, Any]], ...] = (
        ("16", {"connector": {"type": "identity"}}),
        ("7777", {"budget": {"type": "uniform", "budgets": [7777]}}),
        ("nothere", {"data": {"type": "parquet", "path": "nothere"}}),
    )
    console = Console(file=io.StringIO())
    for message, mistake in mistakes:
        with pytest.raises(UserError, match=message):
            run_training(tiny_job(tmp_path, **mistake), console, report=False)
    job = tiny_job(tmp_path, training={"steps": 1}, checkpointing={"every_steps": 1})
    assert not run_training(job, console, report=False).was_done


def test_the_plan_counts_every_pass_of_the_schedule(tmp_path: Path) -> None:
    changes = {"budget": {"type": "stratified", "budgets": [16, 64]}, "distillation": {"weight": 0.5}}
    plan = training_plan(tiny_job(tmp_path, **changes))
    # Half of the steps run 64, and half of them 64 and 16.
    assert (plan.schedule, plan.passes_per_step, plan.tokens_per_step) == ("stratified", 1.5, 72)
    console = Console(file=io.StringIO(), width=120)
    console.print(plan.to_rich())
    assert isinstance(console.file, io.StringIO)
    assert "passes: 1.5, visual tokens per image: 72" in console.file.getvalue()


@pytest.mark.nightly
def test_a_training_registers_its_model_once(tmp_path: Path) -> None:
    job = tiny_job(
        tmp_path,
        training={"steps": 1},
        checkpointing={"every_steps": 1},
        tracking={"uri": new_store(tmp_path / "store")},
        register="tiny",
    )
    console = Console(file=io.StringIO())
    run = run_training(job, console, report=False)
    assert run.registered == "models:/tiny/1"
    registered = resolve_model(CheckpointModelConfig(reference="models:/tiny/1"), job.tracking.uri)
    assert registered.pin.digest == resolve_checkpoint(run.model_folder).pin.digest
    # The registry's files are on this disk, so that no process needs the registry to open them.
    assert model_folder(registered.pin.model_copy(update={"tracking_uri": None})) == registered.path

    again = run_training(job, console, report=False)
    assert (again.was_done, again.registered) == (True, "models:/tiny/1")
    other = run_training(job.model_copy(update={"register": "other"}), console, report=False)
    assert (other.was_done, other.registered) == (True, "models:/other/1")


def test_a_model_cannot_be_registered_without_tracking(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"register is tiny, but tracking\.uri is null"):
        tiny_job(tmp_path, register="tiny", tracking={"uri": None})
