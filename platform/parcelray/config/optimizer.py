"""Configuration of optimizers and learning-rate schedules."""

from typing import Annotated, Literal

from pydantic import Field

from parcelray.config.base import StrictModel


class _Optimizer(StrictModel):
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    """Peak learning rate of the shared (pretrained) weights."""
    connector_multiplier: float = Field(default=1.0, gt=0)
    """Factor by which the learning rate of new connector parameters is multiplied."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of matrices; vectors (norms, biases) are not decayed."""


class _Adam(_Optimizer):
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay rate of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay rate of the second moment."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Constant added to the denominator for numerical stability."""


class AdamWConfig(_Adam):
    """The AdamW optimizer."""

    type: Literal["adamw"] = "adamw"
    fused: bool = False
    """Whether all updates of a step are one kernel, which is faster; the last bits differ."""


class AdamW8bitConfig(_Adam):
    """AdamW with moments in 8 bits (arXiv 2110.02861), from the package bitsandbytes; needs GPUs."""

    type: Literal["adamw_8bit"] = "adamw_8bit"


class SgdConfig(_Optimizer):
    """Stochastic gradient descent."""

    type: Literal["sgd"] = "sgd"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum coefficient."""


OptimizerConfig = Annotated[AdamWConfig | AdamW8bitConfig | SgdConfig, Field(discriminator="type")]


class ScheduleConfig(StrictModel):
    """Learning-rate schedule: linear warm-up, then a decay to `final_fraction` of the peak."""

    type: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    warmup_steps: int = Field(default=20, ge=0)
    """Number of steps of linear warm-up."""
    final_fraction: float = Field(default=0.05, ge=0, le=1)
    """Learning rate at the last step as a fraction of the peak."""
