"""Weights are trained in fp32, whatever the data type of the start checkpoint, and are saved as the job names."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from parcelray.config.train import TrainingConfig, TrainJob
from parcelray.models.manifest import verify_manifest
from parcelray.models.mini import build_processor
from parcelray.tracking.metric_logger import NoMetrics
from parcelray.training.accelerator import fsdp_plugin
from parcelray.training.checkpointing import SHARDS, load_shards
from parcelray.training.plan import training_plan
from parcelray.training.run import run_training
from parcelray.training.start import build_start, build_trained, prepare_model
from parcelray.training.step import build_optimizer
from parcelray.training.train_loop import fit_in_process

from ..models.conftest import CONFIG, CORPUS, write_stock_paligemma
from .conftest import tiny_job
from .test_in_process import Recorder

LEARNING_RATE = 1e-5
"""The learning rate of the paper; a bf16 weight above 0.004 cannot change by so little."""


@pytest.fixture(scope="module")
def bf16_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock PaliGemma-2 in bf16, sharded, with the key names of the hub."""
    return write_stock_paligemma(tmp_path_factory.mktemp("bf16"), build_processor(CONFIG, CORPUS), torch.bfloat16)


def _job(folder: Path, start: Path, **changes: Any) -> TrainJob:
    return tiny_job(
        folder,
        **{
            "model": {"type": "checkpoint", "reference": str(start)},
            "connector": {"type": "parcel", "num_heads": 4},
            "budget": {"type": "uniform", "budgets": [40]},
            "optimizer": {"type": "adamw", "learning_rate": LEARNING_RATE},
            "schedule": {"type": "constant", "warmup_steps": 0},
            "validation": {"samples": 1, "budgets": [40]},
        }
        | changes,
    )


def _check_that_every_entry_moved(job: TrainJob, start: Path, checkpoint: Path) -> None:
    """Check that one AdamW step changed every entry of the weights that had a gradient, and that all are float32."""
    before = dict(build_start(job, start)[0].named_parameters())
    model, _ = build_trained(job, checkpoint, start)
    optimizer = build_optimizer(model, job.optimizer)
    if (checkpoint / SHARDS).is_dir():
        load_shards(checkpoint, model, optimizer)
    else:
        optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", weights_only=True)["optimizer"])
    num_moved = 0
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        if parameter not in optimizer.state:
            continue  # it had no gradient
        state = optimizer.state[parameter]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
        # With a gradient above this, the first step of AdamW is as long as the learning rate.
        has_gradient = state["exp_avg"].abs() > 1e-7
        moved = parameter != before[name]
        assert bool(moved[has_gradient].all()), name
        num_moved += int(has_gradient.sum())
    assert num_moved > 0.2 * sum(parameter.numel() for parameter in before.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_entry_of_a_bf16_checkpoint_moves_in_one_step(tmp_path: Path, bf16_start: Path, precision: str) -> None:
    job = _job(tmp_path, bf16_start, training={"steps": 1, "precision": precision})
    checkpoint, _ = fit_in_process(job, tmp_path, checkpoint=bf16_start, logger=NoMetrics())
    weights = load_file(checkpoint / "model" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    _check_that_every_entry_moved(job, bf16_start, checkpoint)


@pytest.mark.usefixtures("one_rank")
# FSDP warns of in-place operations on outputs that are views; the losses have none.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_every_entry_of_a_bf16_checkpoint_moves_in_distributed_training(
    tmp_path: Path, bf16_start: Path, precision: str, strategy: str
) -> None:
    job = _job(tmp_path, bf16_start, training={"steps": 1, "precision": precision, "strategy": strategy})
    checkpoint, _ = fit_in_process(job, tmp_path, checkpoint=bf16_start, logger=NoMetrics())
    _check_that_every_entry_moved(job, bf16_start, checkpoint)
    assert (checkpoint / SHARDS).is_dir() == (strategy == "fsdp")


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_sharded_training_adds_up_gradients_in_fp32(precision: str, dtype: torch.dtype) -> None:
    training = TrainingConfig.model_validate({"steps": 1, "strategy": "fsdp", "precision": precision})
    policy = fsdp_plugin(training, ["Gemma2DecoderLayer"]).mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (dtype, torch.float32)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        ("ddp", {}),
        ("fsdp", {}),
        pytest.param(
            "fsdp",
            {"lora": {"decoder": {"rank": 2, "dropout": 0.1}}, "activation_checkpointing": True},
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_a_training_from_a_bf16_checkpoint_resumes_to_identical_weights(
    tmp_path: Path, bf16_start: Path, strategy: str, more: dict[str, Any]
) -> None:
    final = []
    for name, fail_at in (("whole", None), ("part", 5)):
        # The data type of the finished model does not concern the checkpoints that a training resumes from.
        job = _job(
            tmp_path / name,
            bf16_start,
            training={"strategy": strategy} | more,
            checkpointing={"every_steps": 3, "model_dtype": "bfloat16"},
        )
        if fail_at is not None:
            with pytest.raises(KeyboardInterrupt):
                fit_in_process(job, tmp_path / name, checkpoint=bf16_start, logger=Recorder(fail_at))
        checkpoint, _ = fit_in_process(job, tmp_path / name, checkpoint=bf16_start, logger=NoMetrics())
        final.append(build_trained(job, checkpoint, bf16_start)[0].state_dict())
    assert all(torch.equal(value, final[1][key]) for key, value in final[0].items())


@pytest.mark.parametrize("model_dtype", [None, "float32", "bfloat16", "float16"])
def test_the_finished_model_has_the_data_type_of_the_job(
    tmp_path: Path, bf16_start: Path, model_dtype: str | None
) -> None:
    job = _job(tmp_path, bf16_start, training={"steps": 1}, checkpointing={"model_dtype": model_dtype})
    model = run_training(job, Console(file=io.StringIO())).model_folder
    expected = getattr(torch, model_dtype or "float32")
    assert {value.dtype for value in load_file(model / "model.safetensors").values()} == {expected}
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    assert {config["dtype"], config["text_config"]["dtype"], config["vision_config"]["dtype"]} == {
        model_dtype or "float32"
    }
    assert verify_manifest(model).config["checkpointing"]["model_dtype"] == model_dtype
    checkpoint = next(model.parent.glob("in-process/checkpoint_*"))
    trained = load_file(checkpoint / "model" / "model.safetensors")
    stored = load_file(model / "model.safetensors")
    assert all(torch.equal(stored[key], value.to(expected)) for key, value in trained.items())


@pytest.mark.parametrize("freeze", [[], ["tower"]])
@pytest.mark.parametrize(
    "optimizer", [{"type": "adamw"}, {"type": "sgd", "momentum": 0.9}, {"type": "sgd", "momentum": 0.0}]
)
def test_the_dry_run_counts_the_bytes_of_weights_gradients_and_moments(
    tmp_path: Path,
    bf16_start: Path,
    optimizer: dict[str, Any],
    freeze: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("parcelray.training.plan.matmul_flops_per_second", lambda: 1e12)
    job = _job(tmp_path, bf16_start, optimizer=optimizer, training={"freeze": freeze})
    model, _ = build_start(job, bf16_start)
    prepare_model(model, job)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    build = build_optimizer(model, job.optimizer)
    build.step()
    moments = [
        value
        for state in build.state.values()
        for name, value in state.items()
        if name != "step" and isinstance(value, torch.Tensor)
    ]
    held = [*model.parameters(), *(parameter.grad for parameter in trained), *moments]
    assert training_plan(job).state_bytes == sum(each.nbytes for each in held if each is not None)
