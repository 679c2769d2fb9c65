"""Configuration of the model that a job starts from."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from parcelray.config.base import StrictModel
from parcelray.config.paths import ModelReference


class CheckpointModelConfig(StrictModel):
    """An existing checkpoint."""

    type: Literal["checkpoint"] = "checkpoint"
    reference: ModelReference = "mini_base"
    """Reference of the checkpoint, resolved once to a pinned version.

    A packaged checkpoint (`mini_base`, `mini_parcel`, `mini_m3`, `mini_mqt`, `mini_vanilla`, `mini_llava`,
    `mini_llava_siglip`, `mini_llava_convnext`), a folder, `models:/NAME@alias`, `models:/NAME/VERSION`, a Hugging Face
    hub id, or the URI of a trained model, such as `s3://bucket/runs/train/NAME/model`. A folder must have the same
    files on every host.
    """


class _MiniSizes(StrictModel):
    """Dimensions of a small, randomly initialised model."""

    image_size: int = Field(default=64, ge=8)
    """Side of the square input image, pixels."""
    patch_size: int = Field(default=4, ge=1)
    """Side of a patch, pixels."""
    vision_width: int = Field(default=96, ge=8)
    """Width D_v of the vision tower."""
    vision_layers: int = Field(default=3, ge=1)
    """Number of layers of the vision tower."""
    vision_heads: int = Field(default=4, ge=1)
    """Number of attention heads of the vision tower."""
    vision_mlp_width: int = Field(default=288, ge=8)
    """MLP width of the vision tower."""
    text_width: int = Field(default=96, ge=8)
    """Width D_l of the language model."""
    text_layers: int = Field(default=4, ge=1)
    """Number of layers of the language model."""
    text_heads: int = Field(default=4, ge=1)
    """Number of query heads of the language model."""
    text_kv_heads: int = Field(default=2, ge=1)
    """Number of key-value heads of the language model; must divide text_heads."""
    text_head_dim: int = Field(default=24, ge=4)
    """Width of one attention head of the language model."""
    text_mlp_width: int = Field(default=288, ge=8)
    """MLP width of the language model."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}; change one of them"
            )
        if self.vision_width % self.vision_heads:
            raise ValueError(
                f"vision_width {self.vision_width} is not a multiple of vision_heads {self.vision_heads}; change one of"
                " them"
            )
        if self.text_heads % self.text_kv_heads:
            raise ValueError(
                f"text_heads {self.text_heads} is not a multiple of text_kv_heads {self.text_kv_heads}; change one of"
                " them"
            )
        return self


class MiniModelConfig(_MiniSizes):
    """A small, randomly initialised PaliGemma-2 (arXiv 2412.03555 describes the full-size architecture)."""

    type: Literal["mini"] = "mini"


class MiniLlavaModelConfig(_MiniSizes):
    """A small, randomly initialised LLaVA-1.5 (arXiv 2310.03744 describes the full-size architecture)."""

    type: Literal["mini_llava"] = "mini_llava"
    tower: Literal["clip", "siglip", "convnext"] = "clip"
    """Type of the vision tower. For `convnext`, `vision_layers` counts blocks; heads and MLP width are ignored."""


ModelConfig = Annotated[CheckpointModelConfig | MiniModelConfig | MiniLlavaModelConfig, Field(discriminator="type")]
