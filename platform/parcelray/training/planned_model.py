"""The model that a job starts from, without its weights, for plans: also of a known hub model that is not on this host.

A plan neither loads nor downloads weights, so `--dry-run` of a job with a large model needs little memory and, for the
known models, no network.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from parcelray.config.model import CheckpointModelConfig
from parcelray.config.train import TrainJob
from parcelray.models.backbones import ElasticLlavaConfig, ElasticPaliGemmaConfig, ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.checkpoint import resolve_checkpoint
from parcelray.models.hub import in_hub_cache
from parcelray.models.vlm import ElasticConfig, config_of, empty_vlm, load_processor
from parcelray.models.vocabulary import add_words
from parcelray.profiling.backbone_shapes import BackboneShape, hub_shape
from parcelray.training.run import resolve_start
from parcelray.training.start import build_start


class PlannedModel(NamedTuple):
    """A model on the meta device with the job's connector and vocabulary, and its processor."""

    model: ElasticVLM
    processor: ElasticProcessor
    start: str
    """The pinned reference; `random weights` for a model from scratch."""
    note: str | None = None
    """What is not that of the real model."""


def planned_model(job: TrainJob) -> PlannedModel:
    """Returns the model of a job for a plan.

    Raises:
        UserError: the checkpoint is unusable.
    """
    if not isinstance(job.model, CheckpointModelConfig):
        built, processor = build_start(job, None)
        return PlannedModel(_on_meta(built.config), processor, "random weights")
    reference, note = job.model.reference, None
    shape = hub_shape(reference)
    if shape is not None and not Path(reference).exists() and not in_hub_cache(reference):
        config, processor, stand_in = _known(shape)
        pinned = reference
        note = (
            f"{reference} is not on this host: its sizes are known, but text tokens are counted with the tokenizer of"
            f" {stand_in}, which writes more tokens per word."
        )
    else:
        start = resolve_start(job, job.tracking.uri)
        assert start is not None, "the model is a checkpoint"
        config, processor, pinned = config_of(start.path), load_processor(start.path), start.pinned
    if job.connector is not None:
        config.connector = job.connector.model_dump(mode="json")
    model = _on_meta(config)
    if job.new_words is not None and note is None:
        add_words(model, processor, job.new_words)
    return PlannedModel(model, processor, pinned, note)


def _on_meta(config: ElasticConfig) -> ElasticVLM:
    with torch.device("meta"):
        return empty_vlm(config)


def _known(shape: BackboneShape) -> tuple[ElasticConfig, ElasticProcessor, str]:
    """Returns configuration and processor with the sizes of a known model, and the model whose tokenizer they use."""
    is_llava = shape.class_tokens > 0
    stand_in = "mini_llava" if is_llava else "mini_base"
    processor = load_processor(resolve_checkpoint(stand_in).path)
    square = {"height": shape.image_size, "width": shape.image_size}
    if is_llava:
        processor.image_processor.crop_size = square
        processor.image_processor.size = {"shortest_edge": shape.image_size}
        processor.patch_size = shape.patch_size  # type: ignore[attr-defined]
    else:
        processor.image_processor.size = square
        processor.image_processor.image_seq_length = shape.num_patches
        processor.image_seq_length = shape.num_patches  # type: ignore[attr-defined]
    vision = {
        "model_type": "clip_vision_model" if is_llava else "siglip_vision_model",
        "hidden_size": shape.vision_width,
        "intermediate_size": shape.vision_mlp_width,
        "num_hidden_layers": shape.vision_layers,
        "num_attention_heads": shape.vision_heads,
        "image_size": shape.image_size,
        "patch_size": shape.patch_size,
    }
    text = {"model_type": "llama" if is_llava else "gemma2", **shape.decoder_sizes}
    image_token = shape.vocab_size - 1
    if is_llava:
        text["max_position_embeddings"] = 4096
        llava = ElasticLlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=image_token,
            vision_feature_layer=-1 - shape.unused_vision_layers,
        )
        return llava, processor, stand_in
    paligemma = ElasticPaliGemmaConfig(
        vision_config=vision | {"vision_use_head": False},
        text_config=text,
        projection_dim=shape.text_width,
        hidden_size=shape.text_width,
        vocab_size=shape.vocab_size,
        image_token_index=image_token,
    )
    return paligemma, processor, stand_in
