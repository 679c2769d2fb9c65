"""Loads a model and its processor from a checkpoint folder, for every backbone family, and rewrites its routing.

Properties of the configuration (family, sizes, connector, legal budgets) are read without loading the weights.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from transformers import AddedToken
from transformers.initialization import no_init_weights
from transformers.utils import logging

from parcelray.config.adaptation import AttentionBackend
from parcelray.config.connector import ConnectorConfig, ParcelConnectorConfig, RouteConfig
from parcelray.errors import ParcelrayError, SystemFailure, UserError
from parcelray.models.backbones import (
    ElasticLlavaConfig,
    ElasticLlavaForConditionalGeneration,
    ElasticPaliGemmaConfig,
    ElasticPaliGemmaForConditionalGeneration,
    ElasticVLM,
)
from parcelray.models.backbones.llava_processor import ElasticLlavaProcessor
from parcelray.models.backbones.paligemma_processor import ElasticPaliGemmaProcessor
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.connectors import Connector, build_connector
from parcelray.models.connectors.routing import resolve_routing
from parcelray.models.manifest import MANIFEST_NAME, read_manifest, write_manifest

_ATTENTION_NAMES: dict[AttentionBackend, str] = {
    "eager": "eager",
    "sdpa": "sdpa",
    "flash": "flash_attention_2",
    "flex": "flex_attention",
}
"""Names of the backends in transformers."""

ElasticConfig = ElasticPaliGemmaConfig | ElasticLlavaConfig


class _Family(NamedTuple):
    model: type[Any]
    processor: type[Any]


_FAMILIES = {
    "paligemma": _Family(ElasticPaliGemmaForConditionalGeneration, ElasticPaliGemmaProcessor),
    "llava": _Family(ElasticLlavaForConditionalGeneration, ElasticLlavaProcessor),
}


def family_of(path: str | Path) -> str:
    """Returns the backbone family of a checkpoint folder, stock or elastic: `paligemma` or `llava`.

    Raises:
        UserError: the folder is not a checkpoint, or its family is not supported.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise UserError(
            f"{path} is not a checkpoint folder (it has no config.json); give a folder written by save_pretrained."
        )
    with _damage_explained(path, "config.json"):
        model_type = str(json.loads(file.read_text(encoding="utf-8")).get("model_type"))
    family = model_type.removeprefix("elastic_")
    if family not in _FAMILIES:
        raise UserError(
            f"{path} holds a model of type {model_type}; supported types are {', '.join(_FAMILIES)} and the elastic"
            " models made from them."
        )
    return family


@contextmanager
def _damage_explained(path: str | Path, part: str) -> Iterator[None]:
    """Turns the errors of transformers, tokenizers and safetensors about missing or cut files into one sentence."""
    try:
        yield
    except (ParcelrayError, RuntimeError, MemoryError):
        # A RuntimeError is not about files: out of GPU memory, or weights of another shape.
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise SystemFailure(
            f"The {part} of the checkpoint {path} cannot be read, because files are missing or damaged ({reason});"
            " download or copy the checkpoint again."
        ) from error


def config_of(path: str | Path) -> ElasticConfig:
    """Returns the configuration of a checkpoint folder, stock or elastic.

    Raises:
        UserError: see `family_of`.
        SystemFailure: the configuration is damaged.
    """
    family = _FAMILIES[family_of(path)]
    # For a stock checkpoint, transformers warns that its model type is another one than that of the class.
    with quiet_transformers(), _damage_explained(path, "config.json"):
        return cast(ElasticConfig, family.model.config_class.from_pretrained(path))


def connector_of(path: str | Path) -> Connector:
    """Builds the connector of a checkpoint folder on the meta device, to read its name and legal budgets."""
    config = config_of(path)
    with torch.device("meta"):
        return build_connector(config.connector_config, **config.vision_dims._asdict())


def load_processor(path: str | Path) -> ElasticProcessor:
    """Loads the processor (tokenizer and image processor) of a checkpoint folder, stock or elastic.

    Raises:
        UserError: see `family_of`.
        SystemFailure: files of the tokenizer or the image processor are missing or damaged.
    """
    family = _FAMILIES[family_of(path)]
    with _damage_explained(path, "tokenizer or processor"):
        processor = cast(ElasticProcessor, family.processor.from_pretrained(path))
    # A text could otherwise write the placeholder in a checkpoint where it is an ordinary added token.
    placeholder = AddedToken(processor.image_token, special=True, normalized=False)
    processor.tokenizer.add_tokens([placeholder], special_tokens=True)
    return processor


def image_size_of(path: Path) -> int:
    """Returns the side in pixels of a checkpoint's square input images."""
    return load_processor(path).image_size


def load_vlm(
    path: str | Path,
    *,
    connector: ConnectorConfig | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> ElasticVLM:
    """Loads a checkpoint folder, stock or elastic, and inserts a new connector if one is given.

    A new connector starts from seeded random weights at the scale of the checkpoint's patch features. All other weights
    must be in the checkpoint: `from_pretrained` alone would initialise missing ones at random with only a warning.

    Args:
        path: folder with `config.json` and safetensors files.
        connector: replaces the checkpoint's connector; None keeps it (identity for a stock checkpoint).
        seed: seed of the new connector's weights.
        dtype: data type of all weights. The data type of the files is never inherited: small updates of training would
            be lost in the 8 bits of a bfloat16 weight, and the same job would compute differently on another folder.

    Raises:
        UserError: the folder is not a checkpoint of a supported family, or weights are missing from it.
    """
    config = config_of(path)
    if connector is not None:
        config.connector = connector.model_dump(mode="json")
    with torch.random.fork_rng(devices=[]), quiet_transformers(), _damage_explained(path, "weights"):
        torch.manual_seed(seed)
        model, info = _FAMILIES[family_of(path)].model.from_pretrained(
            path, config=config, output_loading_info=True, use_safetensors=True, dtype=dtype
        )
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("model.connector."))
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} weights of the model, for example {missing[0]}; use a complete checkpoint."
        )
    if any(key.startswith("model.connector.") for key in info["missing_keys"]):
        model.connector.match_scale(*model.model.feature_scale())
    return cast(ElasticVLM, model)


def empty_vlm(config: ElasticConfig, dtype: torch.dtype = torch.float32) -> ElasticVLM:
    """Builds a model without setting its weights, to simulate it."""
    # A copy without the attention that a model which was built from it has chosen.
    config = type(config).from_dict(config.to_dict())
    for part in (config, config.vision_config, config.text_config):
        part.dtype = dtype
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights(), quiet_transformers():
            model = _FAMILIES[str(config.model_type).removeprefix("elastic_")].model(config)
            model.tie_weights()
            return cast(ElasticVLM, model)
    finally:
        torch.set_default_dtype(default)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides transformers' progress bars and its report of missing weights, which would break up the caller's output.

    The report is redundant: `load_vlm` raises an error if any weight other than a new connector's is missing.
    """
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def use_sdpa_where_exact(model: ElasticVLM) -> None:
    """Switches the decoder to scaled-dot-product attention (SDPA) if that gives exact results.

    It does unless the decoder has logit soft-capping, which SDPA cannot express.
    """
    if _softcap(model) is None:
        use_attention(model, "sdpa")


def use_attention(model: ElasticVLM, backend: AttentionBackend) -> None:
    """Switches the decoder to an attention backend; the vision tower has torch's own choice for SDPA.

    Raises:
        UserError: the backend cannot compute this model's attention.
    """
    reason = None
    if backend == "sdpa" and _softcap(model) is not None:
        reason = "caps its attention logits, which SDPA cannot do; use flex (on GPUs) or eager"
    if backend == "flash" and model.reads_both_ways:
        reason = "attends to the whole prompt, but FlashAttention has causal masks only; use flex (on GPUs) or eager"
    if reason is not None:
        raise UserError(f"training.attention is {backend}, but the decoder of this {model.config.model_type} {reason}.")
    model.model.language_model.config._attn_implementation = _ATTENTION_NAMES[backend]


def _softcap(model: ElasticVLM) -> float | None:
    softcap: float | None = getattr(model.config.text_config, "attn_logit_softcapping", None)
    return softcap


def write_converted(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copies a checkpoint folder and rounds its weights to `dtype`, which the configuration of the copy names.

    Args:
        source: checkpoint folder.
        target: folder to write; must not exist.
        dtype: data type of the weights of the copy.
    """
    shutil.copytree(source, target)
    with quiet_transformers():
        load_vlm(source, dtype=dtype).save_pretrained(target)


def write_rerouted(source: Path, target: Path, routing: Sequence[RouteConfig], found_by: str) -> Path:
    """Copies a supernet checkpoint and replaces the routing in its configuration; the weights stay the same.

    Args:
        source: checkpoint folder with a manifest, trained as a supernet over splits.
        target: folder to write; existing content is replaced.
        routing: the new intervals, which evaluation and serving will follow.
        found_by: name of the search, recorded in the manifest.

    Returns:
        The target folder.

    Raises:
        UserError: the checkpoint is not a supernet, or was not trained with one of the anchor grids.
    """
    connector = config_of(source).connector_config
    if not isinstance(connector, ParcelConnectorConfig) or not connector.anchor_grids:
        raise UserError(
            f"{source} is not a supernet over splits (its connector has no anchor_grids), so its routing is fixed;"
            " train jobs/train/supernet.yaml."
        )
    built = connector_of(source)
    for route in routing:
        for budget in (route.min_budget, route.max_budget):
            built.check_split(budget, route.anchor_grid)
    resolve_routing(routing, int(max(built.supported_budgets) ** 0.5))
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    file = target / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["connector"]["routing"] = [route.model_dump(mode="json") for route in routing]
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    manifest = read_manifest(source)
    (target / MANIFEST_NAME).unlink()
    write_manifest(
        target,
        config=manifest.config,
        git_commit=manifest.git_commit,
        data=manifest.data,
        seed=manifest.seed,
        extra={**manifest.extra, "routing_found_by": found_by, "rerouted_from": str(source)},
    )
    return target
