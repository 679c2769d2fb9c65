"""Attention for training: outputs and gradients agree with torch's fused attention."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from parcelray.models import training_attention
from parcelray.models.training_attention import attention

QUERIES, KEYS, WIDTH = 20, 20, 8
HIDDEN = torch.finfo(torch.float32).min


def masks() -> dict[str, Tensor | None]:
    """Additive masks over 3 prompts of 20 tokens; the second prompt has 4 tokens of left padding."""
    rows, columns = torch.arange(QUERIES)[:, None], torch.arange(KEYS)[None]
    causal = columns <= rows
    valid_B1N = torch.ones(3, 1, KEYS, dtype=torch.bool)
    valid_B1N[1, :, :4] = False
    allowed = {
        "causal": causal[None],
        "sliding window": (causal & (rows - columns < 5))[None],
        "prefix and padding": (causal | ((rows < 9) & (columns < 9)))[None] & valid_B1N,
    }
    return {"none": None} | {name: torch.where(each, 0.0, HIDDEN)[:, None] for name, each in allowed.items()}


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Attention in float32 from torch's own operations."""
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    repeats = q.shape[1] // k.shape[1]
    k, v = (each.repeat_interleave(repeats, dim=1) for each in (k, v))
    logits = softcap * torch.tanh(q @ k.transpose(2, 3) * scale / softcap)
    return (logits if mask is None else logits + mask).softmax(-1) @ v


@pytest.mark.parametrize("mask_name", ["none", "causal", "sliding window", "prefix and padding"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.04)])
def test_outputs_and_gradients_agree_with_torch(
    mask_name: str,
    groups: int,
    softcap: float | None,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Largest error relative to the largest value; the prompts are in two chunks."""
    monkeypatch.setattr(training_attention, "_CHUNK_BYTES", 2 * 4 * QUERIES * KEYS * dtype.itemsize)
    generator = torch.Generator().manual_seed(0)
    mask = masks()[mask_name]
    q, k, v = (
        torch.randn(3, length, heads, WIDTH, generator=generator).to(dtype).float().transpose(1, 2).requires_grad_()
        for heads, length in ((4, QUERIES), (groups, KEYS), (groups, KEYS))
    )
    grad = torch.randn(3, 4, QUERIES, WIDTH, generator=generator).to(dtype).float()
    if mask_name == "prefix and padding":
        grad[1, :, :4] = 0  # nothing reads the padding's rows
    expected = reference(q, k, v, mask, 0.4, softcap)
    expected_grads = torch.autograd.grad(expected, (q, k, v), grad)
    actual = attention(q.to(dtype), k.to(dtype), v.to(dtype), mask, scale=0.4, softcap=softcap)
    actual_grads = torch.autograd.grad(actual, (q, k, v), grad.to(dtype))
    rows = grad.abs().sum(-1, keepdim=True) > 0
    for name, a, b in zip("oqkv", (actual * rows, *actual_grads), (expected * rows, *expected_grads), strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max(), name
