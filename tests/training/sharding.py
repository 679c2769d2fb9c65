"""Processes of a sharded training on CPUs, where accelerate by itself replicates the model and ignores the plugin."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import distributed

from parcelray.config.train import TrainingConfig
from parcelray.training.accelerator import fsdp_plugin, make_accelerator


def join_ranks(store: Path, rank: int, world_size: int, patch: pytest.MonkeyPatch) -> None:
    """Makes this process a rank of a process group, as on a Ray worker.

    Args:
        store: file through which the ranks find each other; it must not exist before.
        rank: rank of this process.
        world_size: number of ranks.
        patch: undoes the changes of the environment.
    """
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    for name, value in values.items():
        patch.setenv(name, str(value))
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)


def shard_on_cpus(patch: pytest.MonkeyPatch) -> None:
    """Shards the weights over the ranks if the strategy of a training is `fsdp`."""

    def build(training: TrainingConfig, layer_classes: Sequence[str], *, cpu_only: bool) -> Accelerator:
        accelerator = make_accelerator(training, layer_classes, cpu_only=cpu_only)
        if training.strategy == "fsdp":
            for state in (accelerator.state.__dict__, PartialState._shared_state):
                state["distributed_type"] = DistributedType.FSDP
            accelerator.state.fsdp_plugin = fsdp_plugin(training, layer_classes)
        return accelerator

    patch.setattr("parcelray.training.train_loop.make_accelerator", build)
