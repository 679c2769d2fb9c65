"""The state that a checkpoint stores besides the weights."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from parcelray.errors import UserError
from parcelray.training.checkpointing import TrainState, read_state, restore, save
from parcelray.training.start import build_start
from parcelray.training.step import build_optimizer

from .conftest import tiny_job

STATE = TrainState(
    step=3,
    config_hash="0123abcd",
    budget_sampler={"seed": 3, "config": {"type": "uniform"}},
    world_size=1,
    metrics={"train/loss": 0.5},
)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """An accelerator on the CPU with a loss scaler, as with fp16."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    yield accelerator
    AcceleratorState._reset_state(reset_partial_state=True)


def _draws() -> tuple[float, float, float]:
    # A checkpoint stores the state of the global generators.
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def test_a_checkpoint_restores_moments_loss_scale_and_random_numbers(tmp_path: Path, accelerator: Accelerator) -> None:
    job = tiny_job(tmp_path)
    model, processor = build_start(job, None)
    optimizer = build_optimizer(model, job.optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    save(tmp_path, accelerator=accelerator, model=model, optimizer=optimizer, processor=processor, state=STATE)
    expected = _draws()

    fresh = build_optimizer(model, job.optimizer)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    restore(tmp_path, accelerator=accelerator, model=model, optimizer=fresh)
    assert _draws() == expected
    assert accelerator.scaler.state_dict()["scale"] == 1024
    assert replace(read_state(tmp_path), files={}) == STATE
    before, after = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[index][name], after[index][name])
        for index in before
        for name in ("step", "exp_avg", "exp_avg_sq")
    )


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a training checkpoint \(it has no state.json\)"):
        read_state(tmp_path)
