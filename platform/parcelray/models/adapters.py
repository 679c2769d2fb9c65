"""Parts of an elastic model: freezing them, and low-rank adapters (LoRA, arXiv 2106.09685) on them, through PEFT."""

import hashlib
import re
from collections.abc import Sequence

import torch
from torch import nn

from parcelray.config.adaptation import LoraConfig, LoraPartConfig, ModelPart
from parcelray.errors import UserError
from parcelray.models.backbones import ElasticVLM

_ADAPTER = "default"
_DIGEST_VALUES = 1024
"""Number of values of each frozen weight that its digest covers."""


def part_modules(model: ElasticVLM, part: ModelPart) -> tuple[nn.Module, ...]:
    """Returns the modules of a part; the first one has its linear layers. The parts have all weights of the model."""
    inner = model.model
    modules: dict[ModelPart, tuple[nn.Module, ...]] = {
        "tower": (inner.vision_tower,),
        "connector": (inner.connector,),
        "projector": (inner.multi_modal_projector,),
        "decoder": (inner.language_model, model.lm_head),
    }
    return modules[part]


def freeze_parts(model: ElasticVLM, parts: Sequence[ModelPart]) -> None:
    """Excludes the weights of parts from training."""
    for part in parts:
        for module in part_modules(model, part):
            module.requires_grad_(False)


def add_adapters(model: ElasticVLM, lora: LoraConfig, seed: int) -> None:
    """Adds adapters in place, and freezes all other weights of their parts. New adapters do not change the outputs.

    Args:
        model: the model.
        lora: the adapters.
        seed: seed of their initial weights.

    Raises:
        UserError: PEFT is not installed, or a part has no such layers.
    """
    try:
        import peft
        from peft.tuners.lora import LoraLayer, LoraModel
    except ImportError as error:
        raise UserError(
            "training.lora needs the package peft, which is not installed; run pip install 'parcelray[lora]'."
        ) from error

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part, config in lora.parts():
            module = part_modules(model, part)[0]
            names = _target_names(module, part, config)
            freeze_parts(model, [part])
            settings = peft.LoraConfig(
                r=config.rank,
                lora_alpha=2 * config.rank if config.alpha is None else config.alpha,
                lora_dropout=config.dropout,
                # PEFT matches a list by the ends of names, but a text by whole names.
                target_modules="|".join(map(re.escape, names)),
            )
            # On the meta device, because PEFT cannot move its layers to weights that are simulated.
            LoraModel(module, settings, _ADAPTER, low_cpu_mem_usage=True)
            for layer in module.modules():
                if isinstance(layer, LoraLayer):
                    for adapters in (layer.lora_A, layer.lora_B):
                        linear = adapters[_ADAPTER]
                        assert isinstance(linear, nn.Linear)
                        linear.weight = nn.Parameter(layer.weight.new_empty(linear.weight.shape))
                    layer.reset_lora_parameters(_ADAPTER, True)  # type: ignore[no-untyped-call]


def _target_names(module: nn.Module, part: ModelPart, config: LoraPartConfig) -> list[str]:
    linear = [name for name, each in module.named_modules() if isinstance(each, nn.Linear)]
    if not linear:
        raise UserError(f"training.lora.{part}: this model's {part} has no linear layers; remove the key.")
    if config.targets is None:
        return linear
    kinds = {name.rpartition(".")[2] for name in linear}
    for target in config.targets:
        if target not in kinds:
            raise UserError(
                f"training.lora.{part}.targets has {target!r}; the linear layers of this {part} are"
                f" {', '.join(sorted(kinds))}."
            )
    return [name for name in linear if name.rpartition(".")[2] in config.targets]


def merge_adapters(model: ElasticVLM) -> None:
    """Adds the adapters to the weights that they adapt, and removes them, in place."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer.get_base_layer())


def frozen_digest(model: ElasticVLM) -> str:
    """Returns a digest of some values of every frozen weight, which tells apart the start models of a training."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad:
            values = parameter.detach().flatten()
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
            digest.update(values[:: max(1, len(values) // _DIGEST_VALUES)].float().cpu().numpy().tobytes())
    return digest.hexdigest()
