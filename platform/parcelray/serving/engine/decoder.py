"""The decoder over the pool of KV blocks: prefill of prompts of different lengths and budgets, and decode steps that they share.

transformers' own continuous batching (5.23, `generation/continuous_batching`) is not used: its requests are lists of
token ids, with no way in for visual tokens; its masks are causal, where PaliGemma reads its prompt in both directions;
and its thread knows neither budgets nor a bounded queue. What is taken from transformers is the model itself: layers,
rotary positions, attention. `generate` with a batch cannot let a request join or leave between two steps, which is all
that is added here.

Shapes: B requests, S tokens of the longest prompt, L width, V vocabulary, K visual tokens of a prompt, M blocks.
"""

from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from parcelray.models.backbones import ElasticVLM
from parcelray.serving.engine.kv_pool import BLOCK_TOKENS, KVPool, slots_of, table_of


@dataclass(frozen=True)
class Prompt:
    """What one request's prefill reads."""

    token_ids: tuple[int, ...]
    """Text, without placeholders."""
    visual_offset: int
    visual_KL: Tensor | None
    """Projected visual tokens of all its images; None: a prompt without images."""
    blocks: list[int]
    """Its part of the pool."""

    @property
    def length(self) -> int:
        """Tokens that enter the decoder."""
        return len(self.token_ids) + (0 if self.visual_KL is None else self.visual_KL.shape[0])


@dataclass
class _PrefillCache:
    """Stands where the layers expect a transformers `Cache`: keeps the prompts' keys and values, and attends to no others."""

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
    """The same for one more token of each request, which attends to all that its request has in the pool."""

    pool: KVPool
    slots_B: Tensor
    tables_BM: Tensor

    def update(self, keys_BH1E: Tensor, values_BH1E: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        self.pool.write(layer_idx, self.slots_B, keys_BH1E.squeeze(2), values_BH1E.squeeze(2))
        return self.pool.read(layer_idx, self.tables_BM)


class PooledDecoder:
    """Runs a model's decoder over pooled memory.

    Args:
        model: in evaluation mode.
        max_tokens: of the KV pool.
        spare_tokens: of it, for requests that must not wait.
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

    def prefill(self, prompts: list[Prompt]) -> Tensor:
        """Logits [B, V] of the first token after each prompt."""
        lengths = torch.tensor([prompt.length for prompt in prompts], device=self.device)
        order_S = torch.arange(int(lengths.max()), device=self.device)
        valid_BS = order_S[None] < lengths[:, None]
        slots = [slots_of(prompt.blocks, 0, prompt.length) for prompt in prompts]
        cache = _PrefillCache(self.pool, torch.tensor(list(chain.from_iterable(slots)), device=self.device), valid_BS)
        allowed_BSS = valid_BS[:, None].expand(-1, len(order_S), -1)
        if not self._model.reads_both_ways:
            allowed_BSS = allowed_BSS & (order_S[None] <= order_S[:, None])
        places_BS = order_S.expand(len(prompts), -1)
        # A prompt that is read in both directions is seen as a whole also by layers with a window, as transformers has
        # it.
        window = None if self._model.reads_both_ways else self._window
        hidden_BSL = self._run(self._embed(prompts, len(order_S)), allowed_BSS, places_BS, places_BS, cache, window)
        return self._logits(hidden_BSL[torch.arange(len(prompts), device=self.device), lengths - 1])

    def decode(self, token_ids: list[int], lengths: list[int], blocks: list[list[int]]) -> Tensor:
        """Logits [B, V] after one more token of each request.

        Args:
            token_ids: the token that each request has just made.
            lengths: tokens of each that are in the pool already.
            blocks: of each request.
        """
        longest = max(lengths) + 1
        tables_BM = table_of(blocks, longest, self.device)
        places_B = torch.tensor(lengths, device=self.device)
        slots_B = (
            tables_BM.gather(1, (places_B // BLOCK_TOKENS)[:, None]).squeeze(1) * BLOCK_TOKENS + places_B % BLOCK_TOKENS
        )
        order_S = torch.arange(tables_BM.shape[1] * BLOCK_TOKENS, device=self.device)
        allowed_B1S = (order_S[None] <= places_B[:, None])[:, None]
        hidden_B1L = self._model.get_input_embeddings()(torch.tensor(token_ids, device=self.device)[:, None])
        cache = _DecodeCache(self.pool, slots_B, tables_BM)
        return self._logits(
            self._run(
                hidden_B1L, allowed_B1S, places_B[:, None], order_S.expand(len(lengths), -1), cache, self._window
            )[:, 0]
        )

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
        allowed_BQS: Tensor,
        rows_BQ: Tensor,
        columns_BS: Tensor,
        cache: _PrefillCache | _DecodeCache,
        window: int | None,
    ) -> Tensor:
        """Hidden states after all layers; `rows` and `columns` are places in the prompt, of queries and of keys."""
        positions_BQ = rows_BQ + self._model.first_position
        rotary = self._text.rotary_emb(hidden, positions_BQ)
        masks = [self._additive(allowed_BQS)] * 2
        if window is not None and columns_BS.shape[1] > window:
            masks[1] = self._additive(allowed_BQS & (rows_BQ[:, :, None] - columns_BS[:, None] < window))
        for layer, sliding in zip(self._layers, self._sliding, strict=True):
            hidden = layer(
                hidden,
                attention_mask=masks[sliding],
                position_embeddings=rotary,
                position_ids=positions_BQ,
                past_key_values=cache,
                use_cache=True,
            )
        normed: Tensor = self._text.norm(hidden)
        return normed

    def _additive(self, allowed_BQS: Tensor) -> Tensor:
        """Zero where attention is allowed, else the smallest number: soft-capped (eager) attention takes no Booleans."""
        mask = torch.zeros(allowed_BQS.shape, dtype=self._dtype, device=self.device)
        return mask.masked_fill_(~allowed_BQS, torch.finfo(self._dtype).min)[:, None]

    def _logits(self, hidden_BL: Tensor) -> Tensor:
        logits_BV: Tensor = self._model.lm_head(hidden_BL).float()
        return logits_BV if self._softcap is None else torch.tanh(logits_BV / self._softcap) * self._softcap
