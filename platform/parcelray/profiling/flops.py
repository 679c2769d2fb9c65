"""The paper's cost model (arXiv 2605.30126, Appendix C): exact FLOPs of one prefill, term by term.

One multiply-add counts as 2 FLOPs. As in the paper, normalisation, activation, softmax, biases, pooling, the patch
embedding (`patch_embedding_flops`) and rotary positions are not counted. Attention is counted in full and not halved
for the causal mask. Search and evaluation use `cost` for their cost axis.

Symbols: T frames, B visual tokens per frame, N_v patches, N_p anchors, N_q queries, N_t text tokens, N_tot = T B + N_t;
D_v, M_v, L_v: width, MLP width and layers of the vision tower; D_l, M_l, L_l, H_q, H_kv, d_h, V: of the language model.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

from parcelray.config.connector import ConnectorConfig
from parcelray.errors import UserError
from parcelray.profiling.backbone_shapes import BackboneShape
from parcelray.profiling.connector_flops import connector_flops, projected_tokens

IMAGE_TEXT_TOKENS = 128 + 1
"""N_t of an image prompt in the paper: 128 text tokens and one separator."""
VIDEO_TEXT_TOKENS = 64 + 1
"""N_t of a prompt with several frames in the paper: 64 text tokens and one separator."""

BYTES_PER_MB = 1024**2
"""Bytes of one MB in the paper (arXiv 2605.30126, Appendix C)."""


class Workload(NamedTuple):
    """Numbers of tokens and frames of one prefill."""

    num_visual_tokens: int
    """B, visual tokens per image or frame."""
    num_frames: int
    """T, number of images or frames."""
    num_text_tokens: int
    """N_t, number of text tokens."""

    @property
    def num_tokens(self) -> int:
        """N_tot, the length of the decoder's input in tokens."""
        return self.num_frames * self.num_visual_tokens + self.num_text_tokens


@dataclass(frozen=True, slots=True)
class CostBreakdown:
    """FLOPs of one prefill of one sequence by term, and the bytes of its KV cache."""

    vision_projections: int
    """T L_v 8 N_v D_v^2: query, key, value and output projections of the vision tower."""
    vision_attention: int
    """T L_v 4 N_v^2 D_v: attention scores and weighted values of the vision tower."""
    vision_mlp: int
    """T L_v 4 N_v D_v M_v: MLP of the vision tower."""
    connector_self_attention: int
    """PARCEL: T (8 B D_v^2 + 4 B^2 D_v) if N_q > 0."""
    connector_cross_attention: int
    """PARCEL: T (4 (N_q + N_v) D_v^2 + 4 N_q N_v D_v) if N_q > 0."""
    connector_mlp: int
    """PARCEL: T 4 N_q D_v M_v."""
    projection: int
    """2 T B D_v D_l: projection to the language model's width; LLaVA's second layer adds 2 T B D_l^2.

    With a connector after the projector (M3 on LLaVA), N_v tokens are projected instead of B.
    """
    decoder_projections: int
    """L_l 4 N_tot D_l d_h (H_q + H_kv): query, key, value and output projections of the language model."""
    decoder_attention: int
    """L_l 4 N_tot^2 H_q d_h: attention scores and weighted values of the language model."""
    decoder_mlp: int
    """L_l 6 N_tot D_l M_l: gate, up and down projections of the language model."""
    output_head: int
    """2 N_t D_l V: output head over the text tokens."""
    kv_cache_bytes: int
    """N_tot x 2 x 2 x L_l x H_kv x d_h: bytes of the KV cache in bf16. Not part of `total`."""

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
    """Returns the paper's number of text tokens N_t for one image or for a video."""
    return IMAGE_TEXT_TOKENS if num_frames <= 1 else VIDEO_TEXT_TOKENS


def cost(
    shape: BackboneShape,
    connector: ConnectorConfig | None,
    num_visual_tokens: int,
    num_frames: int = 1,
    num_text_tokens: int | None = None,
) -> CostBreakdown:
    """Computes the FLOPs by term and the KV-cache bytes of one prefill.

    Args:
        shape: dimensions of the backbone.
        connector: configuration of the connector; None: no connector cost, at any budget (for training-free reducers).
        num_visual_tokens: budget, visual tokens per image or frame.
        num_frames: number of images or frames; 0: the blind baseline.
        num_text_tokens: number of text tokens of the prompt; None: `default_text_tokens`.

    Raises:
        UnsupportedBudgetError: the connector does not support the budget.
        UserError: a number is negative, or the budget exceeds the number of patches.
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
        * projected_tokens(shape, connector, num_visual_tokens)
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
    """Computes the FLOPs of all tokens of an answer after the first one.

    The prefill produces the first token. Every other token is one step that attends to all tokens before it.

    Args:
        shape: dimensions of the backbone.
        num_prompt_tokens: length of the decoder's input in tokens, N_tot.
        num_new_tokens: number of tokens of the answer, including the end token.
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
    """Computes the FLOPs of the patch embedding, which the paper does not count: T 2 N_v (channels patch^2) D_v."""
    return num_frames * 2 * shape.num_patches * shape.num_channels * shape.patch_size**2 * shape.vision_width


def _check(load: Workload, shape: BackboneShape) -> None:
    if load.num_frames < 0:
        raise UserError(
            f"{load.num_frames} frames is below 0; give 1 for an image, the number of frames of a video, or 0 for a"
            " prompt without images."
        )
    if load.num_text_tokens < 0:
        raise UserError(f"{load.num_text_tokens} text tokens is below 0; give 0 or more.")
    if not 1 <= load.num_visual_tokens <= shape.num_patches:
        raise UserError(
            f"{load.num_visual_tokens} visual tokens per image is outside 1 to {shape.num_patches}, the number of"
            f" patches of {shape.name} at {shape.image_size} px."
        )


def kv_cache_bytes(shape: BackboneShape, num_tokens: int, bytes_per_value: int = 2) -> int:
    """Computes the size of the KV cache in bytes (arXiv 2605.30126, Appendix C).

    The cache has a key and a value per token, layer and key-value head.

    Args:
        shape: dimensions of the backbone.
        num_tokens: number of visual and text tokens together.
        bytes_per_value: 2 for bf16, 4 for float32.
    """
    return num_tokens * 2 * bytes_per_value * shape.text_layers * shape.num_kv_heads * shape.head_dim
