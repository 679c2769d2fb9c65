"""The accelerator of a training: precision of the passes, sharding of the weights, and DDP."""

from collections.abc import Sequence
from typing import Literal

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedDataParallelKwargs
from torch.distributed.fsdp import MixedPrecisionPolicy

from parcelray.config.train import TrainingConfig
from parcelray.models.training_attention import has_bf16_products

_PASS_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Data type of the weights in forward and backward passes of sharded training, by `training.precision`."""


def pass_precision(training: TrainingConfig, *, cpu_only: bool) -> Literal["no", "fp16", "bf16"]:
    """Precision of the passes in accelerate's words.

    On a CPU without AMX, bf16 falls back to fp32: its products are then slower than those of fp32, 2 times with
    AVX512_BF16 and 5 times without (measured on one Xeon with oneDNN 3.12).
    """
    if training.precision == "fp32":
        return "no"
    if training.precision == "bf16" and cpu_only and training.kernels is None and not has_bf16_products():
        return "no"
    return training.precision


def make_accelerator(training: TrainingConfig, layer_classes: Sequence[str], *, cpu_only: bool) -> Accelerator:
    """Create the accelerator of a training.

    Args:
        training: the section `training` of the job.
        layer_classes: class names of the model's layers, which are sharded one by one.
        cpu_only: whether to leave GPUs unused.
    """
    return Accelerator(
        cpu=cpu_only,
        mixed_precision=pass_precision(training, cpu_only=cpu_only),
        fsdp_plugin=fsdp_plugin(training, layer_classes) if training.strategy == "fsdp" else None,
        # A budget without queries leaves the query path unused in that step.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def fsdp_plugin(training: TrainingConfig, layer_classes: Sequence[str]) -> FullyShardedDataParallelPlugin:
    """How the weights are sharded, and the data types of sharded training: fp32 weights and sums of gradients."""
    dtype = _PASS_DTYPES[training.precision]
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=list(layer_classes),
        cpu_ram_efficient_loading=False,
        # By itself accelerate would also add up the ranks' gradients in the precision of the passes, unlike DDP.
        mixed_precision_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=dtype),
    )
