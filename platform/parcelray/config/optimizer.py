"""Optimisers and learning-rate schedules, as data."""

from typing import Annotated, Literal

from pydantic import Field

from parcelray.config.base import StrictModel


class _Optimizer(StrictModel):
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    """Peak learning rate of the shared (pretrained) weights."""
    connector_multiplier: float = Field(default=1.0, gt=0)
    """Factor on the learning rate of the new connector parameters."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of matrices; vectors (norms, biases) have none."""


class AdamWConfig(_Optimizer):
    """AdamW."""

    type: Literal["adamw"] = "adamw"
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""


class SgdConfig(_Optimizer):
    """Stochastic gradient descent."""

    type: Literal["sgd"] = "sgd"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum."""


OptimizerConfig = Annotated[AdamWConfig | SgdConfig, Field(discriminator="type")]


class ScheduleConfig(StrictModel):
    """Learning rate over the steps: linear warm-up, then a decay to `final_fraction` of the peak."""

    type: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps of linear warm-up."""
    final_fraction: float = Field(default=0.05, ge=0, le=1)
    """Learning rate at the last step as a fraction of the peak."""
