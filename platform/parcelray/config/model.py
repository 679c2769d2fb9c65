"""Which model a job starts from, as data."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from parcelray.config.base import StrictModel


class CheckpointModelConfig(StrictModel):
    """A checkpoint that is there already."""

    type: Literal["checkpoint"] = "checkpoint"
    reference: str = "mini_base"
    """A packaged one (`mini_base`, `mini_llava`, `mini_llava_siglip`, `mini_llava_convnext`), a folder, `models:/NAME@alias` or
    `models:/NAME/VERSION`, a hub id; resolved once, to a pinned version."""


class _MiniSizes(StrictModel):
    """Sizes of a small model from scratch."""

    image_size: int = Field(default=64, ge=8)
    """Side of the square input image, pixels."""
    patch_size: int = Field(default=4, ge=1)
    """Side of a patch, pixels."""
    vision_width: int = Field(default=96, ge=8)
    """Width D_v of the vision tower."""
    vision_layers: int = Field(default=3, ge=1)
    """Layers of the vision tower."""
    vision_heads: int = Field(default=4, ge=1)
    """Attention heads of the vision tower."""
    vision_mlp_width: int = Field(default=288, ge=8)
    """MLP width of the vision tower."""
    text_width: int = Field(default=96, ge=8)
    """Width D_l of the language model."""
    text_layers: int = Field(default=4, ge=1)
    """Layers of the language model."""
    text_heads: int = Field(default=4, ge=1)
    """Query heads of the language model."""
    text_kv_heads: int = Field(default=2, ge=1)
    """Key-value heads of the language model; must divide text_heads."""
    text_head_dim: int = Field(default=24, ge=4)
    """Width of a head of the language model."""
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
    """PaliGemma-2 from scratch at a small size (arXiv 2412.03555 gives the full-size architecture)."""

    type: Literal["mini"] = "mini"


class MiniLlavaModelConfig(_MiniSizes):
    """LLaVA-1.5 from scratch at a small size (arXiv 2310.03744 gives the full-size architecture)."""

    type: Literal["mini_llava"] = "mini_llava"
    tower: Literal["clip", "siglip", "convnext"] = "clip"
    """Vision tower; of a convolutional one `vision_layers` are the blocks, and heads and MLP width mean nothing."""


ModelConfig = Annotated[CheckpointModelConfig | MiniModelConfig | MiniLlavaModelConfig, Field(discriminator="type")]
