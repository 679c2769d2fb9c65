"""Saves and restores the state of a training run: everything that the remaining steps depend on.

A checkpoint folder has three parts:

- `model/`: the model in Hugging Face layout, loadable by itself. Its weights are the float32 weights of the training,
  so that a resume loses nothing; `checkpointing.model_dtype` applies to the finished model only. A training with
  adapters has `trained.safetensors` instead: the adapters and all other weights that are trained, without the start;
- `optimizer.pt`: states of optimiser, fp16 loss scaler and random number generators (RNG). It is loaded with
  `weights_only=True`, and only from the run's own folder;
- `state.json`: step, budget sampler, configuration hash, newest metrics, and the size of every other file, by which an
  incomplete copy is recognised.

The data position is the step: `batches.schedule` derives the samples of every step from it.
"""

import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from parcelray.errors import SystemFailure, UserError
from parcelray.files import read_json, write_json
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.vlm import quiet_transformers
from parcelray.tracking.run_folder import CHECKPOINT
from parcelray.tracking.store import UnsentMetric

_POLL_S = 1.0
"""Pause between two attempts to copy a checkpoint, seconds."""
_STATE = "state.json"
TRAINED = "trained.safetensors"
"""File of the trained weights of a training with adapters."""
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True, slots=True)
class TrainState:
    """The content of `state.json`."""

    step: int
    """Number of finished optimiser steps."""
    config_hash: str
    budget_sampler: dict[str, Any]
    world_size: int
    metrics: dict[str, float]
    """The newest value of each metric; the result of a run that is resumed after its last step."""
    unsent_metrics: list[UnsentMetric] = field(default_factory=list)
    """Metrics that the tracking store did not have when the checkpoint was written."""
    files: dict[str, int] = field(default_factory=dict)
    """Size in bytes of each other file of the checkpoint, by its path; `save` fills it in."""
    skipped_rows: dict[str, str] = field(default_factory=dict)
    """Reasons of the rows that others replaced, by row id; see `batches.skipped`."""


def save(
    folder: Path,
    *,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    processor: ElasticProcessor,
    state: TrainState,
    frozen: str | None = None,
) -> None:
    """Write a checkpoint folder. Every rank must call it, because sharded states are gathered; rank 0 writes."""
    save_weights(folder, accelerator=accelerator, model=model, processor=processor, frozen=frozen)
    moments = (
        get_optimizer_state_dict(model, _inner(optimizer), options=_FULL)
        if is_sharded(accelerator)
        else _inner(optimizer).state_dict()
    )
    rng = gather_object([_rng_state()])
    if not accelerator.is_main_process:
        return
    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
    with _explained_write_failures(folder):
        torch.save({"optimizer": moments, "scaler": scaler, "rng": rng}, folder / "optimizer.pt")
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    write_json(folder / _STATE, asdict(replace(state, files=files)))


def save_weights(
    folder: Path,
    *,
    accelerator: Accelerator,
    model: torch.nn.Module,
    processor: ElasticProcessor,
    frozen: str | None = None,
) -> None:
    """Write the float32 weights. Every rank must call it, because shards are gathered; rank 0 writes.

    Args:
        folder: folder of the checkpoint.
        accelerator: the accelerator.
        model: the model, possibly wrapped for distributed training.
        processor: the processor.
        frozen: digest of the frozen weights, to write only the trained ones; None: write the whole model to `model/`.
    """
    options = replace(_FULL, ignore_frozen_params=frozen is not None)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    if not accelerator.is_main_process:
        return
    inner: ElasticVLM = accelerator.unwrap_model(model)
    with _explained_write_failures(folder):
        if frozen is not None:
            # Tied weights are in the state twice, but in the parameters once.
            names = [name for name, parameter in inner.named_parameters() if parameter.requires_grad]
            trained = {name: weights[name].contiguous() for name in names}
            save_file(trained, folder / TRAINED, metadata={"frozen": frozen})
            return
        with quiet_transformers():
            inner.save_pretrained(folder / "model", state_dict=weights)
        processor.save_pretrained(folder / "model")


@contextmanager
def _explained_write_failures(folder: Path) -> Iterator[None]:
    """Explains a full or broken disk, which the libraries report with errors of their own."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise SystemFailure(
            f"The checkpoint cannot be written to {folder} ({error}); free some space on its disk, then run the same"
            " command again to resume."
        ) from error


def read_state(folder: Path) -> TrainState:
    """Read `state.json` of a checkpoint folder.

    Raises:
        UserError: the folder is not a training checkpoint.
    """
    state = read_json(folder / _STATE, "remove this checkpoint to resume from an earlier one")
    if state is None:
        raise UserError(
            f"{folder} is not a training checkpoint (it has no {_STATE}); use a folder checkpoint_* of a run."
        )
    return TrainState(**state)


def newest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in a folder of checkpoints; None without one."""
    # A power loss can leave empty files, although the folder was renamed when it was complete.
    return max((each for each in folder.glob(f"{CHECKPOINT}*") if is_complete(each)), default=None)


def is_complete(checkpoint: Path) -> bool:
    """Whether every file of a checkpoint is there in its full size."""
    try:
        state = read_json(checkpoint / _STATE, "remove this checkpoint")
    except SystemFailure:
        return False
    if state is None:
        return False
    present = {
        path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()
    }
    # Checkpoints of earlier versions have no sizes.
    return all(present.values()) and all(present.get(name) == size for name, size in state.get("files", {}).items())


def fetch(download: Callable[[Path], object], target: Path, *, wait_s: float) -> bool:
    """Copies a checkpoint, again and again while files are missing: a listing may not show a new object at once.

    Args:
        download: copies the checkpoint into a folder.
        target: the folder.
        wait_s: longest time to wait for missing files, seconds.

    Returns:
        Whether the copy is complete.
    """
    until = time.monotonic() + wait_s
    while True:
        download(target)
        if is_complete(target):
            return True
        if time.monotonic() >= until:
            return False
        time.sleep(_POLL_S)


def keep(source: Path, target: Path, count: int) -> None:
    """Copy a checkpoint to its final name in one step, and delete all but the newest `count` checkpoints."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for old in sorted(target.parent.glob(f"{CHECKPOINT}*"))[:-count]:
        shutil.rmtree(old)


def restore_optimizer(
    folder: Path, *, accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Restore optimiser moments, fp16 loss scale and this rank's RNG; weights are restored when the model is loaded."""
    stored = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    if is_sharded(accelerator):
        # Not strict, because a parameter that no step has used yet (the query path, if all budgets had no queries) has
        # no moments.
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
        set_optimizer_state_dict(model, _inner(optimizer), optim_state_dict=stored["optimizer"], options=options)
    else:
        _inner(optimizer).load_state_dict(stored["optimizer"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(stored["scaler"])
    rank = accelerator.process_index
    if rank < len(stored["rng"]):
        _set_rng_state(stored["rng"][rank])


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether weights and moments are sharded over the ranks (FSDP)."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def _inner(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def _rng_state() -> dict[str, Any]:
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002 - the global generator's state is what is saved
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "numpy_key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "numpy_pos": int(numpy_state["state"]["pos"]),
        "python": [version, list(words), gauss],
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    key = state["numpy_key"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, state["numpy_pos"], 0, 0.0))  # noqa: NPY002 - see above
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
