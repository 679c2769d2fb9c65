"""Saves and restores the state of a training run: everything that the remaining steps depend on.

A checkpoint folder has three parts:

- `model/`: the model in Hugging Face layout, loadable by itself. Its weights are the float32 weights of the training,
  so that a resume loses nothing; `checkpointing.model_dtype` applies to the finished model only. A training with
  adapters has `trained.safetensors` instead: the adapters and all other weights that are trained, without the start;
- `optimizer.pt`: states of optimiser, fp16 loss scaler and random number generators (RNG). It is loaded with
  `weights_only=True`, and only from the run's own folder;
- `state.json`: step, budget sampler, configuration hash, newest metrics, and the size of every other file, by which an
  incomplete copy is recognised.

If the ranks share the weights (FSDP), each rank writes what it holds of weights and moments to `shards/`, in the format
of `torch.distributed.checkpoint`. `model/` then has no weights, and `optimizer.pt` no moments. Any number of ranks can
read the shards.

The data position is the step: `batches.schedule` derives the samples of every step from it.
"""

import logging
import pickle
import random
import shutil
import time
import warnings
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
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from parcelray.errors import SystemFailure, UserError
from parcelray.files import read_json, write_json
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.vlm import quiet_transformers
from parcelray.tracking.run_folder import CHECKPOINT
from parcelray.tracking.store import UnsentMetric

# It logs every call at the level DEBUG, which Ray would print.
logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.CRITICAL)

_POLL_S = 1.0
"""Pause between two attempts to copy a checkpoint, seconds."""
_STATE = "state.json"
TRAINED = "trained.safetensors"
"""File of the trained weights of a training with adapters."""
SHARDS = "shards"
"""Folder of the weights and moments that the ranks share."""
_WEIGHT, _MOMENT = "model.", "optimizer."
"""First parts of the names of tensors in the shards."""
_INDEX_TYPES = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "torch": {"Size", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
"""What the index of the shards consists of, by module."""


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
    frozen: str | None = None
    """Digest of the frozen weights, which a training with adapters does not store; None: all weights are stored."""


def save(
    folder: Path,
    *,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    processor: ElasticProcessor,
    state: TrainState,
) -> None:
    """Write a checkpoint folder; every rank must call it.

    Rank 0 writes everything. If the ranks share the weights, each one writes its shards to a folder of its own, and no
    rank ever holds the whole state; all folders together are the checkpoint.
    """
    is_main, sharded = accelerator.is_main_process, is_sharded(accelerator)
    vlm: ElasticVLM = accelerator.unwrap_model(model)
    inner = _inner(optimizer)
    rng = gather_object([_rng_state()])
    with _explained_write_failures(folder):
        if sharded:
            tensors = _weights(vlm, trained_only=state.frozen is not None) | _moments(vlm, inner)
            save_shards(tensors, storage_writer=FileSystemWriter(folder / SHARDS))
        if is_main:
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            moments = None if sharded else inner.state_dict()
            torch.save({"optimizer": moments, "scaler": scaler, "rng": rng}, folder / "optimizer.pt")
            _save_model(folder, vlm, processor, trained_only=state.frozen is not None, sharded=sharded)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    if sharded:
        sizes = {name: size for each in gather_object([sizes]) for name, size in each.items()}
    if is_main:
        write_json(folder / _STATE, asdict(replace(state, files=sizes)))


def _save_model(
    folder: Path, model: ElasticVLM, processor: ElasticProcessor, *, trained_only: bool, sharded: bool
) -> None:
    if trained_only:
        if not sharded:
            names = [name.removeprefix(_WEIGHT) for name in _weights(model, trained_only=True)]
            save_file({name: model.get_parameter(name).detach().contiguous() for name in names}, folder / TRAINED)
        return
    with quiet_transformers():
        (model.config if sharded else model).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")


def _weights(model: ElasticVLM, *, trained_only: bool) -> dict[str, Tensor]:
    """The weights and buffers of a model by their name in the shards, tied weights once."""
    parameters = dict(model.named_parameters())
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - parameters.keys()
    return {
        _WEIGHT + name: value
        for name, value in model.state_dict().items()
        if name not in tied and (not trained_only or (name in parameters and parameters[name].requires_grad))
    }


def _moments(model: ElasticVLM, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The states of an optimizer by their name in the shards; a parameter that no step has used yet has none."""
    return {
        f"{_MOMENT}{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


@contextmanager
def _explained_write_failures(folder: Path) -> Iterator[None]:
    """Explains a full or broken disk, which the libraries report with errors of their own."""
    try:
        yield
    except (SafetensorError, RuntimeError, CheckpointException) as error:
        reason = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise SystemFailure(
            f"The checkpoint cannot be written to {folder} ({reason}); free some space on its disk, then run the same"
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


def restore(
    folder: Path, *, accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Restore what the model of `start.build_resumed` lacks: moments, fp16 loss scale, this rank's RNG, and shards.

    Raises:
        UserError: the checkpoint is not sharded, but this training is.
    """
    stored = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    if (folder / SHARDS).is_dir():
        load_shards(folder, accelerator.unwrap_model(model), _inner(optimizer))
    elif is_sharded(accelerator):
        raise UserError(
            f"The checkpoint {folder} has no shards, so workers that share the weights cannot resume from it: it was"
            " written on CPUs or by an earlier version. Resume there, or give the run another name."
        )
    else:
        _inner(optimizer).load_state_dict(stored["optimizer"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(stored["scaler"])
    rank = accelerator.process_index
    if rank < len(stored["rng"]):
        _set_rng_state(stored["rng"][rank])


def load_shards(folder: Path, model: ElasticVLM, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Load the shards of a checkpoint in place, into a model that is whole or that this number of ranks shares.

    Args:
        folder: the checkpoint.
        model: the model; with adapters, its frozen weights are those of the start.
        optimizer: the optimizer of the model; None: its state is not needed.
    """
    reader = _ShardReader(folder / SHARDS)
    stored = reader.read_metadata().state_dict_metadata
    wanted = _weights(model, trained_only=read_state(folder).frozen is not None)
    states: dict[int, dict[str, Tensor]] = {}
    if optimizer is not None:
        order = {id(each): index for index, each in enumerate(_parameters(optimizer))}
        parameters = dict(model.named_parameters())
        for name, entry in stored.items():
            if name.startswith(_MOMENT) and isinstance(entry, TensorStorageMetadata):
                parameter_name, _, key = name.removeprefix(_MOMENT).rpartition(".")
                parameter = parameters[parameter_name]
                like = parameter if entry.size == parameter.shape else torch.empty(entry.size)
                wanted[name] = torch.empty_like(like, dtype=entry.properties.dtype, requires_grad=False)
                states.setdefault(order[id(parameter)], {})[key] = wanted[name]
    with warnings.catch_warnings():
        # Torch warns if one process loads the whole model, as an export does.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load(wanted, storage_reader=reader)
    if optimizer is not None:
        optimizer.load_state_dict(optimizer.state_dict() | {"state": states})


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


class _ShardReader(FileSystemReader):
    """Reads the index of the shards without running code that a changed file may name, unlike torch's own reader."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index."""
        with (Path(self.path) / ".metadata").open("rb") as file:
            found: Metadata = _IndexUnpickler(file).load()
        return found


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _INDEX_TYPES.get(module, ()):
            raise SystemFailure(
                f"The index of the shards of a checkpoint names {module}.{name}, so it was changed; remove this"
                " checkpoint to resume from an earlier one."
            )
        return super().find_class(module, name)


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
