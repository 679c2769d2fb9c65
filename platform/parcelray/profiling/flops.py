"""The paper's cost model (arXiv 2605.30126, Appendix C): FLOPs of one prefill, term by term, in whole numbers.

One multiply-add counts as 2 FLOPs. As in the paper, normalisation, activation, softmax, biases, pooling, the patch
embedding (`patch_embedding_flops`) and the rotary positions are left out, and attention is counted in full, not halved
for the causal part. Search and evaluation take their cost axis from `cost`.

Symbols: T frames, B visual tokens a frame, N_v patches, N_p anchors, N_q queries, N_t text tokens, N_tot = T B + N_t;
D_v, M_v, L_v: width, MLP width and layers of the vision tower; D_l, M_l, L_l, H_q, H_kv, d_h, V: of the language model.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

from parcelray.config.connector import ConnectorConfig
from parcelray.errors import UserError
from parcelray.profiling.backbone_shapes import BackboneShape
from parcelray.profiling.connector_flops import connector_flops

IMAGE_TEXT_TOKENS = 128 + 1
"""N_t of an image prompt in the paper: 128 tokens of text and one separator."""
VIDEO_TEXT_TOKENS = 64 + 1
"""N_t of a prompt with several frames in the paper."""

BYTES_PER_MB = 1024**2
"""The paper's MB (arXiv 2605.30126, Appendix C)."""


class Workload(NamedTuple):
    """What one prefill reads."""

    num_visual_tokens: int
    """B, per image or frame."""
    num_frames: int
    """T."""
    num_text_tokens: int
    """N_t."""

    @property
    def num_tokens(self) -> int:
        """N_tot, the length of the decoder's input."""
        return self.num_frames * self.num_visual_tokens + self.num_text_tokens


@dataclass(frozen=True, slots=True)
class CostBreakdown:
    """FLOPs of one prefill of one sequence by term, and the bytes of its KV cache."""

    vision_projections: int
    """T L_v 8 N_v D_v^2: query, key, value and output projections of the vision tower."""
    vision_attention: int
    """T L_v 4 N_v^2 D_v."""
    vision_mlp: int
    """T L_v 4 N_v D_v M_v."""
    connector_self_attention: int
    """PARCEL: T (8 B D_v^2 + 4 B^2 D_v) where N_q > 0."""
    connector_cross_attention: int
    """PARCEL: T (4 (N_q + N_v) D_v^2 + 4 N_q N_v D_v) where N_q > 0."""
    connector_mlp: int
    """PARCEL: T 4 N_q D_v M_v."""
    projection: int
    """2 T B D_v D_l: to the language model's width; of LLaVA's second layer 2 T B D_l^2 more."""
    decoder_projections: int
    """L_l 4 N_tot D_l d_h (H_q + H_kv)."""
    decoder_attention: int
    """L_l 4 N_tot^2 H_q d_h."""
    decoder_mlp: int
    """L_l 6 N_tot D_l M_l: gate, up and down."""
    output_head: int
    """2 N_t D_l V: over the text prefix."""
    kv_cache_bytes: int
    """N_tot x 2 x 2 x L_l x H_kv x d_h: bf16. Not part of `total`."""

    @property
    def vision_encoder(self) -> int:
        """FLOPs of the vision tower."""
        return self.vision_projections + self.vision_attention + self.vision_mlp

    @property
    def connector(self) -> int:
        """FLOPs of the connector, without the projection."""
        return self.connector_self_attention + self.connector_cross_attention + self.connector_mlp

    @property
    def decoder(self) -> int:
        """FLOPs of the language model's layers."""
        return self.decoder_projections + self.decoder_attention + self.decoder_mlp

    @property
    def total(self) -> int:
        """FLOPs of the whole prefill."""
        return self.vision_encoder + self.connector + self.projection + self.decoder + self.output_head

    def terms(self) -> dict[str, int]:
        """The FLOP terms by name, in the order of the forward pass; they sum to `total`."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "kv_cache_bytes"}


def default_text_tokens(num_frames: int) -> int:
    """N_t where none is given: the paper's for one image, and the paper's for a video."""
    return IMAGE_TEXT_TOKENS if num_frames <= 1 else VIDEO_TEXT_TOKENS


def cost(
    shape: BackboneShape,
    connector: ConnectorConfig | None,
    num_visual_tokens: int,
    num_frames: int = 1,
    num_text_tokens: int | None = None,
) -> CostBreakdown:
    """FLOPs by term and KV-cache bytes of one prefill.

    Args:
        shape: the backbone.
        connector: its connector; None: tokens that come at no counted cost (a training-free reducer), at any budget.
        num_visual_tokens: the budget, per image or frame.
        num_frames: images or frames of the sequence; 0: none, the blind baseline.
        num_text_tokens: text tokens of the prompt; None: `default_text_tokens`.

    Raises:
        UnsupportedBudgetError: the connector cannot give `num_visual_tokens`.
        UserError: a negative number of frames or text tokens, or more visual tokens than patches.
    """
    text_tokens = default_text_tokens(num_frames) if num_text_tokens is None else num_text_tokens
    load = Workload(num_visual_tokens, num_frames, text_tokens)
    _check(load, shape)
    patches, width = shape.num_patches + shape.class_tokens, shape.vision_width
    vision = num_frames * shape.vision_layers
    attending = vision if shape.vision_heads else 0
    reduction = connector_flops(shape, connector, num_visual_tokens)
    num_tokens, layers = load.num_tokens, shape.text_layers
    return CostBreakdown(
        vision_projections=attending * 8 * patches * width**2,
        vision_attention=attending * 4 * patches**2 * width,
        vision_mlp=vision * 4 * patches * width * shape.vision_mlp_width,
        connector_self_attention=num_frames * reduction.self_attention,
        connector_cross_attention=num_frames * reduction.cross_attention,
        connector_mlp=num_frames * reduction.mlp,
        projection=2
        * num_frames
        * num_visual_tokens
        * (width + (shape.projector_layers - 1) * shape.text_width)
        * shape.text_width,
        decoder_projections=layers
        * 4
        * num_tokens
        * shape.text_width
        * shape.head_dim
        * (shape.num_heads + shape.num_kv_heads),
        decoder_attention=layers * 4 * num_tokens**2 * shape.num_heads * shape.head_dim,
        decoder_mlp=layers * 6 * num_tokens * shape.text_width * shape.text_mlp_width,
        output_head=2 * text_tokens * shape.text_width * shape.vocab_size,
        kv_cache_bytes=kv_cache_bytes(shape, num_tokens),
    )


def decoding_flops(shape: BackboneShape, num_prompt_tokens: int, num_new_tokens: int) -> int:
    """FLOPs of the tokens of an answer after the first, which the prefill gives: each is one step that attends to everything before it.

    Args:
        shape: the backbone.
        num_prompt_tokens: length of the decoder's input, N_tot.
        num_new_tokens: tokens of the answer, its end included.
    """
    steps = max(0, num_new_tokens - 1)
    attended = steps * num_prompt_tokens + steps * (steps + 1) // 2
    step = shape.text_layers * (
        4 * shape.text_width * shape.head_dim * (shape.num_heads + shape.num_kv_heads)
        + 6 * shape.text_width * shape.text_mlp_width
    )
    return (
        steps * (step + 2 * shape.text_width * shape.vocab_size)
        + attended * shape.text_layers * 4 * shape.num_heads * shape.head_dim
    )


def patch_embedding_flops(shape: BackboneShape, num_frames: int = 1) -> int:
    """FLOPs of the convolution that embeds the patches, which the paper's model leaves out: T 2 N_v (channels patch^2) D_v."""
    return num_frames * 2 * shape.num_patches * shape.num_channels * shape.patch_size**2 * shape.vision_width


def _check(load: Workload, shape: BackboneShape) -> None:
    if load.num_frames < 0:
        raise UserError(
            f"{load.num_frames} frames cannot be read; give 1 for an image, the number of frames of a video, or 0 for a"
            " prompt without images."
        )
    if load.num_text_tokens < 0:
        raise UserError(f"{load.num_text_tokens} text tokens is below 0; give 0 or more.")
    if not 1 <= load.num_visual_tokens <= shape.num_patches:
        raise UserError(
            f"{load.num_visual_tokens} visual tokens per image is outside 1 to {shape.num_patches}, the patches of"
            f" {shape.name} at {shape.image_size} px."
        )


def kv_cache_bytes(shape: BackboneShape, num_tokens: int, bytes_per_value: int = 2) -> int:
    """Bytes of the key-value cache: a key and a value per token, layer and key-value head (arXiv 2605.30126, Appendix C).

    Args:
        shape: the backbone.
        num_tokens: visual and text tokens together.
        bytes_per_value: 2 for bf16, 4 for float32.
    """
    return num_tokens * 2 * bytes_per_value * shape.text_layers * shape.num_kv_heads * shape.head_dim
