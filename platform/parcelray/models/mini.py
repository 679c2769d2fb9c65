"""Mini model: PaliGemma-2 at a size that can be trained on a laptop, with its tokenizer and processor."""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip.modeling_siglip import SiglipAttention

from parcelray.config.model import MiniModelConfig
from parcelray.models.backbones import ElasticPaliGemmaConfig, ElasticPaliGemmaForConditionalGeneration, ElasticVLM
from parcelray.models.backbones.paligemma_processor import ElasticPaliGemmaProcessor
from parcelray.models.backbones.processor_base import ElasticProcessor

_FREQUENCY_BASE = 10.0
"""Base of the geometric position frequencies, which fall from 1 radian per patch to about 1/100."""
_NEIGHBOURS = ((-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (1, 1), (-1, 1), (1, -1))
"""Offsets (down, right) in patches."""
_NEIGHBOUR_SHARPNESS = 3.0
"""Scale of the position part of queries and keys.

Without content, at least 0.97 of a head's attention is then at its neighbour.
"""
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<image>")
"""Special tokens in the order of PaliGemma's first ids, followed by the image token."""
# Splits into words, single digits and line ends. Digits are separate, so that numbers of any length are tokenized in
# the same way. The byte-level alphabet writes a space as U+0120 and a line end as U+010A.
_WORD_PATTERN = Regex("\u0120?[a-zA-Z]+|\u0120?[0-9]|\u010a|\u0120?[^a-zA-Z0-9\u0120\u010a]+|\u0120+")


def build_tokenizer(corpus: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Trains a byte-pair tokenizer that can encode any text (with a byte fallback).

    The processor adds the location and segment tokens, as in PaliGemma.

    Args:
        corpus: representative texts; the same texts in the same order give the same tokenizer.
        vocab_size: number of tokens without the location and segment tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    # With the leading space, a word is the same token at the start of a text and inside it. It is added by a
    # pre-tokenizer, because a normaliser would also add one before the location tokens.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
            pre_tokenizers.Split(_WORD_PATTERN, behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )


def build_processor(config: MiniModelConfig, corpus: Iterable[str]) -> ElasticPaliGemmaProcessor:
    """Builds the tokenizer and the image processor of the mini model."""
    size = {"height": config.image_size, "width": config.image_size}
    image_processor = SiglipImageProcessorPil(size=size)
    image_processor.image_seq_length = (config.image_size // config.patch_size) ** 2
    return ElasticPaliGemmaProcessor(image_processor=image_processor, tokenizer=build_tokenizer(corpus))


def build_config(config: MiniModelConfig, processor: ElasticPaliGemmaProcessor) -> ElasticPaliGemmaConfig:
    """Builds the transformers configuration of the mini model."""
    tokenizer = processor.tokenizer
    # A multiple of 64 keeps the output head's matrix product on aligned shapes.
    vocab_size = -(-len(tokenizer) // 64) * 64
    return ElasticPaliGemmaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": config.vision_width,
            "intermediate_size": config.vision_mlp_width,
            "num_hidden_layers": config.vision_layers,
            "num_attention_heads": config.vision_heads,
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "gemma2",
            "hidden_size": config.text_width,
            "intermediate_size": config.text_mlp_width,
            "num_hidden_layers": config.text_layers,
            "num_attention_heads": config.text_heads,
            "num_key_value_heads": config.text_kv_heads,
            "head_dim": config.text_head_dim,
            "query_pre_attn_scalar": config.text_head_dim,
            "vocab_size": vocab_size,
            "max_position_embeddings": 8192,
            # Fan-in scale. The default 0.02 suits a width of about 2,000. At width 96, every attention would start
            # uniform, and the embeddings would start at a fifth of what the post-norms add. Training from scratch would
            # then stay on a plateau for thousands of steps.
            "initializer_range": config.text_width**-0.5,
            # No soft-capping: SDPA does not support it, and at this size the logits stay small.
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        projection_dim=config.text_width,
        hidden_size=config.text_width,
        vocab_size=vocab_size,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def build_model(config: ElasticPaliGemmaConfig, seed: int) -> ElasticPaliGemmaForConditionalGeneration:
    """Builds a model with seeded random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ElasticPaliGemmaForConditionalGeneration(config)
    vision = model.model.vision_tower
    with torch.no_grad():
        vision.embeddings.position_embedding.weight.copy_(grid_positions(config.grid_size, vision.embeddings.embed_dim))
        for index, layer in enumerate(vision.encoder.layers):
            attend_to_neighbours(layer.self_attn, index * layer.self_attn.num_heads)
    return model


def grid_positions(grid_size: int, width: int) -> Tensor:
    """Returns two-dimensional sine-cosine positions [N, D] in row-major order.

    Half of the channels encode the row, half the column. These are the initial values of the learnt position
    embeddings. Random values would be a tenth of the patch content at this width. A model trained from scratch would
    then take long to learn where a patch is.
    """
    frequencies = _frequencies(width)
    angles = torch.arange(grid_size)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = axis.repeat_interleave(grid_size, dim=0), axis.repeat(grid_size, 1)
    return torch.nn.functional.pad(torch.cat([rows, columns], dim=1), (0, width - 4 * len(frequencies)))


def attend_to_neighbours(attention: SiglipAttention, first: int) -> None:
    """Initialises queries and keys so that each head attends to one of the eight neighbours of a patch.

    A rotation by w d takes (sin w p, cos w p) to (sin w (p + d), cos w (p + d)). A query that is rotated by the offset
    of a neighbour therefore matches the key there. The result resembles a convolution. From random attention, shapes
    that span several patches are learnt a few times more slowly.

    Args:
        attention: attention of a SigLIP or CLIP layer, changed in place.
        first: number of heads in the layers before; head i of the tower attends to neighbour i modulo 8.
    """
    width, quarter = attention.embed_dim, attention.embed_dim // 4
    frequencies = _frequencies(width)[: attention.head_dim // 4]
    for head in range(attention.num_heads):
        offsets = _NEIGHBOURS[(first + head) % len(_NEIGHBOURS)]
        query, key = torch.zeros(2, attention.head_dim, width)
        for index, frequency in enumerate(frequencies):
            for axis, offset in enumerate(offsets):
                row, sine = 4 * index + 2 * axis, 2 * axis * quarter + index
                cosine = sine + quarter
                key[row, sine] = key[row + 1, cosine] = 1.0
                query[row, sine] = query[row + 1, cosine] = torch.cos(frequency * offset)
                query[row, cosine], query[row + 1, sine] = torch.sin(frequency * offset), -torch.sin(frequency * offset)
        rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        attention.q_proj.weight[rows] = _NEIGHBOUR_SHARPNESS * query
        attention.k_proj.weight[rows] = _NEIGHBOUR_SHARPNESS * key


def _frequencies(width: int) -> Tensor:
    """Returns the frequencies of the position channels in radians per patch, [D / 4], in descending order."""
    quarter = width // 4
    return _FREQUENCY_BASE ** -(torch.arange(quarter) / quarter * 2)


def save_checkpoint(model: ElasticVLM, processor: ElasticProcessor, folder: Path) -> None:
    """Writes model (safetensors) and processor in the Hugging Face layout."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
