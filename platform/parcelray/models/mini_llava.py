"""Mini LLaVA: LLaVA-1.5 at a size that can be trained on a laptop, with its tokenizer and processor.

The vision tower is CLIP, SigLIP or ConvNeXt.
"""

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from parcelray.config.model import MiniLlavaModelConfig
from parcelray.models.backbones import ElasticLlavaConfig, ElasticLlavaForConditionalGeneration
from parcelray.models.backbones.llava_processor import ElasticLlavaProcessor
from parcelray.models.mini import attend_to_neighbours, build_tokenizer, grid_positions

_LOCATIONS = 1024
"""Number of location tokens for grounding, the same as those that PaliGemma's processor adds to its tokenizer."""
_STAGE_STRIDE = 2
"""Stride of each stage of a ConvNeXt after the first."""


def build(
    config: MiniLlavaModelConfig, corpus: Iterable[str], connector: dict[str, Any] | None, seed: int
) -> tuple[ElasticLlavaForConditionalGeneration, ElasticLlavaProcessor]:
    """Builds a model with seeded random weights, and its processor."""
    processor = build_processor(config, corpus)
    model_config = build_config(config, processor)
    model_config.connector = connector
    return build_model(model_config, seed), processor


def build_processor(config: MiniLlavaModelConfig, corpus: Iterable[str]) -> ElasticLlavaProcessor:
    """Builds the tokenizer and the image processor of the mini LLaVA."""
    size = {"height": config.image_size, "width": config.image_size}
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": config.image_size}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    tokenizer = build_tokenizer(corpus)
    tokenizer.add_tokens([f"<loc{number:04}>" for number in range(_LOCATIONS)])
    # Adds a start token before every text, as Llama's tokenizer does.
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )
    class_token = config.tower == "clip"
    return ElasticLlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.patch_size,
        vision_feature_select_strategy="default" if class_token else "full",
        num_additional_image_tokens=int(class_token),
    )


def build_config(config: MiniLlavaModelConfig, processor: ElasticLlavaProcessor) -> ElasticLlavaConfig:
    """Builds the transformers configuration of the mini LLaVA."""
    tokenizer: PreTrainedTokenizerFast = processor.tokenizer
    return ElasticLlavaConfig(
        vision_config=_vision_config(config),
        text_config={
            "model_type": "llama",
            "hidden_size": config.text_width,
            "intermediate_size": config.text_mlp_width,
            "num_hidden_layers": config.text_layers,
            "num_attention_heads": config.text_heads,
            "num_key_value_heads": config.text_kv_heads,
            "head_dim": config.text_head_dim,
            # A multiple of 64 keeps the output head's matrix product on aligned shapes.
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "max_position_embeddings": 8192,
            # Fan-in scale, as in the mini PaliGemma.
            "initializer_range": config.text_width**-0.5,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        image_token_index=processor.image_token_id,
        image_seq_length=processor.num_patches,
        # The whole tower is trained here, so the features are the output of its last layer.
        vision_feature_layer=-1,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _vision_config(config: MiniLlavaModelConfig) -> dict[str, Any]:
    if config.tower == "convnext":
        # Half of the stride is in the stem, half between the two stages.
        first = config.vision_layers // 2
        return {
            "model_type": "convnext",
            "image_size": config.image_size,
            "patch_size": config.patch_size // _STAGE_STRIDE,
            "num_stages": 2,
            "hidden_sizes": [config.vision_width // 2, config.vision_width],
            "depths": [first, config.vision_layers - first],
            "layer_norm_eps": 1e-6,
            # The default 1e-6 is meant for dozens of blocks; the few blocks here would start with no effect.
            "layer_scale_init_value": 0.1,
        }
    return {
        "model_type": "clip_vision_model" if config.tower == "clip" else "siglip_vision_model",
        "hidden_size": config.vision_width,
        "intermediate_size": config.vision_mlp_width,
        "num_hidden_layers": config.vision_layers,
        "num_attention_heads": config.vision_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
    } | ({} if config.tower == "clip" else {"vision_use_head": False})


def build_model(config: ElasticLlavaConfig, seed: int) -> ElasticLlavaForConditionalGeneration:
    """Builds a model with seeded random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ElasticLlavaForConditionalGeneration(config)
    if not config.convolutional:
        vision = model.model.vision_tower
        patches = config.grid_size**2
        with torch.no_grad():
            # The last rows: the first one belongs to the class token, if there is one.
            vision.embeddings.position_embedding.weight[-patches:] = grid_positions(
                config.grid_size, vision.embeddings.embed_dim
            )
            for index, layer in enumerate(vision.encoder.layers):
                attend_to_neighbours(layer.self_attn, index * layer.self_attn.num_heads)
    return model
