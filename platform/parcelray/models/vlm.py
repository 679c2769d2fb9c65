"""The elastic vision-language model, whatever its backbone: loading, and what a checkpoint's configuration alone tells."""

import json
from pathlib import Path
from typing import Any, cast

import torch

from parcelray.config.connector import ConnectorConfig
from parcelray.errors import UserError
from parcelray.models.backbones import (
    ElasticLlavaConfig,
    ElasticLlavaForConditionalGeneration,
    ElasticPaliGemmaConfig,
    ElasticPaliGemmaForConditionalGeneration,
    ElasticVLM,
)
from parcelray.models.backbones.base import connector_for
from parcelray.models.connectors import Connector
from parcelray.models.quiet import quiet_transformers

ElasticConfig = ElasticPaliGemmaConfig | ElasticLlavaConfig
_FAMILIES: dict[str, type[Any]] = {
    "paligemma": ElasticPaliGemmaForConditionalGeneration,
    "llava": ElasticLlavaForConditionalGeneration,
}


def family_of(path: str | Path) -> str:
    """`paligemma` or `llava`: whose classes a checkpoint folder, stock or elastic, needs.

    Raises:
        UserError: the folder is no checkpoint, or one of another family.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise UserError(
            f"{path} is not a checkpoint folder (it has no config.json); give a folder written by save_pretrained."
        )
    kind = str(json.loads(file.read_text(encoding="utf-8")).get("model_type"))
    family = kind.removeprefix("elastic_")
    if family not in _FAMILIES:
        raise UserError(
            f"{path} holds a model of type {kind}; legal are {', '.join(_FAMILIES)} and the elastic models made from"
            " them."
        )
    return family


def config_of(path: str | Path) -> ElasticConfig:
    """The configuration of a checkpoint folder, stock or elastic.

    Raises:
        UserError: see `family_of`.
    """
    return cast(ElasticConfig, _FAMILIES[family_of(path)].config_class.from_pretrained(path))


def connector_of(path: str | Path) -> Connector:
    """The connector of a checkpoint folder without its weights: what it is called and which budgets it can give."""
    config = config_of(path)
    with torch.device("meta"):
        return connector_for(config.connector_config, config.vision_dims)


def load_vlm(path: str | Path, *, connector: ConnectorConfig | None = None, seed: int = 0, **kwargs: Any) -> ElasticVLM:
    """Loads a checkpoint folder, stock or elastic, and inserts a connector when one is given.

    A new connector starts from seeded random weights at the scale of the checkpoint's own patch features; every other
    weight must be in the checkpoint (`from_pretrained` would fill a missing one at random with only a warning).

    Args:
        path: folder with `config.json` and safetensors.
        connector: replaces the checkpoint's connector; None keeps it (identity for a stock checkpoint).
        seed: of the new connector's weights.
        kwargs: for `from_pretrained`, such as `dtype` and `attn_implementation`.

    Raises:
        UserError: the folder is no checkpoint of a known family, or weights are missing from it.
    """
    config = config_of(path)
    if connector is not None:
        config.connector = connector.model_dump(mode="json")
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        model, info = _FAMILIES[family_of(path)].from_pretrained(
            path, config=config, output_loading_info=True, use_safetensors=True, **kwargs
        )
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("model.connector."))
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} weights of the model, {missing[0]} among them; use a complete checkpoint."
        )
    if any(key.startswith("model.connector.") for key in info["missing_keys"]):
        model.connector.match_scale(*model.model.feature_scale())
    return cast(ElasticVLM, model)


def use_sdpa_where_exact(model: ElasticVLM) -> None:
    """Switches the decoder to scaled-dot-product attention when it has no logit soft-capping (which SDPA cannot express)."""
    if getattr(model.config.text_config, "attn_logit_softcapping", None) is None:
        model.model.language_model.config._attn_implementation = "sdpa"
