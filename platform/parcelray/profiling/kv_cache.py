"""How many bytes the language model keeps for the tokens it has read."""

from parcelray.profiling.backbone_shapes import BackboneShape

BYTES_PER_MB = 1024**2
"""The paper's MB (arXiv 2605.30126, Appendix C)."""


def kv_cache_bytes(shape: BackboneShape, num_tokens: int, bytes_per_value: int = 2) -> int:
    """Bytes of the key-value cache: a key and a value per token, layer and key-value head (arXiv 2605.30126, Appendix C).

    Args:
        shape: the backbone.
        num_tokens: visual and text tokens together.
        bytes_per_value: 2 for bf16, 4 for float32.
    """
    return num_tokens * 2 * bytes_per_value * shape.text_layers * shape.num_kv_heads * shape.head_dim
