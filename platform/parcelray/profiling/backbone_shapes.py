"""The dimensions of a backbone, from a preset, the config.json of a checkpoint or a transformers configuration.

This module imports neither torch nor transformers, so that `parcelray flops` starts quickly.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parcelray.errors import UserError

MINI_CONFIG = Path(__file__).parents[1] / "assets" / "mini_base" / "config.json"

# A config.json contains only the values that differ from the defaults of its class. Reading one therefore needs the
# defaults (transformers 5.23: SiglipVisionConfig, CLIPVisionConfig, GemmaConfig, Gemma2Config, LlamaConfig).
_VISION_DEFAULTS: dict[str, dict[str, int]] = {
    "siglip_vision_model": {
        "image_size": 224,
        "patch_size": 16,
        "num_channels": 3,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "clip_vision_model": {
        "image_size": 336,
        "patch_size": 14,
        "num_channels": 3,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
}
_TEXT_DEFAULTS: dict[str, dict[str, int]] = {
    "gemma": {
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "vocab_size": 256000,
    },
    "gemma2": {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 256000,
    },
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "vocab_size": 32000,
    },
}


_MAY_BE_ZERO = ("class_tokens", "vision_heads", "unused_vision_layers")


@dataclass(frozen=True, slots=True)
class BackboneShape:
    """The dimensions of a backbone, with their symbols in the cost model of arXiv 2605.30126 (Appendix C)."""

    name: str
    """Name for messages and tables."""
    image_size: int
    """Side of the square input image in pixels."""
    patch_size: int
    """Side of a patch in pixels."""
    num_channels: int
    """Number of colour channels of the image."""
    vision_layers: int
    """L_v, number of layers of the vision tower."""
    vision_width: int
    """D_v, width of the vision tower."""
    vision_mlp_width: int
    """M_v, width of the MLP of the vision tower."""
    vision_heads: int
    """Number of attention heads of the vision tower; it does not change the cost.

    0: a convolutional tower. Its pointwise layers are counted: 16 N_v D_v^2 per block at every stage, because the
    feature map shrinks as the width grows.
    """
    text_layers: int
    """L_l, number of layers of the language model."""
    text_width: int
    """D_l, width of the language model."""
    text_mlp_width: int
    """M_l, width of the MLP of the language model."""
    num_heads: int
    """H_q, number of query heads of the language model."""
    num_kv_heads: int
    """H_kv, number of key-value heads of the language model."""
    head_dim: int
    """d_h, width of an attention head of the language model."""
    vocab_size: int
    """V, number of tokens in the vocabulary."""
    class_tokens: int = 0
    """Number of tokens of the vision tower in addition to the patches."""
    projector_layers: int = 1
    """Number of linear layers of the projector: one from D_v to D_l, and further ones from D_l to D_l."""
    unused_vision_layers: int = 0
    """Number of layers of the vision tower after the patch features. They run with the tower, so `cost` counts them.

    LLaVA-1.5 takes the features after 23 of 24 layers. A tower that is run layer by layer (ToMe) leaves the last out.
    """

    def __post_init__(self) -> None:
        for name in self.__slots__[1:]:
            value, least = getattr(self, name), int(name not in _MAY_BE_ZERO)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(
                    f"{name} of backbone {self.name} is {value!r}; legal: integers of at least {least}. Correct its"
                    " config.json."
                )
        if self.image_size % self.patch_size:
            below = self.image_size // self.patch_size * self.patch_size
            legal = ", ".join(str(value) for value in (below, below + self.patch_size) if value)
            raise UserError(
                f"Resolution {self.image_size} is not a multiple of the patch size {self.patch_size} of {self.name};"
                f" the nearest multiples are {legal}."
            )

    @property
    def grid_size(self) -> int:
        """Number of patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """N_v, number of patches of the image."""
        return self.grid_size**2

    @property
    def decoder_sizes(self) -> dict[str, int]:
        """Sizes of the decoder by their keys in a configuration of transformers."""
        return {
            "hidden_size": self.text_width,
            "intermediate_size": self.text_mlp_width,
            "num_hidden_layers": self.text_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
        }

    def at_resolution(self, image_size: int) -> "BackboneShape":
        """Returns the same backbone with square images of `image_size` x `image_size` pixels.

        Raises:
            UserError: the size is not a positive multiple of the patch size.
        """
        if image_size < 1:
            raise UserError(
                f"Resolution {image_size} is below 1 pixel; give a multiple of the patch size"
                f" {self.patch_size}, such as {self.image_size}."
            )
        return replace(self, image_size=image_size)


_PALIGEMMA2_3B = BackboneShape(
    name="paligemma2-3b",
    image_size=224,
    patch_size=14,
    num_channels=3,
    vision_layers=27,
    vision_width=1152,
    vision_mlp_width=4304,
    vision_heads=16,
    text_layers=26,
    text_width=2304,
    text_mlp_width=9216,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
    vocab_size=257152,
)
_LLAVA_7B = BackboneShape(
    name="llava-1.5-7b",
    image_size=336,
    patch_size=14,
    num_channels=3,
    vision_layers=24,
    vision_width=1024,
    vision_mlp_width=4096,
    vision_heads=16,
    text_layers=32,
    text_width=4096,
    text_mlp_width=11008,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=32064,
    class_tokens=1,
    projector_layers=2,
    unused_vision_layers=1,
)
PRESETS: dict[str, BackboneShape] = {"paligemma2-3b": _PALIGEMMA2_3B, "llava-1.5-7b": _LLAVA_7B}
"""Backbones by name at their base resolution; use `at_resolution` for others (paligemma2-3b: 224 and 448)."""

_HUB_SHAPES = {
    **{
        f"google/paligemma2-3b-{stage}-{size}": _PALIGEMMA2_3B.at_resolution(size)
        for stage in ("pt", "mix")
        for size in (224, 448)
    },
    "llava-hf/llava-1.5-7b-hf": _LLAVA_7B,
}


def hub_shape(reference: str) -> BackboneShape | None:
    """Returns the dimensions of a model on the Hugging Face hub, if they are known without its files."""
    return _HUB_SHAPES.get(reference.removeprefix("hf:").partition("@")[0])


def from_transformers_config(config: Any) -> BackboneShape:
    """Reads the dimensions from a PaliGemma or LLaVA configuration of transformers, or a subclass of these.

    Args:
        config: a `transformers` configuration with `vision_config` and `text_config`.

    Raises:
        UserError: the cost of the vision tower or language model is not modelled.
    """
    return from_mapping(config.to_dict(), name=str(config.model_type))


def from_mapping(config: Mapping[str, Any], name: str) -> BackboneShape:
    """Reads the dimensions from the content of a config.json; missing values have the default of their class.

    Raises:
        UserError: `vision_config` or `text_config` is missing, or its cost is not modelled.
    """
    convolutional = config.get("vision_config", {}).get("model_type") == "convnext"
    vision = (
        _convnext(config["vision_config"])
        if convolutional
        else _section(config, "vision_config", _VISION_DEFAULTS, name)
    )
    text = _section(config, "text_config", _TEXT_DEFAULTS, name)
    is_llava = str(config.get("model_type", "")).endswith("llava")
    return BackboneShape(
        name=name,
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        num_channels=vision["num_channels"],
        vision_layers=vision["num_hidden_layers"],
        vision_width=vision["hidden_size"],
        vision_mlp_width=vision["intermediate_size"],
        vision_heads=vision["num_attention_heads"],
        text_layers=text["num_hidden_layers"],
        text_width=text["hidden_size"],
        text_mlp_width=text["intermediate_size"],
        num_heads=text["num_attention_heads"],
        num_kv_heads=text["num_key_value_heads"],
        head_dim=text["head_dim"],
        vocab_size=text["vocab_size"],
        class_tokens=int(config["vision_config"].get("model_type") == "clip_vision_model"),
        projector_layers=2 if is_llava else 1,
        unused_vision_layers=_unused_layers(config, vision["num_hidden_layers"]) if is_llava else 0,
    )


def _unused_layers(config: Mapping[str, Any], num_layers: int) -> int:
    """Returns the number of layers after the hidden state that LLaVA takes as patch features."""
    # A tower of L layers has L + 1 hidden states; transformers' default is the last but one. A convolutional tower and
    # several joined layers have no single such state.
    index = config.get("vision_feature_layer", -2)
    convolutional = config["vision_config"].get("model_type") == "convnext"
    return 0 if convolutional or not isinstance(index, int) else num_layers - index % (num_layers + 1)


def _convnext(vision: Mapping[str, Any]) -> dict[str, int]:
    width = int(vision["hidden_sizes"][-1])
    return {
        "image_size": int(vision["image_size"]),
        # Each stage after the first halves the side of the feature map.
        "patch_size": int(vision["patch_size"]) * 2 ** (len(vision["depths"]) - 1),
        "num_channels": int(vision.get("num_channels", 3)),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": sum(vision["depths"]),
        "num_attention_heads": 0,
    }


def resolve_backbone(backbone: str, resolution: int | None = None) -> BackboneShape:
    """Finds the dimensions of a backbone by name or folder.

    Args:
        backbone: name from `PRESETS`, `mini` (the packaged mini checkpoint) or a folder with a config.json.
        resolution: side of the image in pixels; None: the backbone's default.

    Raises:
        UserError: the backbone is unknown, its config.json cannot be read, or the resolution is not a multiple of the
            patch size.
    """
    if backbone in PRESETS:
        shape = PRESETS[backbone]
    elif backbone == "mini":
        if not MINI_CONFIG.is_file():
            raise UserError(
                "The mini checkpoint (parcelray/assets/mini_base) is not in this installation; reinstall parcelray, "
                "or give paligemma2-3b, llava-1.5-7b or a folder with a config.json."
            )
        shape = _from_file(MINI_CONFIG, name="mini")
    else:
        path = Path(backbone).expanduser() / "config.json"
        if not path.is_file():
            raise UserError(_unknown_backbone(backbone))
        shape = _from_file(path, name=backbone)
    return shape if resolution is None else shape.at_resolution(resolution)


def _unknown_backbone(backbone: str) -> str:
    if Path(backbone).expanduser().is_dir():
        return (
            f"The folder {backbone} has no config.json; give the folder of a saved checkpoint, or one of paligemma2-3b,"
            " llava-1.5-7b and mini."
        )
    known = [*PRESETS, "mini"]
    close = difflib.get_close_matches(backbone, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    return f"Unknown backbone {backbone!r}: choose {', '.join(known)} or a folder with a config.json{hint}"


def _from_file(path: Path, name: str) -> BackboneShape:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {path}: {error}. Give the folder of a complete checkpoint.") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds {type(content).__name__}, not an object with vision_config and text_config; give the folder"
            " of a saved checkpoint."
        )
    return from_mapping(content, name)


def _section(config: Mapping[str, Any], key: str, defaults: Mapping[str, dict[str, int]], name: str) -> dict[str, Any]:
    section = config.get(key)
    if not isinstance(section, Mapping):
        raise UserError(
            f"The configuration of {name} has no {key}; give a PaliGemma or LLaVA checkpoint (paligemma2-3b,"
            " llava-1.5-7b, mini or a folder)."
        )
    kind = str(section.get("model_type"))
    if kind not in defaults:
        raise UserError(
            f"The {key} of {name} has the type {kind}, whose cost is not modelled; legal: {', '.join(defaults)}."
        )
    return defaults[kind] | {field: section[field] for field in defaults[kind] if section.get(field) is not None}
