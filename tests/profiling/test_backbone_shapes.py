"""Dimensions of backbones from presets, files and transformers configurations."""

import json
from pathlib import Path

import pytest
from transformers import PaliGemmaConfig

from parcelray.errors import UserError
from parcelray.profiling import backbone_shapes
from parcelray.profiling.backbone_shapes import PRESETS, from_transformers_config, resolve_backbone

# The config.json of google/paligemma2-3b-pt-224, in which head_dim, image_size and num_channels have default values.
PALIGEMMA2_3B_JSON = {
    "model_type": "paligemma",
    "text_config": {
        "model_type": "gemma2",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 257152,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(PALIGEMMA2_3B_JSON), encoding="utf-8")
    return tmp_path


def _dims(shape: backbone_shapes.BackboneShape) -> tuple[object, ...]:
    return tuple(getattr(shape, name) for name in shape.__slots__ if name != "name")


def test_presets_have_the_expected_patch_grids() -> None:
    shape = resolve_backbone("paligemma2-3b")
    assert (shape.image_size, shape.grid_size, shape.num_patches) == (224, 16, 256)
    assert resolve_backbone("paligemma2-3b", 448).num_patches == 1024


def test_a_saved_config_without_default_values_equals_the_preset(checkpoint: Path) -> None:
    assert _dims(resolve_backbone(str(checkpoint))) == _dims(PRESETS["paligemma2-3b"])


def test_transformers_config_and_its_saved_file_agree(tmp_path: Path) -> None:
    config = PaliGemmaConfig(**{key: value for key, value in PALIGEMMA2_3B_JSON.items() if key != "model_type"})
    config.save_pretrained(tmp_path)
    assert (
        _dims(from_transformers_config(config))
        == _dims(resolve_backbone(str(tmp_path)))
        == _dims(PRESETS["paligemma2-3b"])
    )


def test_the_mini_backbone_is_packaged() -> None:
    shape = resolve_backbone("mini")
    assert shape.name == "mini"
    assert shape.num_patches == 256


def test_a_missing_mini_checkpoint_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backbone_shapes, "MINI_CONFIG", tmp_path / "config.json")
    with pytest.raises(UserError, match="mini checkpoint"):
        resolve_backbone("mini")


@pytest.mark.parametrize(
    ("backbone", "resolution", "message"),
    [
        ("paligemma2-3B", None, r"did you mean paligemma2-3b\?"),
        ("no-such-folder", None, "choose paligemma2-3b, llava-1.5-7b, mini or a folder"),
        ("paligemma2-3b", 230, "Resolution 230 is not a multiple of the patch size 14 .* 224, 238"),
        ("paligemma2-3b", 7, "nearest multiples are 14"),
        ("paligemma2-3b", 0, "Resolution 0"),
        ("paligemma2-3b", -14, "Resolution -14"),
    ],
)
def test_illegal_arguments_are_rejected(backbone: str, resolution: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_backbone(backbone, resolution)


def test_a_folder_without_config_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        resolve_backbone(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Cannot read"),
        ("[]", "holds list"),
        ("{}", "has no vision_config"),
        (
            json.dumps(PALIGEMMA2_3B_JSON | {"text_config": {"model_type": "qwen3"}}),
            "type qwen3, .*legal: gemma, gemma2, llama",
        ),
        (
            json.dumps(
                PALIGEMMA2_3B_JSON | {"vision_config": {"model_type": "siglip_vision_model", "hidden_size": "wide"}}
            ),
            "vision_width .* 'wide'",
        ),
    ],
)
def test_invalid_files_are_rejected(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        resolve_backbone(str(tmp_path))
