"""Configuration of what a training changes (frozen parts, low-rank adapters), and of its attention backend."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from parcelray.config.base import StrictModel

ModelPart = Literal["tower", "connector", "projector", "decoder"]
"""A part of the model: vision tower, connector, projector, or language model with embeddings and output head."""
PARTS: tuple[ModelPart, ...] = ("tower", "connector", "projector", "decoder")

AttentionBackend = Literal["eager", "sdpa", "flash", "flex"]
"""How the decoder computes attention: one product after the other, or by a fused kernel."""


class LoraPartConfig(StrictModel):
    """Low-rank adapters of one part of the model."""

    rank: int = Field(default=16, ge=1)
    """Rank of the update of each adapted layer."""
    alpha: int | None = Field(default=None, ge=1)
    """The update is multiplied by alpha / rank; null: alpha is twice the rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability of the inputs of the adapters."""
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Names of the linear layers that get adapters, such as q_proj; null: all linear layers of the part."""


class LoraConfig(StrictModel):
    """Low-rank adaptation (LoRA, arXiv 2106.09685) of one or more parts of the model.

    Of a part with adapters, only the adapters are trained. The finished model has them merged into its weights.
    """

    tower: LoraPartConfig | None = None
    """Adapters of the vision tower; null: none."""
    connector: LoraPartConfig | None = None
    """Adapters of the connector; null: none."""
    projector: LoraPartConfig | None = None
    """Adapters of the projector; null: none."""
    decoder: LoraPartConfig | None = None
    """Adapters of the language model, without embeddings and output head; null: none."""

    def parts(self) -> Iterator[tuple[ModelPart, LoraPartConfig]]:
        """Yields the parts that have adapters."""
        for part in PARTS:
            config: LoraPartConfig | None = getattr(self, part)
            if config is not None:
                yield part, config

    @model_validator(mode="after")
    def _check(self) -> "LoraConfig":
        if not any(self.parts()):
            raise ValueError(
                f"no part of the model gets adapters; give one of {', '.join(PARTS)}, such as decoder: {{}}"
            )
        return self
