"""Runs a decoder over reduced visual tokens, for the cases that transformers' own `generate` does not support.

There are three such cases: rotary positions taken from the raster of the image; attention that weights a token by the
number of its patches; and visual tokens that are dropped between layers, so that layers have KV caches of different
lengths. The layers themselves are the stock ones.

Shape suffixes: B prompts, O text tokens before the images, V visual tokens of a prompt, T text tokens after them,
S = O + V + T, M generated tokens, H query heads, L language width. Rows are aligned at the end: padding is placed
between the visual tokens and the text after them, so that the last column holds the last token of every prompt.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from parcelray.config.reducer import Positions
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.decoder_attention import AttentionMasks, Keys, LayerMasks, attention_rows
from parcelray.models.token_reduction.base import PromptView, Reduction, ReductionContext, TokenReducer
from parcelray.models.token_reduction.in_decoder import InDecoderReducer, Stage


class Prompts(NamedTuple):
    """The text of a batch of prompts around their visual tokens, on the device of the model."""

    before_O: Tensor
    """Token ids before the images, the same in every prompt."""
    after_BT: Tensor
    """Token ids after the images, left-padded (and right-padded after shorter answers)."""
    valid_BT: Tensor
    """False for padding."""
    answer_BT: Tensor
    """True for tokens of an answer, which have causal attention even if the prompt has not."""


class VisualTokens(NamedTuple):
    """The visual tokens of a batch of prompts; the images of a prompt follow one another."""

    tokens_BVL: Tensor
    """Projected tokens."""
    position_ids_BV: Tensor
    """Position of each token in the patch grids of its prompt's images, counted on from image to image, int64."""
    sizes_BV: Tensor
    """Number of patches in each token, int64."""


def encode_prompts(
    processor: ElasticProcessor, texts: list[str], answers: list[str] | None, device: torch.device | str
) -> Prompts:
    """Encodes prompts, with answers for likelihood scoring if they are given.

    Args:
        processor: processor of the model.
        texts: prompts without image placeholders.
        answers: one answer per prompt; None for generation.
        device: device of the result.
    """
    prefixes = processor.encode_prompts(texts)
    suffixes = processor.encode_answers(answers) if answers is not None else [[] for _ in texts]
    return pack_prompts(
        prefixes, suffixes, offset=processor.visual_offset, pad_token_id=processor.tokenizer.pad_token_id, device=device
    )


def pack_prompts(
    prefixes: Sequence[Sequence[int]],
    suffixes: Sequence[Sequence[int]],
    *,
    offset: int,
    pad_token_id: int,
    device: torch.device | str,
) -> Prompts:
    """Arranges encoded prompts in a batch.

    Args:
        prefixes: token ids of each prompt, without image placeholders.
        suffixes: token ids of each answer; empty for generation.
        offset: number of token ids before the images, which are the same in every prompt.
        pad_token_id: id of the padding.
        device: device of the result.
    """
    longest = max(len(prefix) - offset for prefix in prefixes)
    shape = (len(prefixes), longest + max(len(suffix) for suffix in suffixes))
    after, valid, answer = (
        torch.full(shape, pad_token_id),
        torch.zeros(shape, dtype=torch.bool),
        torch.zeros(shape, dtype=torch.bool),
    )
    for row, (prefix, suffix) in enumerate(zip(prefixes, suffixes, strict=True)):
        start, end = longest - (len(prefix) - offset), longest + len(suffix)
        after[row, start:end] = torch.tensor([*prefix[offset:], *suffix])
        valid[row, start:end] = True
        answer[row, longest:end] = True
    return Prompts(
        *(each.to(device) for each in (torch.tensor(prefixes[0][:offset], dtype=torch.int64), after, valid, answer))
    )


@dataclass(frozen=True)
class _Sequence:
    """The input of some decoder layers: hidden states, and the properties of each position that attention needs."""

    hidden_BSL: Tensor
    valid_BS: Tensor
    positions_BS: Tensor
    sizes_BS: Tensor
    prefix_S: Tensor
    """True for positions with bidirectional attention."""
    offset: int
    num_visual: int

    @property
    def visual(self) -> slice:
        return slice(self.offset, self.offset + self.num_visual)

    @property
    def text(self) -> slice:
        return slice(self.offset + self.num_visual, self.hidden_BSL.shape[1])

    @property
    def keys(self) -> Keys:
        visual_BS = torch.zeros_like(self.valid_BS)
        visual_BS[:, self.visual] = True
        return Keys(self.valid_BS, self.positions_BS, self.sizes_BS, visual_BS)


class LayerGroup(NamedTuple):
    """Consecutive layers that attend to the same positions."""

    layers: range
    keys: Keys


class Prefilled(NamedTuple):
    """Prompts that have passed all layers of the decoder."""

    logits_BV: Tensor
    """Logits of the first token after each prompt."""
    cache: DynamicCache
    """Keys and values of each layer, with those of padding."""
    groups: list[LayerGroup]
    """The layers, with the positions that each of them holds in the cache."""


class _Steps(NamedTuple):
    """Inputs of a group of layers for each of M tokens to be generated."""

    layers: range
    positions_BM: Tensor
    rotary: tuple[Tensor, Tensor]
    """Cosines and sines, [B, M, head width] each."""
    masks: LayerMasks
    """Masks [B, 1, M, S + M]."""
    num_before: int
    """Number of columns before the first generated token, S."""


class ReducedDecoder:
    """Runs a model's decoder layer by layer over visual tokens that are already projected.

    Args:
        model: model in evaluation mode; its decoder is Llama, Gemma or Gemma-2.
        positions: rotary positions of the visual tokens. `contiguous`: consecutive. `image`: the token's position in
            the image, so that the text has the same positions as without reduction. `image_size_bias` and
            `image_calibrated`: as `image`, with a bias on the attention logits (see `AttentionMasks`).
    """

    def __init__(self, model: ElasticVLM, positions: Positions = "contiguous") -> None:
        self._model = model
        self._text = model.model.language_model
        self._layers = list(self._text.layers)
        self._positions = positions
        # Gemma attends to the prompt in both directions, Llama is causal throughout.
        self._bidirectional = model.reads_both_ways
        config = model.config.text_config
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._masks = AttentionMasks(self._text, getattr(config, "sliding_window", None), positions)

    @property
    def num_layers(self) -> int:
        """Number of layers of the decoder."""
        return len(self._layers)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Prompts,
        visual: VisualTokens,
        *,
        max_new_tokens: int,
        end_ids: frozenset[int],
        pad_token_id: int,
        reducer: TokenReducer | None = None,
        budget: int = 0,
        on_logits: Callable[[Tensor], None] = lambda logits: None,
    ) -> Tensor:
        """Generates answers by greedy decoding.

        Args:
            prompts: prompts without answers.
            visual: all visual tokens that enter the decoder.
            max_new_tokens: maximum length of an answer, in tokens.
            end_ids: tokens that end an answer, see `decoding.end_token_ids`; empty: all have the maximum length.
            pad_token_id: token after the end of shorter answers.
            reducer: a reducer that reads the prompt, applied in the decoder; None leaves the tokens as they are.
            budget: visual tokens per prompt after the reducer.
            on_logits: called with the logits [B, vocabulary] of every step.

        Returns:
            Token ids [B, at most max_new_tokens].
        """
        hidden_BTL, cache, groups = self._prefill(prompts, visual, reducer, budget)
        plan = [self._plan_steps(group, max_new_tokens, hidden_BTL) for group in groups]
        new: list[Tensor] = []
        end_E = torch.tensor(sorted(end_ids), dtype=torch.int64, device=hidden_BTL.device)
        ended_B = torch.zeros(len(hidden_BTL), dtype=torch.bool, device=hidden_BTL.device)
        logits_BV = self._logits(hidden_BTL[:, -1:]).squeeze(1)
        while True:
            on_logits(logits_BV)
            next_B = torch.where(ended_B, pad_token_id, logits_BV.argmax(dim=1))
            new.append(next_B)
            ended_B = ended_B | torch.isin(next_B, end_E)
            if len(new) == max_new_tokens or bool(ended_B.all()):
                return torch.stack(new, dim=1)
            logits_BV = self._logits(self._step(next_B, len(new) - 1, cache, plan)).squeeze(1)

    @torch.inference_mode()
    def logits(
        self, prompts: Prompts, visual: VisualTokens, *, reducer: TokenReducer | None = None, budget: int = 0
    ) -> Tensor:
        """Returns the logits at the text after the images, [B, T, vocabulary]; see `generate` for the arguments."""
        return self._logits(self._prefill(prompts, visual, reducer, budget)[0])

    @torch.inference_mode()
    def prefill(
        self, prompts: Prompts, visual: VisualTokens, *, reducer: TokenReducer | None = None, budget: int = 0
    ) -> Prefilled:
        """Runs prompts through all layers, for a caller that generates itself; see `generate` for the arguments."""
        hidden_BTL, cache, groups = self._prefill(prompts, visual, reducer, budget)
        return Prefilled(self._logits(hidden_BTL[:, -1:]).squeeze(1), cache, groups)

    @torch.inference_mode()
    def attention(self, prompts: Prompts, visual: VisualTokens, layers: list[int]) -> list[Tensor]:
        """Returns the attention of the text to the visual tokens in some layers, without any reduction.

        Returns:
            One tensor [B, H, T, V] per layer, in float32.
        """
        return self._text_attention(self._embed(prompts, visual), layers)

    def _prefill(
        self, prompts: Prompts, visual: VisualTokens, reducer: TokenReducer | None, budget: int
    ) -> tuple[Tensor, DynamicCache, list[LayerGroup]]:
        """Runs the prompts through all layers; returns hidden states of the text [B, T, L], KV cache and groups."""
        sequence = self._embed(prompts, visual)
        # Reducers score by the prompt alone, so the columns of the answers are cut off.
        num_text = int((~prompts.answer_BT.any(dim=0)).sum())
        view = PromptView(
            embeddings_BTL=sequence.hidden_BSL[:, sequence.text][:, :num_text],
            valid_BT=(prompts.valid_BT & ~prompts.answer_BT)[:, :num_text],
            visual_BVL=visual.tokens_BVL,
            attention=lambda layer: self._text_attention(sequence, [layer])[0][:, :, :num_text],
            num_layers=self.num_layers,
            grid_side=int(self._model.config.grid_size),
        )
        stages: tuple[Stage, ...] = ()
        if isinstance(reducer, InDecoderReducer):
            stages = reducer.stages(self.num_layers, visual.tokens_BVL.shape[1], budget)
        elif reducer is not None:
            # The reducer sees the visual tokens of all images of a prompt as one sequence.
            sequence = self._reduced(
                sequence, reducer(visual.tokens_BVL, num_visual_tokens=budget, context=ReductionContext(prompt=view))
            )
        cache = DynamicCache()
        groups: list[LayerGroup] = []
        edges = [0, *(stage.layer for stage in stages), self.num_layers]
        previous_input = sequence.hidden_BSL
        for number, layers in enumerate(map(range, edges[:-1], edges[1:])):
            if number:
                assert isinstance(reducer, InDecoderReducer)
                sequence = self._reduced_at(sequence, stages[number - 1], reducer, view, previous_input)
            rotary, masks = self._rotary(sequence), self._prompt_masks(sequence)
            for index in layers:
                previous_input = sequence.hidden_BSL
                hidden = self._run(
                    index, sequence.hidden_BSL, rotary, sequence.positions_BS, masks.of(self._is_windowed(index)), cache
                )
                sequence = replace(sequence, hidden_BSL=hidden)
            groups.append(LayerGroup(layers, sequence.keys))
        return self._text.norm(sequence.hidden_BSL[:, sequence.text]), cache, groups

    def _reduced_at(
        self, sequence: _Sequence, stage: Stage, reducer: InDecoderReducer, view: PromptView, previous_input: Tensor
    ) -> _Sequence:
        """Returns the sequence after the reduction at a stage between two layers."""
        rows = slice(sequence.text.start, sequence.text.start + view.valid_BT.shape[1])
        scored = sequence if stage.scored_at == stage.layer else replace(sequence, hidden_BSL=previous_input)

        def attention(layer: int) -> Tensor:
            mask = self._prompt_masks(sequence).of(self._is_windowed(stage.scored_at))[:, :, rows]
            return attention_rows(self._layers[stage.scored_at], scored.hidden_BSL, self._rotary(sequence), mask, rows)[
                :, :, :, sequence.visual
            ]

        reduction = reducer(
            sequence.hidden_BSL[:, sequence.visual],
            num_visual_tokens=stage.num_tokens,
            context=ReductionContext(prompt=replace(view, attention=attention)),
        )
        return self._reduced(sequence, reduction)

    def _embed(self, prompts: Prompts, visual: VisualTokens) -> _Sequence:
        """Returns the input of the first layer."""
        embed = self._model.get_input_embeddings()
        batch, num_visual, _ = visual.tokens_BVL.shape
        after_BTL = embed(prompts.after_BT)
        before_BOL = embed(prompts.before_O).expand(batch, -1, -1)
        offset = before_BOL.shape[1]
        hidden_BSL = torch.cat([before_BOL, visual.tokens_BVL.to(after_BTL.dtype), after_BTL], dim=1)
        device = hidden_BSL.device
        ones_BO = torch.ones(batch, offset, dtype=torch.bool, device=device)
        valid_BS = torch.cat(
            [ones_BO, torch.ones(batch, num_visual, dtype=torch.bool, device=device), prompts.valid_BT], dim=1
        )
        ones_BT = torch.ones(batch, prompts.after_BT.shape[1], dtype=torch.int64, device=device)
        sizes_BS = torch.cat([ones_BO.long(), visual.sizes_BV, ones_BT], dim=1)
        prefix_S = torch.ones(hidden_BSL.shape[1], dtype=torch.bool, device=device)
        prefix_S[offset + num_visual :] = ~prompts.answer_BT.any(dim=0)
        sequence = _Sequence(
            hidden_BSL, valid_BS, valid_BS.long(), sizes_BS, prefix_S & self._bidirectional, offset, num_visual
        )
        if self._positions == "contiguous":
            return _contiguous(sequence)
        # The text has the positions that it would have if the images filled all their positions.
        before = torch.arange(offset, device=device).expand(batch, -1)
        after = offset + self._num_image_positions(visual) + prompts.valid_BT.long().cumsum(dim=1) - 1
        return replace(
            sequence, positions_BS=torch.cat([before, offset + visual.position_ids_BV, after.clamp(min=0)], dim=1)
        )

    def _num_image_positions(self, visual: VisualTokens) -> int:
        """Returns the number of patches of a prompt's images, derived from the largest position of a visual token."""
        if not visual.position_ids_BV.shape[1]:
            return 0
        patches = int(self._model.config.grid_size**2)
        return patches * math.ceil((int(visual.position_ids_BV.max()) + 1) / patches)

    def _reduced(self, sequence: _Sequence, reduction: Reduction) -> _Sequence:
        """Returns the sequence with its visual tokens replaced by the reduced ones."""
        a, b = sequence.visual.start, sequence.visual.stop
        kept = reduction.position_ids_BK

        def around(values: Tensor, middle: Tensor) -> Tensor:
            return torch.cat([values[:, :a], middle, values[:, b:]], dim=1)

        # The size of a merged token is the sum over its members; a selected token keeps its size.
        sizes = torch.zeros_like(kept).scatter_add_(
            1, reduction.assignment_BN.clamp(min=0), sequence.sizes_BS[:, a:b] * (reduction.assignment_BN >= 0)
        )
        result = _Sequence(
            around(sequence.hidden_BSL, reduction.tokens_BKD),
            around(sequence.valid_BS, torch.ones_like(kept, dtype=torch.bool)),
            around(sequence.positions_BS, sequence.positions_BS[:, a:b].gather(1, kept)),
            around(sequence.sizes_BS, sizes),
            torch.cat(
                [sequence.prefix_S[:a], sequence.prefix_S[a : a + 1].expand(kept.shape[1]), sequence.prefix_S[b:]]
            ),
            sequence.offset,
            kept.shape[1],
        )
        return _contiguous(result) if self._positions == "contiguous" else result

    def _text_attention(self, sequence: _Sequence, layers: list[int]) -> list[Tensor]:
        """Returns the attention [B, H, T, V] of the text to the visual tokens in each of the layers."""
        rotary, masks = self._rotary(sequence), self._prompt_masks(sequence)
        attention_of = {}
        hidden = sequence.hidden_BSL
        for index in range(max(layers) + 1):
            mask = masks.of(self._is_windowed(index))
            if index in layers:
                rows = attention_rows(self._layers[index], hidden, rotary, mask[:, :, sequence.text], sequence.text)
                attention_of[index] = rows[:, :, :, sequence.visual]
            if index < max(layers):
                hidden = self._run(index, hidden, rotary, sequence.positions_BS, mask, None)
        return [attention_of[layer] for layer in layers]

    def _plan_steps(self, group: LayerGroup, num_steps: int, hidden: Tensor) -> _Steps:
        """Computes positions and masks of the tokens to be generated, which do not depend on the tokens themselves."""
        last_B1 = group.keys.positions_BS[:, -1:]
        positions_BM = last_B1 + torch.arange(1, num_steps + 1, device=hidden.device)
        masks = self._masks.of_generated(positions_BM, group.keys, hidden.dtype)
        rotary = self._text.rotary_emb(hidden, positions_BM)
        return _Steps(group.layers, positions_BM, rotary, masks, group.keys.positions_BS.shape[1])

    def _step(self, token_B: Tensor, number: int, cache: DynamicCache, plan: list[_Steps]) -> Tensor:
        """Runs one more token through all layers.

        Args:
            token_B: the last generated token of each prompt.
            number: how many tokens were generated before it.
            cache: KV cache, extended here.
            plan: see `_plan_steps`.

        Returns:
            Hidden state [B, 1, L] of the token.
        """
        hidden = self._model.get_input_embeddings()(token_B[:, None])
        row = slice(number, number + 1)
        for steps in plan:
            rotary = (steps.rotary[0][:, row], steps.rotary[1][:, row])
            masks = LayerMasks(*(mask[:, :, row, : steps.num_before + number + 1] for mask in steps.masks))
            for index in steps.layers:
                mask = masks.of(self._is_windowed(index))
                hidden = self._run(index, hidden, rotary, steps.positions_BM[:, row], mask, cache)
        normed: Tensor = self._text.norm(hidden)
        return normed

    def _run(
        self,
        index: int,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        positions: Tensor,
        mask: Tensor,
        cache: DynamicCache | None,
    ) -> Tensor:
        output: Tensor = self._layers[index](
            hidden,
            attention_mask=mask,
            position_embeddings=rotary,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output

    def _rotary(self, sequence: _Sequence) -> tuple[Tensor, Tensor]:
        cosines, sines = self._text.rotary_emb(sequence.hidden_BSL, sequence.positions_BS)
        return cosines, sines

    def _prompt_masks(self, sequence: _Sequence) -> LayerMasks:
        return self._masks.of_prompt(sequence.keys, sequence.prefix_S, sequence.hidden_BSL.dtype)

    def _is_windowed(self, index: int) -> bool:
        return getattr(self._layers[index].self_attn, "sliding_window", None) is not None

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._model.lm_head(hidden)
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap


def _contiguous(sequence: _Sequence) -> _Sequence:
    """Returns the sequence with consecutive positions, padding not counted."""
    return replace(sequence, positions_BS=(sequence.valid_BS.long().cumsum(dim=1) - 1).clamp(min=0))
