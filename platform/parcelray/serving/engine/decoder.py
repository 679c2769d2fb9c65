"""The decoder over a pool of KV blocks: prefill of different prompts and budgets, and shared decode steps.

transformers' own continuous batching (5.23, `generation/continuous_batching`) is not used. Its requests are lists of
token ids, without a way to pass visual tokens. Its masks are causal, whereas PaliGemma attends to its prompt in both
directions. Its thread supports neither budgets nor a bounded queue. The layers, rotary positions and attention are
those of transformers. In addition, requests can join and leave between two steps, which `generate` does not support.

Prompts whose visual tokens are reduced inside the decoder, or have positions or an attention of their own, are
prefilled by the `ReducedDecoder` of evaluation.

Shapes: B requests, S tokens of the longest prompt, L width, V vocabulary, K visual tokens of a prompt, H key-value
heads, E head width; Y, M, T and R as in `kv_pool`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from parcelray.models.backbones import ElasticVLM
from parcelray.models.decoder_attention import AttentionMasks, Keys, LayerMasks
from parcelray.models.model_reducer import ModelReducer
from parcelray.models.positions import image_position_ids
from parcelray.models.reduced_decoder import VisualTokens, pack_prompts
from parcelray.models.token_reduction.base import TokenReducer
from parcelray.models.token_reduction.in_decoder import InDecoderReducer, tokens_by_layer
from parcelray.serving.engine.kv_pool import BLOCK_TOKENS, Blocks, KVPool, slots_of, tables_of


class PatchIds(NamedTuple):
    """The patches that the visual tokens of a prompt come from, for `ReducedDecoder`."""

    position_ids_K: Tensor
    """Position of each token in the patch grids of the prompt's images, counted on from image to image, int64."""
    sizes_K: Tensor
    """Number of patches in each token, int64."""


@dataclass
class Span:
    """The tokens of one request in consecutive layers of the decoder."""

    layers: range
    length: int
    """Number of tokens in each of these layers."""
    position: int
    """Rotary position of the next token, counted from 0; more than `length` if images have more places than tokens."""
    keys: Keys | None = None
    """Positions and sizes of the S tokens of the prompt, with B = 1, if the attention depends on them."""


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
    blocks: Blocks
    """Blocks of the KV pool that the request owns."""
    patches: PatchIds | None = None
    """Patches of the visual tokens of a prompt for the reducer's decoder; None: a prompt for the stock decoder."""

    @property
    def length(self) -> int:
        """Number of tokens that enter the decoder."""
        return len(self.token_ids) + (0 if self.visual_KL is None else self.visual_KL.shape[0])


@dataclass
class _PrefillCache:
    """Replaces a transformers `Cache` during prefill: stores keys and values; each prompt attends to itself only."""

    pool: KVPool
    slots_YR: Tensor
    valid_BS: Tensor

    def update(self, keys_BHSE: Tensor, values_BHSE: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        self.pool.write(
            self.slots_YR[layer_idx],
            keys_BHSE.transpose(1, 2)[self.valid_BS],
            values_BHSE.transpose(1, 2)[self.valid_BS],
        )
        return keys_BHSE, values_BHSE


@dataclass
class _DecodeCache:
    """Replaces a transformers `Cache` in a decode step: each new token attends to all of its request's tokens."""

    pool: KVPool
    first_layer: int
    slots_YB: Tensor
    tables_YBM: Tensor

    def update(self, keys_BH1E: Tensor, values_BH1E: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        row = layer_idx - self.first_layer
        self.pool.write(self.slots_YB[row], keys_BH1E.squeeze(2), values_BH1E.squeeze(2))
        return self.pool.read(self.tables_YBM[row])


def rounding_tokens(reducer: TokenReducer | None) -> int:
    """Returns the tokens beyond the mean over the layers that partly filled blocks of a request may take.

    With n_y tokens in layer y, a request has at most as many blocks as one with their mean + T - 1 in every layer.
    """
    return BLOCK_TOKENS - 1 if isinstance(reducer, InDecoderReducer) else 0


class PooledDecoder:
    """Runs a model's decoder with its keys and values in a `KVPool`.

    Args:
        model: model in evaluation mode.
        max_tokens: size of the KV pool, tokens.
        spare_tokens: additional tokens for urgent requests.
        reducer: training-free reducer of the model; None: none.
    """

    def __init__(
        self, model: ElasticVLM, *, max_tokens: int, spare_tokens: int = 0, reducer: ModelReducer | None = None
    ) -> None:
        self._model = model
        self._reducer = reducer
        self._text = model.model.language_model
        self._layers = list(self._text.layers)
        config = model.config.text_config
        self._window = getattr(config, "sliding_window", None)
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._sliding = [getattr(layer.self_attn, "sliding_window", None) is not None for layer in self._layers]
        self.device = model.lm_head.weight.device
        self._dtype = model.dtype
        positions = reducer.reducer.positions if reducer is not None else "contiguous"
        self._keyed_masks = AttentionMasks(self._text, self._window, positions)
        self.max_positions = int(config.max_position_embeddings)
        self._num_patches = int(model.config.grid_size) ** 2
        self.positions_per_image = self._num_patches if model.has_image_positions else None
        if reducer is not None:
            self.positions_per_image = reducer.positions_per_image
        reads_prompt = reducer is not None and reducer.in_decoder is not None
        self.prefill_per_image = self._num_patches if reads_prompt else None
        """Visual tokens of an image that enter the decoder at every budget; None: as many as the budget."""
        stages = reducer.in_decoder if reducer is not None else None
        self._stages = stages if isinstance(stages, InDecoderReducer) else None
        self.rounding_tokens = rounding_tokens(reducer.reducer if reducer is not None else None)
        """See the function of this name."""
        heads = int(config.num_attention_heads)
        self.pool = KVPool(
            num_layers=len(self._layers),
            num_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_width=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            max_tokens=max_tokens,
            spare_tokens=spare_tokens + self.rounding_tokens,
            dtype=self._dtype,
            device=self.device,
        )
        self._visual_by_layer: dict[tuple[int, int], list[int]] = {}

    def kv_lengths(self, num_text: int, num_images: int, num_visual_tokens: int) -> list[int]:
        """Returns the number of tokens that a request holds in each layer.

        Args:
            num_text: number of text tokens, those of the answer included.
            num_images: number of images.
            num_visual_tokens: budget of each image; with a reducer inside the decoder, the mean over the layers.
        """
        key = num_images, num_visual_tokens
        if key not in self._visual_by_layer:
            num_layers, visual = len(self._layers), num_images * num_visual_tokens
            counts = [visual] * num_layers
            if self._stages is not None and 0 < num_visual_tokens < self._num_patches and num_images:
                every = num_images * self._num_patches
                counts = tokens_by_layer(self._stages.stages(num_layers, every, visual), num_layers, every)
            self._visual_by_layer[key] = counts
        return [num_text + visual for visual in self._visual_by_layer[key]]

    def prefill(self, prompts: list[Prompt]) -> tuple[Tensor, list[list[Span]]]:
        """Processes whole prompts.

        Returns:
            The logits [B, V] of the first token after each prompt, and the tokens of each prompt by layer.
        """
        groups: dict[tuple[int, int] | None, list[int]] = {}
        for row, prompt in enumerate(prompts):
            groups.setdefault(_shape_of(prompt), []).append(row)
        logits: dict[int, Tensor] = {}
        spans: dict[int, list[Span]] = {}
        for shape, rows in groups.items():
            work = self._prefill_stock if shape is None else self._prefill_reduced
            logits_BV, own = work([prompts[row] for row in rows])
            logits |= zip(rows, logits_BV, strict=True)
            spans |= zip(rows, own, strict=True)
        order = range(len(prompts))
        return torch.stack([logits[row] for row in order]), [spans[row] for row in order]

    def _prefill_stock(self, prompts: list[Prompt]) -> tuple[Tensor, list[list[Span]]]:
        lengths = torch.tensor([prompt.length for prompt in prompts], device=self.device)
        order_S = torch.arange(int(lengths.max()), device=self.device)
        valid_BS = order_S[None] < lengths[:, None]
        every_layer = range(len(self._layers))
        slots_YR = slots_of(
            [prompt.blocks for prompt in prompts], every_layer, [prompt.length for prompt in prompts], self.device
        )
        cache = _PrefillCache(self.pool, slots_YR, valid_BS)
        allowed_BSS = valid_BS[:, None].expand(-1, len(order_S), -1)
        if not self._model.reads_both_ways:
            allowed_BSS = allowed_BSS & (order_S[None] <= order_S[:, None])
        order_BS = order_S.expand(len(prompts), -1)
        positions_BS = torch.cat([self._positions(prompt, len(order_S)) for prompt in prompts])
        # Where the prompt is attended to in both directions, layers with a window see all of it, as in transformers.
        window = None if self._model.reads_both_ways else self._window
        hidden_BSL = self._run(
            every_layer,
            self._embed(prompts, len(order_S)),
            positions_BS.to(self.device),
            self._masks(allowed_BSS, order_BS, order_BS, window),
            cache,
        )
        last_BL = self._text.norm(hidden_BSL[torch.arange(len(prompts), device=self.device), lengths - 1])
        spans = [
            [Span(every_layer, prompt.length, int(positions_S[prompt.length - 1]) + 1)]
            for prompt, positions_S in zip(prompts, positions_BS, strict=True)
        ]
        return self._logits(last_BL), spans

    def _prefill_reduced(self, prompts: list[Prompt]) -> tuple[Tensor, list[list[Span]]]:
        """Processes prompts with equally many visual tokens and equal budgets as evaluation does."""
        reducer = self._reducer
        assert reducer is not None, "the prompts have patches"
        budget = prompts[0].num_visual_tokens
        decoder = reducer.decoder_at(budget)
        assert decoder is not None, "the prompts have patches"
        packed = pack_prompts(
            [prompt.token_ids for prompt in prompts],
            [()] * len(prompts),
            offset=prompts[0].visual_offset,
            pad_token_id=0,
            device=self.device,
        )
        rows = [(prompt.visual_KL, *prompt.patches) for prompt in prompts if prompt.patches is not None]
        visual = VisualTokens(*(torch.stack(parts) for parts in zip(*rows, strict=True)))
        per_image = budget if reducer.in_decoder is None else self._num_patches
        num_images = visual.tokens_BVL.shape[1] // per_image
        prefilled = decoder.prefill(packed, visual, reducer=reducer.in_decoder, budget=num_images * budget)
        spans: list[list[Span]] = [[] for _ in prompts]
        for group in prefilled.groups:
            valid_BS = group.keys.valid_BS
            lengths = valid_BS.sum(dim=1).tolist()
            slots_YR = slots_of([prompt.blocks for prompt in prompts], group.layers, lengths, self.device)
            for layer, slots_R in zip(group.layers, slots_YR, strict=True):
                held = prefilled.cache.layers[layer]
                self.pool.write(slots_R, held.keys.transpose(1, 2)[valid_BS], held.values.transpose(1, 2)[valid_BS])
            for row, length in enumerate(lengths):
                # Its positions count from 0, to which `_run` would add the stock model's first one.
                own = Keys(*(part[row][valid_BS[row]][None] for part in group.keys))
                own = own._replace(positions_BS=own.positions_BS - self._model.first_position)
                following = int(own.positions_BS[0, -1]) + 1
                is_keyed = reducer.reducer.positions != "contiguous"
                spans[row].append(Span(group.layers, length, following, own if is_keyed else None))
        return prefilled.logits_BV.float(), spans

    def decode(self, token_ids: list[int], spans: list[list[Span]], blocks: Sequence[Blocks]) -> Tensor:
        """Processes one more token of each request and returns the logits [B, V] of the next.

        Args:
            token_ids: the token that each request has just generated.
            spans: tokens of each request in the pool, by layer; the new token is entered.
            blocks: blocks of each request.
        """
        hidden_B1L: Tensor = self._model.get_input_embeddings()(torch.tensor(token_ids, device=self.device)[:, None])
        edges = sorted({span.layers.start for row in spans for span in row})
        for start, end in pairwise([*edges, len(self._layers)]):
            own = [next(span for span in row if start in span.layers) for row in spans]
            hidden_B1L = self._decode_layers(range(start, end), hidden_B1L, own, blocks)
        for span in chain.from_iterable(spans):
            span.length += 1
            span.position += 1
        return self._logits(self._text.norm(hidden_B1L)[:, 0])

    def _decode_layers(self, layers: range, hidden_B1L: Tensor, spans: list[Span], blocks: Sequence[Blocks]) -> Tensor:
        """Runs one more token of each request through some layers, in each of which a request has the same span."""
        lengths = [span.length for span in spans]
        longest = max(lengths) + 1
        tables_YBM = tables_of(blocks, layers, longest, self.device)
        order_B = torch.tensor(lengths, device=self.device)
        rows_B = torch.arange(len(lengths), device=self.device)
        slots_YB = tables_YBM[:, rows_B, order_B // BLOCK_TOKENS] * BLOCK_TOKENS + order_B % BLOCK_TOKENS
        order_S = torch.arange(tables_YBM.shape[2] * BLOCK_TOKENS, device=self.device)
        allowed_BS = order_S[None] <= order_B[:, None]
        positions_B1 = torch.tensor([span.position for span in spans], device=self.device)[:, None]
        if any(span.keys is not None for span in spans):
            keys = self._keys(spans, allowed_BS, order_S)
            is_keyed_B1 = torch.tensor([span.keys is not None for span in spans], device=self.device)[:, None]
            rows_B1 = torch.where(is_keyed_B1, positions_B1, order_B[:, None])
            masks = self._keyed_masks.of_rows(rows_B1, keys, hidden_B1L.dtype)
        else:
            masks = self._masks(allowed_BS[:, None], order_B[:, None], order_S.expand(len(spans), -1), self._window)
        cache = _DecodeCache(self.pool, layers.start, slots_YB, tables_YBM)
        return self._run(layers, hidden_B1L, positions_B1, masks, cache)

    def _keys(self, spans: list[Span], allowed_BS: Tensor, order_S: Tensor) -> Keys:
        """Returns positions and sizes of the tokens in the pool; those of requests without keys are in their order."""
        positions_BS = order_S.repeat(len(spans), 1)
        sizes_BS, visual_BS = torch.ones_like(positions_BS), torch.zeros_like(allowed_BS)
        for row, span in enumerate(spans):
            if span.keys is not None:
                prompt = slice(0, span.keys.positions_BS.shape[1])
                positions_BS[row] += span.position - span.length
                positions_BS[row, prompt] = span.keys.positions_BS[0]
                sizes_BS[row, prompt] = span.keys.sizes_BS[0]
                visual_BS[row, prompt] = span.keys.visual_BS[0]
        return Keys(allowed_BS, positions_BS, sizes_BS, visual_BS)

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
        layers: range,
        hidden: Tensor,
        positions_BQ: Tensor,
        masks: LayerMasks,
        cache: _PrefillCache | _DecodeCache,
    ) -> Tensor:
        """Returns the hidden states after some layers, before the last norm; rotary positions count from 0."""
        position_ids_BQ = positions_BQ + self._model.first_position
        rotary = self._text.rotary_emb(hidden, position_ids_BQ)
        for index in layers:
            hidden = self._layers[index](
                hidden,
                attention_mask=masks.of(self._sliding[index]),
                position_embeddings=rotary,
                position_ids=position_ids_BQ,
                past_key_values=cache,
                use_cache=True,
            )
        return hidden

    def _masks(
        self, allowed_BQS: Tensor, query_order_BQ: Tensor, key_order_BS: Tensor, window: int | None
    ) -> LayerMasks:
        """Returns the masks of stock attention.

        A window applies to the order of the tokens in each request's prompt and answer, as in transformers, not to
        their rotary positions.
        """
        full = self._additive(allowed_BQS)
        if window is None or key_order_BS.shape[1] <= window:
            return LayerMasks(full, full)
        near_BQS = query_order_BQ[:, :, None] - key_order_BS[:, None] < window
        return LayerMasks(full, self._additive(allowed_BQS & near_BQS))

    def _additive(self, allowed_BQS: Tensor) -> Tensor:
        """Returns an additive mask: 0 where attention is allowed, else the smallest number.

        Soft-capped (eager) attention does not accept boolean masks.
        """
        mask = torch.zeros(allowed_BQS.shape, dtype=self._dtype, device=self.device)
        return mask.masked_fill_(~allowed_BQS, torch.finfo(self._dtype).min)[:, None]

    def _logits(self, hidden_BL: Tensor) -> Tensor:
        logits_BV: Tensor = self._model.lm_head(hidden_BL).float()
        return logits_BV if self._softcap is None else torch.tanh(logits_BV / self._softcap) * self._softcap


def _shape_of(prompt: Prompt) -> tuple[int, int] | None:
    """Returns the number of visual tokens and the budget, equal in one prefill of a reducer; None: stock decoder."""
    if prompt.patches is None:
        return None
    return len(prompt.patches.sizes_K), prompt.num_visual_tokens
