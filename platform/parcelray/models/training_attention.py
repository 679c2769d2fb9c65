"""Attention for training in bf16 on CPUs: separate matrix products on chunks in the cache, with a backward pass.

The backward pass of torch's fused CPU attention takes about half of a training step in bf16. Here the
probabilities of the forward pass are kept, in the data type of the products. Each chunk of prompts passes through all
operations while it is in the cache.

`training_kernels` switches it on for vision tower and decoder, through transformers' attention interface, and for the
connector, which calls `attention`. It is meant for training steps only. Everywhere else the fused kernels remain.

Shape suffixes: B prompts (or images), H query heads, G key-value heads, Q query positions, N key positions, E width of
a head. C marks a chunk of prompts.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "parcelray_training"
"""Name of this attention in transformers' attention interface."""
_CHUNK_BYTES = 2**20
"""Size of the attention logits of one chunk; the backward pass works on two such matrices in a cache of 2 MiB."""

_active = False


def has_bf16_products() -> bool:
    """Whether this CPU has matrix instructions for bf16 (AMX) that the environment does not forbid to oneDNN."""
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    return torch.cpu._is_amx_tile_supported() and (allowed in ("ALL", "DEFAULT") or "AMX" in allowed)


@contextmanager
def training_kernels(model: Any) -> Iterator[None]:
    """Uses this attention in vision tower, connector and decoder of an `ElasticVLM` while the context is open.

    The context covers forward passes; backward passes follow them. Attention that is not `sdpa` stays as it is, and so
    does a tower without attention.
    """
    global _active
    inner = model.model
    configs = [part.config for part in (inner.vision_tower, inner.language_model)]
    stock = [config._attn_implementation for config in configs]
    before, _active = _active, True
    try:
        for config, name in zip(configs, stock, strict=True):
            if name == "sdpa" or getattr(config, "attn_logit_softcapping", None) is not None:
                config._attn_implementation = NAME
        yield
    finally:
        _active = before
        for config, name in zip(configs, stock, strict=True):
            config._attn_implementation = name


def connector_attention(q_BHQE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor) -> Tensor:
    """Returns the attended values [B, H, Q, E]: by `attention` inside `training_kernels`, else by torch's kernel."""
    if _active:
        return attention(q_BHQE, k_BHNE, v_BHNE, scale=q_BHQE.shape[-1] ** -0.5)
    return F.scaled_dot_product_attention(q_BHQE, k_BHNE, v_BHNE)


def attention(
    q_BHQE: Tensor,
    k_BGNE: Tensor,
    v_BGNE: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Returns the attended values [B, H, Q, E], as a view of a contiguous [B, Q, H, E].

    Under autocast the products are computed in autocast's data type, as with torch's kernel.

    Args:
        q_BHQE: queries.
        k_BGNE: keys; G divides H, and consecutive query heads share a key-value head.
        v_BGNE: values.
        mask: added to the logits, [B or 1, H or 1, Q, N]; None: every query attends to every key.
        scale: factor on the products of queries and keys.
        softcap: bound c of the logits, which become c tanh(logits / c) before the mask; None: no bound.
    """
    device = q_BHQE.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q_BHQE.dtype
    with torch.autocast(device, enabled=False):
        mixed: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
            q_BHQE.to(dtype), k_BGNE.to(dtype), v_BGNE.to(dtype), mask, scale, softcap
        )
    return mixed


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BHQE: Tensor,
        k_BGNE: Tensor,
        v_BGNE: Tensor,
        mask: Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        batch, heads, num_queries, width = q_BHQE.shape
        groups, num_keys = k_BGNE.shape[1:3]
        rows = heads // groups * num_queries
        out_BHQE = _like_projection(q_BHQE)
        probabilities = q_BHQE.new_empty(batch, groups, rows, num_keys)
        for chunk in _chunks(probabilities):
            p = probabilities[chunk].flatten(0, 1)
            queries = _grouped(q_BHQE[chunk], groups) * scale
            torch.bmm(queries, _grouped(k_BGNE[chunk], groups).transpose(1, 2), out=p)
            if softcap is not None:
                p.div_(softcap).tanh_().mul_(softcap)
            if mask is not None:
                p.view(-1, heads, num_queries, num_keys).add_(_part(mask, chunk))
            torch.softmax(p, -1, out=p)
            mixed = torch.bmm(p, _grouped(v_BGNE[chunk], groups))
            out_BHQE[chunk] = mixed.view(-1, heads, num_queries, width)
        ctx.save_for_backward(q_BHQE, k_BGNE, v_BGNE, probabilities, out_BHQE)
        ctx.scale, ctx.softcap = scale, softcap
        return out_BHQE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHQE: Tensor) -> tuple[Tensor | None, ...]:
        q_BHQE, k_BGNE, v_BGNE, probabilities, out_BHQE = ctx.saved_tensors
        groups, softcap = k_BGNE.shape[1], ctx.softcap
        dq_BHQE, dk_BGNE, dv_BGNE = (_like_projection(each) for each in (q_BHQE, k_BGNE, v_BGNE))
        scratch = torch.empty_like(probabilities[next(_chunks(probabilities))].flatten(0, 1))
        for chunk in _chunks(probabilities):
            p = probabilities[chunk].flatten(0, 1)
            grad = _grouped(grad_BHQE[chunk], groups)
            queries, keys = _grouped(q_BHQE[chunk], groups) * ctx.scale, _grouped(k_BGNE[chunk], groups)
            dv_BGNE[chunk] = torch.bmm(p.transpose(1, 2), grad).view_as(dv_BGNE[chunk])
            # Gradient of the logits: P * (dP - rowsum(P * dP)), where the row sum is that of out * grad.
            dp = torch.bmm(grad, _grouped(v_BGNE[chunk], groups).transpose(1, 2), out=scratch[: len(p)])
            dp.sub_((grad * _grouped(out_BHQE[chunk], groups)).sum(-1, keepdim=True)).mul_(p)
            if softcap is not None:
                capped = torch.bmm(queries, keys.transpose(1, 2)).div_(softcap).tanh_()
                dp.mul_(1 - capped * capped)
            dq_BHQE[chunk] = torch.bmm(dp, keys).mul_(ctx.scale).view_as(dq_BHQE[chunk])
            dk_BGNE[chunk] = torch.bmm(dp.transpose(1, 2), queries).view_as(dk_BGNE[chunk])
        return dq_BHQE, dk_BGNE, dv_BGNE, None, None, None


def _chunks(probabilities: Tensor) -> Iterator[slice]:
    """Slices of prompts whose logits take about `_CHUNK_BYTES`."""
    batch = len(probabilities)
    size = max(1, _CHUNK_BYTES * batch // max(1, probabilities.nbytes))
    return (slice(start, min(start + size, batch)) for start in range(0, batch, size))


def _grouped(x_CHQE: Tensor, groups: int) -> Tensor:
    """[C, H, Q, E] as [C G, H / G Q, E], if possible without a copy: query heads of one key-value head become rows."""
    chunk, heads, length, width = x_CHQE.shape
    return x_CHQE.reshape(chunk * groups, heads // groups * length, width)


def _like_projection(x_BHQE: Tensor) -> Tensor:
    """Empty [B, H, Q, E] whose memory is a contiguous [B, Q, H, E], which projections read and write without a copy."""
    batch, heads, length, width = x_BHQE.shape
    return x_BHQE.new_empty(batch, length, heads, width).transpose(1, 2)


def _part(mask: Tensor, chunk: slice) -> Tensor:
    return mask[chunk] if len(mask) > 1 else mask


def _transformers_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`attention` with the signature of transformers' attention interface; returns [B, Q, H, E].

    Dropout of the probabilities is not supported; no supported backbone has it.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mixed = attention(query, key, value, attention_mask, scale=scale, softcap=softcap)
    return mixed.transpose(1, 2), None


def _transformers_mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor | None:
    """Additive mask [B, 1, Q, N], made once per forward pass in the data type of the products."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    mask: Tensor | None = eager_mask(*args, dtype=dtype, **kwargs)
    return mask


AttentionInterface.register(NAME, _transformers_attention)
AttentionMaskInterface.register(NAME, _transformers_mask)
