"""`parcelray bench connector`: time and peak memory of each connector by budget, alone and within a prefill.

The prefill runs the vision tower, connector, projector and language model. The weights are random, because neither time
nor memory depends on them. No checkpoint is needed, so PaliGemma-2 3B can be measured at its real shape.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, get_args

import torch
from torch import Tensor

from parcelray.bench.measure import Measure, Report, machine_info, peak_memory_bytes, time_pairs
from parcelray.config.connector import ConnectorConfig
from parcelray.errors import UserError, describe_values
from parcelray.models.connectors import Connector
from parcelray.profiling.backbone_shapes import PRESETS, BackboneShape, resolve_backbone
from parcelray.profiling.connector_flops import connector_for
from parcelray.profiling.flops import BYTES_PER_MB, IMAGE_TEXT_TOKENS

if TYPE_CHECKING:
    from parcelray.models.backbones import ElasticVLM

CONNECTOR_CONFIGS: tuple[ConnectorConfig, ...] = tuple(
    config_class() for config_class in get_args(get_args(ConnectorConfig)[0])
)
"""Every connector with its default settings."""


class _Prefill(NamedTuple):
    """A model and one batch of its inputs."""

    model: "ElasticVLM"
    pixels_ICHW: Tensor
    patch_features_IND: Tensor
    text_ids_BS: Tensor

    def connector(self, num_visual_tokens: int) -> Tensor:
        tokens_IKD: Tensor = self.model.connector(self.patch_features_IND, num_visual_tokens=num_visual_tokens)
        return tokens_IKD

    def whole(self, num_visual_tokens: int) -> object:
        batch_size = len(self.text_ids_BS)
        placeholders = self.text_ids_BS.new_full((batch_size, num_visual_tokens), self.model.config.image_token_id)
        ids = torch.cat([placeholders, self.text_ids_BS], dim=1)
        return self.model(
            input_ids=ids,
            pixel_values=self.pixels_ICHW,
            attention_mask=torch.ones_like(ids),
            token_type_ids=torch.zeros_like(ids),
            num_visual_tokens=num_visual_tokens,
            logits_to_keep=1,
        )


@torch.inference_mode()
def bench_connectors(
    backbone: str,
    budgets: Sequence[int],
    batch_size: int = 1,
    repeats: int = 10,
    device: str = "cpu",
    *,
    resolution: int | None = None,
) -> Report:
    """Times every connector and a whole prefill with it, alternately, at each budget that the connector supports.

    Args:
        backbone: `mini`, a folder with a config.json, or `paligemma2-3b` (GPU only).
        budgets: visual tokens per image.
        batch_size: number of images; each has a prompt of the paper's length (129 tokens).
        repeats: number of timed rounds after two warm-up rounds; the measures are medians.
        device: `cpu` (float32) or `cuda` (bfloat16).
        resolution: side of the image in pixels; None: the resolution of the backbone.

    Returns:
        For every connector and supported budget: time and peak memory of the connector and of the whole prefill, and
        the connector's share of the time.

    Raises:
        UserError: the backbone is unknown, the GPU is missing, a number is below 1, or no connector supports a budget.
    """
    shape = resolve_backbone(backbone, resolution)
    target = _device(device, backbone)
    if batch_size < 1 or repeats < 1:
        raise UserError(f"batch size {batch_size} and repeats {repeats} must both be at least 1.")
    connectors = [(config, _build(config, shape)) for config in CONNECTOR_CONFIGS]
    legal = sorted({budget for _, connector in connectors for budget in connector.supported_budgets})
    for budget in budgets:
        if budget not in legal:
            raise UserError(
                f"No connector supports {budget} visual tokens for {shape.num_patches} patches; legal budgets are"
                f" {describe_values(legal)}."
            )
    prefill = _random_prefill(backbone, shape, batch_size, target)
    measures: list[Measure] = []
    for config, on_meta in connectors:
        prefill.model.model.connector = _materialise(config, shape, prefill.patch_features_IND)
        for budget in budgets:
            if budget in on_meta.supported_budgets:
                measures.extend(_measure(config.type, prefill, budget, repeats))
    setting: dict[str, str | int] = {
        "backbone": shape.name,
        "resolution": shape.image_size,
        "batch_size": batch_size,
        "repeats": repeats,
        "device": target.type,
        "dtype": str(prefill.patch_features_IND.dtype).removeprefix("torch."),
    }
    return Report(tuple(measures), machine_info() | setting)


def _measure(name: str, prefill: _Prefill, budget: int, repeats: int) -> Iterator[Measure]:
    alone, whole = partial(prefill.connector, budget), partial(prefill.whole, budget)
    device = prefill.patch_features_IND.device
    timing = time_pairs(
        alone, whole, repeats, warmup=2, synchronize=torch.cuda.synchronize if device.type == "cuda" else None
    )
    label, against = f"{name} at {budget} tokens", f"whole prefill at {budget} tokens"
    yield Measure(f"{label}: time", 1e3 * timing.median_a, "ms", 1e3 * timing.spread_a)
    yield Measure(f"{label}: time of the whole prefill", 1e3 * timing.median_b, "ms", 1e3 * timing.spread_b)
    yield Measure(f"{label}: share of the time", 100 * timing.ratio, "%", 100 * timing.spread_ratio, against=against)
    yield Measure(f"{label}: peak memory", peak_memory_bytes(alone, device) / BYTES_PER_MB, "MB")
    yield Measure(f"{label}: peak memory of the whole prefill", peak_memory_bytes(whole, device) / BYTES_PER_MB, "MB")


def _device(device: str, backbone: str) -> torch.device:
    if device not in ("cpu", "cuda"):
        raise UserError(f"Unknown device {device!r}: choose cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "No CUDA device is visible to this process; run on a machine with a CUDA device, or choose cpu."
        )
    if device == "cpu" and backbone in PRESETS:
        raise UserError(
            f"{backbone} needs a GPU for this bench (about 12 GB in float32); choose cuda, or the backbone mini."
        )
    return torch.device(device)


def _build(config: ConnectorConfig, shape: BackboneShape) -> Connector:
    with torch.device("meta"):
        return connector_for(config, shape)


def _materialise(config: ConnectorConfig, shape: BackboneShape, like: Tensor) -> Connector:
    with torch.device(like.device):
        return connector_for(config, shape).to(like.dtype).eval()


def _random_prefill(backbone: str, shape: BackboneShape, batch_size: int, device: torch.device) -> _Prefill:
    # Imported here because transformers' model classes take seconds to import; errors in options are reported before.
    from parcelray.bench.workload import model_config, random_model

    model = random_model(model_config(backbone, shape), device)
    generator = torch.Generator(device).manual_seed(0)
    pixels = torch.randn(
        batch_size,
        shape.num_channels,
        shape.image_size,
        shape.image_size,
        dtype=model.dtype,
        device=device,
        generator=generator,
    )
    # Ids below the image token's id. The text does not influence the time.
    ids = torch.randint(
        0, model.config.image_token_id, (batch_size, IMAGE_TEXT_TOKENS), device=device, generator=generator
    )
    return _Prefill(model, pixels, model.model.encode_patches(pixels), ids)
