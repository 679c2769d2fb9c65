"""The decoder over a pool of KV blocks: prefill of different prompts and budgets, and shared decode steps.

The pool is the memory limit of an engine (`engine.kv_tokens`): it is allocated once, requests of any length share it
block by block, and none can exceed what it reserved.

transformers' own continuous batching (5.23, `generation/continuous_batching`) is not used. Its requests are lists of
token ids, without a way to pass visual tokens. Its masks are causal, whereas PaliGemma attends to its prompt in both
directions. Its thread supports neither budgets nor a bounded queue. The layers, rotary positions and attention are
those of transformers. In addition, requests can join and leave between two steps, which `generate` does not support.

Shapes: B requests, S tokens of the longest prompt, L width, V vocabulary, K visual tokens of a prompt, M blocks,
T tokens per block, H key-value heads, E head width, R rows written at once.
"""

import math
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from parcelray.models.backbones import ElasticVLM
from parcelray.models.positions import image_position_ids

BLOCK_TOKENS = 16
"""Tokens per block of the KV pool."""
_SCRATCH = 0
"""A block that no request owns; it pads the block tables."""


class KVPool:
    """Keys and values of all requests in flight, in blocks of `BLOCK_TOKENS` tokens.

    Args:
        num_layers: layers of the decoder.
        num_heads: key-value heads of a layer.
        head_width: width of a head.
        max_tokens: tokens that all requests together may hold; rounded down to whole blocks.
        spare_tokens: additional tokens for urgent requests; rounded up to whole blocks.
        dtype: data type of the model.
        device: device of the model.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_heads: int,
        head_width: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        spare_tokens: int = 0,
    ) -> None:
        self.spare_blocks = self.blocks_for(spare_tokens)
        self.num_blocks = max_tokens // BLOCK_TOKENS + self.spare_blocks
        shape = (self.num_blocks + 1, BLOCK_TOKENS, num_heads, head_width)
        # Zeros, not uninitialised memory: masked positions are multiplied by 0, and 0 times NaN is NaN.
        self._keys_MTHE = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self._values_MTHE = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self._free = list(range(self.num_blocks, _SCRATCH, -1))

    @property
    def free_blocks(self) -> int:
        """Number of blocks that no request owns."""
        return len(self._free)

    @property
    def used_tokens(self) -> int:
        """Number of reserved tokens."""
        return (self.num_blocks - len(self._free)) * BLOCK_TOKENS

    @property
    def total_tokens(self) -> int:
        """Number of tokens that can be reserved, without the spare ones."""
        return (self.num_blocks - self.spare_blocks) * BLOCK_TOKENS

    def blocks_for(self, num_tokens: int) -> int:
        """Returns the number of blocks that hold `num_tokens` tokens."""
        return math.ceil(num_tokens / BLOCK_TOKENS)

    def reserve(self, num_tokens: int) -> list[int]:
        """Reserves blocks for a request of at most `num_tokens` tokens; the caller has checked `free_blocks`."""
        count = self.blocks_for(num_tokens)
        assert count <= len(self._free), "reserved more blocks than are free"
        return [self._free.pop() for _ in range(count)]

    def release(self, blocks: list[int]) -> None:
        """Returns blocks to the pool."""
        self._free += blocks

    def write(self, layer: int, slots_R: Tensor, keys_RHE: Tensor, values_RHE: Tensor) -> None:
        """Stores rows at slots (block x T + position in the block)."""
        self._keys_MTHE[layer].flatten(0, 1).index_copy_(0, slots_R, keys_RHE)
        self._values_MTHE[layer].flatten(0, 1).index_copy_(0, slots_R, values_RHE)

    def read(self, layer: int, tables_BM: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values [B, H, S, E] of requests, S the tokens of the longest block table."""
        batch = tables_BM.shape[0]
        flat = tables_BM.flatten()
        keys, values = (
            pool[layer].index_select(0, flat).view(batch, -1, *pool[layer].shape[2:]).transpose(1, 2)
            for pool in (self._keys_MTHE, self._values_MTHE)
        )
        return keys, values


def table_of(blocks: list[list[int]], num_tokens: int, device: torch.device) -> Tensor:
    """Returns the block tables [B, M] of requests for `num_tokens` tokens, padded with the scratch block."""
    width = math.ceil(num_tokens / BLOCK_TOKENS)
    return torch.tensor([(row + [_SCRATCH] * width)[:width] for row in blocks], device=device)


def slots_of(blocks: list[int], start: int, end: int) -> list[int]:
    """Returns the slots of a request's tokens from position `start` to before `end`."""
    return [blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS for position in range(start, end)]


@dataclass(frozen=True)
class Prompt:
    """The input of one request's prefill."""

    token_ids: tuple[int, ...]
    """Text tokens, without image placeholders."""
    visual_offset: int
    """Number of text tokens before the visual tokens."""
    visual_KL: Tensor | None
    """Projected visual tokens of all its images; None: a prompt without images."""
    num_visual_tokens: int
    """Visual tokens per image."""
    blocks: list[int]
    """Blocks of the KV pool that the request owns."""

    @property
    def length(self) -> int:
        """Number of tokens that enter the decoder."""
        return len(self.token_ids) + (0 if self.visual_KL is None else self.visual_KL.shape[0])


@dataclass
class _PrefillCache:
    """Replaces a transformers `Cache` during prefill: stores keys and values; each prompt attends to itself only."""

    pool: KVPool
    slots_R: Tensor
    valid_BS: Tensor

    def update(self, keys_BHSE: Tensor, values_BHSE: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        self.pool.write(
            layer_idx,
            self.slots_R,
            keys_BHSE.transpose(1, 2)[self.valid_BS],
            values_BHSE.transpose(1, 2)[self.valid_BS],
        )
        return keys_BHSE, values_BHSE


@dataclass
class _DecodeCache:
    """Replaces a transformers `Cache` in a decode step: each new token attends to all of its request's tokens."""

    pool: KVPool
    slots_B: Tensor
    tables_BM: Tensor

    def update(self, keys_BH1E: Tensor, values_BH1E: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        self.pool.write(layer_idx, self.slots_B, keys_BH1E.squeeze(2), values_BH1E.squeeze(2))
        return self.pool.read(layer_idx, self.tables_BM)


class PooledDecoder:
    """Runs a model's decoder with its keys and values in a `KVPool`.

    Args:
        model: model in evaluation mode.
        max_tokens: size of the KV pool, tokens.
        spare_tokens: additional tokens for urgent requests.
    """

    def __init__(self, model: ElasticVLM, *, max_tokens: int, spare_tokens: int = 0) -> None:
        self._model = model
        self._text = model.model.language_model
        self._layers = list(self._text.layers)
        config = model.config.text_config
        self._window = getattr(config, "sliding_window", None)
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._sliding = [getattr(layer.self_attn, "sliding_window", None) is not None for layer in self._layers]
        self.device = model.lm_head.weight.device
        self._dtype = model.dtype
        self.max_positions = int(config.max_position_embeddings)
        self._num_patches = int(model.config.grid_size) ** 2
        self.positions_per_image = self._num_patches if model.has_image_positions else None
        heads = int(config.num_attention_heads)
        self.pool = KVPool(
            num_layers=len(self._layers),
            num_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_width=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            max_tokens=max_tokens,
            spare_tokens=spare_tokens,
            dtype=self._dtype,
            device=self.device,
        )

    def prefill(self, prompts: list[Prompt]) -> tuple[Tensor, list[int]]:
        """Processes whole prompts.

        Returns:
            The logits [B, V] of the first token after each prompt, and the rotary position of that token.
        """
        lengths = torch.tensor([prompt.length for prompt in prompts], device=self.device)
        order_S = torch.arange(int(lengths.max()), device=self.device)
        valid_BS = order_S[None] < lengths[:, None]
        slots = [slots_of(prompt.blocks, 0, prompt.length) for prompt in prompts]
        cache = _PrefillCache(self.pool, torch.tensor(list(chain.from_iterable(slots)), device=self.device), valid_BS)
        allowed_BSS = valid_BS[:, None].expand(-1, len(order_S), -1)
        if not self._model.reads_both_ways:
            allowed_BSS = allowed_BSS & (order_S[None] <= order_S[:, None])
        order_BS = order_S.expand(len(prompts), -1)
        positions_BS = torch.cat([self._positions(prompt, len(order_S)) for prompt in prompts])
        # Where the prompt is attended to in both directions, layers with a window see all of it, as in transformers.
        window = None if self._model.reads_both_ways else self._window
        hidden_BSL = self._run(
            self._embed(prompts, len(order_S)),
            positions_BS.to(self.device),
            allowed_BSS,
            order_BS,
            order_BS,
            cache,
            window,
        )
        following = [
            int(positions_S[prompt.length - 1]) + 1 for prompt, positions_S in zip(prompts, positions_BS, strict=True)
        ]
        return self._logits(hidden_BSL[torch.arange(len(prompts), device=self.device), lengths - 1]), following

    def decode(self, token_ids: list[int], positions: list[int], lengths: list[int], blocks: list[list[int]]) -> Tensor:
        """Processes one more token of each request and returns the logits [B, V] of the next.

        Args:
            token_ids: the token that each request has just generated.
            positions: rotary position of this token in each request.
            lengths: number of tokens of each request that are already in the pool.
            blocks: blocks of each request.
        """
        longest = max(lengths) + 1
        tables_BM = table_of(blocks, longest, self.device)
        order_B = torch.tensor(lengths, device=self.device)
        slots_B = (
            tables_BM.gather(1, (order_B // BLOCK_TOKENS)[:, None]).squeeze(1) * BLOCK_TOKENS + order_B % BLOCK_TOKENS
        )
        order_S = torch.arange(tables_BM.shape[1] * BLOCK_TOKENS, device=self.device)
        allowed_B1S = (order_S[None] <= order_B[:, None])[:, None]
        hidden_B1L = self._model.get_input_embeddings()(torch.tensor(token_ids, device=self.device)[:, None])
        cache = _DecodeCache(self.pool, slots_B, tables_BM)
        return self._logits(
            self._run(
                hidden_B1L,
                torch.tensor(positions, device=self.device)[:, None],
                allowed_B1S,
                order_B[:, None],
                order_S.expand(len(lengths), -1),
                cache,
                self._window,
            )[:, 0]
        )

    def _positions(self, prompt: Prompt, longest: int) -> Tensor:
        """Returns the rotary positions [1, S] of a prompt with padding at its end, on the CPU."""
        order_1S = torch.arange(longest)[None]
        visual_end = prompt.visual_offset + prompt.length - len(prompt.token_ids)
        is_visual_1S = (prompt.visual_offset <= order_1S) & (order_1S < visual_end)
        places_K = self._model.token_places(prompt.num_visual_tokens) if prompt.num_visual_tokens else ()
        return image_position_ids(order_1S, is_visual_1S, places_K, self._num_patches)

    def _embed(self, prompts: list[Prompt], longest: int) -> Tensor:
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            at, extra = prompt.visual_offset, prompt.length - len(prompt.token_ids)
            ids[row, :at] = torch.tensor(prompt.token_ids[:at], dtype=torch.int64)
            ids[row, at + extra : prompt.length] = torch.tensor(prompt.token_ids[at:], dtype=torch.int64)
        hidden_BSL: Tensor = self._model.get_input_embeddings()(ids.to(self.device))
        for row, prompt in enumerate(prompts):
            if prompt.visual_KL is not None:
                hidden_BSL[row, prompt.visual_offset : prompt.visual_offset + len(prompt.visual_KL)] = (
                    prompt.visual_KL.to(hidden_BSL.dtype)
                )
        return hidden_BSL

    def _run(
        self,
        hidden: Tensor,
        positions_BQ: Tensor,
        allowed_BQS: Tensor,
        query_order_BQ: Tensor,
        key_order_BS: Tensor,
        cache: _PrefillCache | _DecodeCache,
        window: int | None,
    ) -> Tensor:
        """Returns the hidden states after all layers.

        Rotary positions count from 0. A window applies to the order of the tokens in each request's prompt and answer,
        as in transformers, not to their rotary positions.
        """
        position_ids_BQ = positions_BQ + self._model.first_position
        rotary = self._text.rotary_emb(hidden, position_ids_BQ)
        masks = [self._additive(allowed_BQS)] * 2
        if window is not None and key_order_BS.shape[1] > window:
            near_BQS = query_order_BQ[:, :, None] - key_order_BS[:, None] < window
            masks[1] = self._additive(allowed_BQS & near_BQS)
        for layer, sliding in zip(self._layers, self._sliding, strict=True):
            hidden = layer(
                hidden,
                attention_mask=masks[sliding],
                position_embeddings=rotary,
                position_ids=position_ids_BQ,
                past_key_values=cache,
                use_cache=True,
            )
        normed: Tensor = self._text.norm(hidden)
        return normed

    def _additive(self, allowed_BQS: Tensor) -> Tensor:
        """Returns an additive mask: 0 where attention is allowed, else the smallest number.

        Soft-capped (eager) attention does not accept boolean masks.
        """
        mask = torch.zeros(allowed_BQS.shape, dtype=self._dtype, device=self.device)
        return mask.masked_fill_(~allowed_BQS, torch.finfo(self._dtype).min)[:, None]

    def _logits(self, hidden_BL: Tensor) -> Tensor:
        logits_BV: Tensor = self._model.lm_head(hidden_BL).float()
        return logits_BV if self._softcap is None else torch.tanh(logits_BV / self._softcap) * self._softcap
