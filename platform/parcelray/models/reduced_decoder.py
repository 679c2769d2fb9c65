"""The decoder over reduced visual tokens, where transformers' own `generate` does not reach.

That is: rotary positions of the tokens' places in the image, attention that knows how many patches a token stands for,
and visual tokens that are dropped between the layers, with a KV cache of another length in each of them. The layers
themselves are the stock ones.

Shapes: B prompts, O text tokens before the images, V visual tokens of a prompt, T text tokens after them, S = O + V +
T, L width. Rows are
aligned: padding stands between the visual tokens and the text after them, so that the last column is the last word of
every prompt.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from parcelray.config.reducer import Positions
from parcelray.models.attention_rows import attention_rows
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.token_reduction.base import Reduction, TokenReducer
from parcelray.models.token_reduction.context import PromptView, ReductionContext
from parcelray.models.token_reduction.in_decoder import InDecoderReducer, Stage

_CALIBRATION = 2.0
"""c of RESTORE's calibration (arXiv 2606.01711)."""


class Prompts(NamedTuple):
    """Text of a batch around its visual tokens, on the device."""

    before_O: Tensor
    """Token ids, the same in every prompt."""
    after_BT: Tensor
    """Token ids, padding in front (and behind, after shorter answers)."""
    valid_BT: Tensor
    """False: padding."""
    answer_BT: Tensor
    """True: an answer, read causally even where the prompt is not."""


class VisualTokens(NamedTuple):
    """Visual tokens of a batch of prompts, all images of a prompt after each other."""

    tokens_BVL: Tensor
    """Projected."""
    places_BV: Tensor
    """Place of each in the patch grids of its prompt's images, int64."""
    sizes_BV: Tensor
    """Patches in each, int64."""


def encode_prompts(
    processor: ElasticProcessor, texts: list[str], answers: list[str] | None, device: torch.device | str
) -> Prompts:
    """Prompts, with answers whose likelihood is asked or without."""
    at = processor.visual_offset
    prefixes = processor.encode_prompts(texts)
    suffixes = processor.encode_answers(answers) if answers is not None else [[] for _ in texts]
    longest = max(len(prefix) - at for prefix in prefixes)
    shape = (len(texts), longest + max(len(suffix) for suffix in suffixes))
    after, valid, answer = (
        torch.full(shape, processor.tokenizer.pad_token_id),
        torch.zeros(shape, dtype=torch.bool),
        torch.zeros(shape, dtype=torch.bool),
    )
    for row, (prefix, suffix) in enumerate(zip(prefixes, suffixes, strict=True)):
        start, end = longest - (len(prefix) - at), longest + len(suffix)
        after[row, start:end] = torch.tensor(prefix[at:] + suffix)
        valid[row, start:end] = True
        answer[row, longest:end] = True
    return Prompts(
        *(each.to(device) for each in (torch.tensor(prefixes[0][:at], dtype=torch.int64), after, valid, answer))
    )


@dataclass(frozen=True)
class _Sequence:
    """What some layers read."""

    hidden_BSL: Tensor
    valid_BS: Tensor
    positions_BS: Tensor
    sizes_BS: Tensor
    """Patches in each visual token; 1: text."""
    prefix_S: Tensor
    """True: read in both directions."""
    offset: int
    num_visual: int

    @property
    def visual(self) -> slice:
        return slice(self.offset, self.offset + self.num_visual)

    @property
    def text(self) -> slice:
        return slice(self.offset + self.num_visual, self.hidden_BSL.shape[1])


class _Group(NamedTuple):
    """Layers that read the same positions: what decoding has to know of them."""

    layers: range
    valid_BS: Tensor
    positions_BS: Tensor
    sizes_BS: Tensor
    visual: slice


class _Steps(NamedTuple):
    """What some layers need for each of M tokens to come."""

    layers: range
    positions_BM: Tensor
    rotary: tuple[Tensor, Tensor]
    """Cosines and sines, [B, M, head width]."""
    masks: tuple[Tensor, Tensor]
    """Added to the attention logits [B, 1, M, S + M], of layers that see everything and of those with a window; a token sees up to its own column."""
    num_before: int
    """S, before the first of them."""


class ReducedDecoder:
    """Runs a model's decoder layer by layer over visual tokens that are already there.

    Args:
        model: in evaluation mode; its decoder is Llama, Gemma or Gemma-2.
        positions: which rotary positions visual tokens get: `contiguous`: one after the other; `original`: of their
            place in the image, so that the text stands where it would without reduction; `original_size_bias`: besides,
            log(size) is added to the attention logits of a token that stands for several patches;
            `original_calibrated`: log(size * (2 - D(distance))) with D the mean cosine of the rotary angles (RESTORE).
    """

    def __init__(self, model: ElasticVLM, positions: Positions = "contiguous") -> None:
        self._model = model
        self._text = model.model.language_model
        self._layers = list(self._text.layers)
        self._positions = positions
        # Gemma reads the prompt in both directions, Llama never.
        self._bidirectional = model.reads_both_ways
        config = model.config.text_config
        self._window = getattr(config, "sliding_window", None)
        self._softcap = getattr(config, "final_logit_softcapping", None)

    @property
    def num_layers(self) -> int:
        """Of the decoder."""
        return len(self._layers)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Prompts,
        visual: VisualTokens,
        *,
        max_new_tokens: int,
        eos_token_id: int,
        reducer: TokenReducer | None = None,
        budget: int = 0,
        on_logits: Callable[[Tensor], None] = lambda logits: None,
    ) -> Tensor:
        """Greedy answers.

        Args:
            prompts: without answers.
            visual: all tokens that enter the decoder.
            max_new_tokens: at most.
            eos_token_id: ends an answer; what comes after it is this token, too.
            reducer: one that reads the prompt, applied here; None: the tokens are as they should be.
            budget: its visual tokens per prompt.
            on_logits: sees the logits [B, vocabulary] of every step.

        Returns:
            Token ids [B, at most max_new_tokens].
        """
        hidden_BTL, cache, groups = self._prefill(prompts, visual, reducer, budget)
        plan = [self._planned(group, max_new_tokens, hidden_BTL) for group in groups]
        new: list[Tensor] = []
        ended_B = torch.zeros(len(hidden_BTL), dtype=torch.bool, device=hidden_BTL.device)
        logits_BV = self._logits(hidden_BTL[:, -1:]).squeeze(1)
        while True:
            on_logits(logits_BV)
            next_B = torch.where(ended_B, eos_token_id, logits_BV.argmax(dim=1))
            new.append(next_B)
            ended_B = ended_B | (next_B == eos_token_id)
            if len(new) == max_new_tokens or bool(ended_B.all()):
                return torch.stack(new, dim=1)
            logits_BV = self._logits(self._step(next_B, len(new) - 1, cache, plan)).squeeze(1)

    @torch.inference_mode()
    def logits(
        self, prompts: Prompts, visual: VisualTokens, *, reducer: TokenReducer | None = None, budget: int = 0
    ) -> Tensor:
        """Logits at the text after the images: [B, T, vocabulary]."""
        return self._logits(self._prefill(prompts, visual, reducer, budget)[0])

    @torch.inference_mode()
    def attention(self, prompts: Prompts, visual: VisualTokens, layers: list[int]) -> list[Tensor]:
        """What the text looks at in some layers, without any reduction: [B, H, T, V] each."""
        sequence = self._enter(prompts, visual)
        return self._probe(sequence, layers)

    def _prefill(
        self, prompts: Prompts, visual: VisualTokens, reducer: TokenReducer | None, budget: int
    ) -> tuple[Tensor, DynamicCache, list[_Group]]:
        sequence = self._enter(prompts, visual)
        view = PromptView(
            embeddings_BTL=sequence.hidden_BSL[:, sequence.text],
            valid_BT=prompts.valid_BT & ~prompts.answer_BT,
            visual_BVL=visual.tokens_BVL,
            attention=lambda layer: self._probe(sequence, [layer])[0][:, :, : _asked(prompts)],
            num_layers=self.num_layers,
            grid_side=int(self._model.config.grid_size),
        )
        view = replace(
            view, embeddings_BTL=view.embeddings_BTL[:, : _asked(prompts)], valid_BT=view.valid_BT[:, : _asked(prompts)]
        )
        stages: tuple[Stage, ...] = ()
        if isinstance(reducer, InDecoderReducer):
            stages = reducer.stages(self.num_layers, visual.tokens_BVL.shape[1], budget)
        elif reducer is not None:
            # Reducers keep the order of the whole batch's tokens, whatever images they are of.
            sequence = self._reduced(
                sequence, reducer(visual.tokens_BVL, num_visual_tokens=budget, context=ReductionContext(prompt=view))
            )
        cache = DynamicCache()
        groups: list[_Group] = []
        edges = [0, *(stage.layer for stage in stages), self.num_layers]
        previous_input = sequence.hidden_BSL
        for number, layers in enumerate(map(range, edges[:-1], edges[1:])):
            if number:
                assert isinstance(reducer, InDecoderReducer)
                sequence = self._staged(sequence, stages[number - 1], reducer, view, previous_input, _asked(prompts))
            rotary, mask = self._rotary(sequence), self._mask(sequence)
            for index in layers:
                previous_input = sequence.hidden_BSL
                hidden = self._run(
                    index, sequence.hidden_BSL, rotary, sequence.positions_BS, mask[self._is_sliding(index)], cache
                )
                sequence = replace(sequence, hidden_BSL=hidden)
            groups.append(_Group(layers, sequence.valid_BS, sequence.positions_BS, sequence.sizes_BS, sequence.visual))
        return self._text.norm(sequence.hidden_BSL[:, sequence.text]), cache, groups

    def _staged(
        self,
        sequence: _Sequence,
        stage: Stage,
        reducer: InDecoderReducer,
        view: PromptView,
        previous_input: Tensor,
        num_asked: int,
    ) -> _Sequence:
        """The sequence after a reduction between two layers."""
        rows = slice(sequence.text.start, sequence.text.start + num_asked)
        scored = sequence if stage.scored_at == stage.layer else replace(sequence, hidden_BSL=previous_input)

        def attention(layer: int) -> Tensor:
            mask = self._mask(sequence)[self._is_sliding(stage.scored_at)][:, :, rows]
            return attention_rows(self._layers[stage.scored_at], scored.hidden_BSL, self._rotary(sequence), mask, rows)[
                :, :, :, sequence.visual
            ]

        here = replace(view, attention=attention)
        reduction = reducer(
            sequence.hidden_BSL[:, sequence.visual],
            num_visual_tokens=stage.num_tokens,
            context=ReductionContext(prompt=here),
        )
        return self._reduced(sequence, reduction)

    def _enter(self, prompts: Prompts, visual: VisualTokens) -> _Sequence:
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
        text_1 = torch.ones(batch, prompts.after_BT.shape[1], dtype=torch.int64, device=device)
        sizes_BS = torch.cat([ones_BO.long(), visual.sizes_BV, text_1], dim=1)
        prefix_S = torch.ones(hidden_BSL.shape[1], dtype=torch.bool, device=device)
        prefix_S[offset + num_visual :] = ~prompts.answer_BT.any(dim=0)
        sequence = _Sequence(
            hidden_BSL, valid_BS, valid_BS.long(), sizes_BS, prefix_S & self._bidirectional, offset, num_visual
        )
        if self._positions == "contiguous":
            return _contiguous(sequence)
        # Without reduction the images would have filled all their places.
        num_places = self._places(num_visual, visual)
        before = torch.arange(offset, device=device).expand(batch, -1)
        after = offset + num_places + prompts.valid_BT.long().cumsum(dim=1) - 1
        return replace(sequence, positions_BS=torch.cat([before, offset + visual.places_BV, after.clamp(min=0)], dim=1))

    def _places(self, num_visual: int, visual: VisualTokens) -> int:
        patches = int(self._model.config.grid_size**2)
        return patches * math.ceil((int(visual.places_BV.max()) + 1) / patches) if num_visual else 0

    def _reduced(self, sequence: _Sequence, reduction: Reduction) -> _Sequence:
        """The sequence with other visual tokens in the place of its own."""
        a, b = sequence.visual.start, sequence.visual.stop
        kept = reduction.position_ids_BK

        def around(values: Tensor, middle: Tensor) -> Tensor:
            return torch.cat([values[:, :a], middle, values[:, b:]], dim=1)

        # Sizes add up over the members; a selection keeps those of its tokens.
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

    def _probe(self, sequence: _Sequence, layers: list[int]) -> list[Tensor]:
        rotary, mask = self._rotary(sequence), self._mask(sequence)
        found = {}
        hidden = sequence.hidden_BSL
        for index in range(max(layers) + 1):
            if index in layers:
                rows = attention_rows(
                    self._layers[index],
                    hidden,
                    rotary,
                    mask[self._is_sliding(index)][:, :, sequence.text],
                    sequence.text,
                )
                found[index] = rows[:, :, :, sequence.visual]
            if index < max(layers):
                hidden = self._run(index, hidden, rotary, sequence.positions_BS, mask[self._is_sliding(index)], None)
        return [found[layer] for layer in layers]

    def _planned(self, group: _Group, num_steps: int, hidden: Tensor) -> _Steps:
        """What the next tokens' positions and masks are, known before the tokens themselves."""
        new_BM = group.positions_BS[:, -1:] + torch.arange(1, num_steps + 1, device=hidden.device)
        positions_BS = torch.cat([group.positions_BS, new_BM], dim=1)
        allowed_B1S = torch.nn.functional.pad(group.valid_BS, (0, num_steps), value=True)[:, None]
        places = (
            positions_BS,
            new_BM,
            torch.nn.functional.pad(group.sizes_BS, (0, num_steps), value=1),
            group.visual,
            hidden.dtype,
        )
        full = self._additive(allowed_B1S, *places)
        near = full if self._window is None else self._additive(allowed_B1S & self._near(positions_BS, new_BM), *places)
        masks = (full.expand(-1, -1, num_steps, -1), near.expand(-1, -1, num_steps, -1))
        return _Steps(group.layers, new_BM, self._text.rotary_emb(hidden, new_BM), masks, group.positions_BS.shape[1])

    def _step(self, token_B: Tensor, number: int, cache: DynamicCache, plan: list[_Steps]) -> Tensor:
        """The hidden state [B, 1, L] of one more token; `number` were there before it since the prompt."""
        hidden = self._model.get_input_embeddings()(token_B[:, None])
        row = slice(number, number + 1)
        for steps in plan:
            rotary = (steps.rotary[0][:, row], steps.rotary[1][:, row])
            masks = [mask[:, :, row, : steps.num_before + number + 1] for mask in steps.masks]
            for index in steps.layers:
                hidden = self._run(
                    index, hidden, rotary, steps.positions_BM[:, row], masks[self._is_sliding(index)], cache
                )
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

    def _mask(self, sequence: _Sequence) -> tuple[Tensor, Tensor]:
        """Added to the attention logits [B, 1, S, S] of layers that see everything, and of those with a sliding window."""
        length = sequence.hidden_BSL.shape[1]
        order = torch.arange(length, device=sequence.hidden_BSL.device)
        seen_SS = (order[None, :] <= order[:, None]) | (sequence.prefix_S[:, None] & sequence.prefix_S[None, :])
        allowed_BSS = seen_SS[None] & sequence.valid_BS[:, None]
        places = (
            sequence.positions_BS,
            sequence.positions_BS,
            sequence.sizes_BS,
            sequence.visual,
            sequence.hidden_BSL.dtype,
        )
        full = self._additive(allowed_BSS, *places)
        if self._window is None:
            return full, full
        # What is read in both directions is seen as a whole also by layers with a window, as transformers has it.
        near_BSS = self._near(sequence.positions_BS, sequence.positions_BS) | (
            sequence.prefix_S[:, None] & sequence.prefix_S[None, :]
        )
        return full, self._additive(allowed_BSS & near_BSS, *places)

    def _near(self, positions_BS: Tensor, rows_BR: Tensor) -> Tensor:
        """Whether a key lies in the window of a row."""
        assert self._window is not None
        near_BRS: Tensor = rows_BR[:, :, None] - positions_BS[:, None] < self._window
        return near_BRS

    def _additive(
        self,
        allowed_BRS: Tensor,
        positions_BS: Tensor,
        rows_BR: Tensor,
        sizes_BS: Tensor,
        visual: slice,
        dtype: torch.dtype,
    ) -> Tensor:
        distances_BRS = rows_BR[:, :, None] - positions_BS[:, None]
        bias = torch.zeros(
            distances_BRS.shape if self._positions == "original_calibrated" else (len(sizes_BS), 1, sizes_BS.shape[1]),
            device=sizes_BS.device,
        )
        if self._positions in ("original_size_bias", "original_calibrated"):
            bias = bias + sizes_BS.clamp(min=1).log()[:, None]
        if self._positions == "original_calibrated":
            decay = self._rotary_decay(int(distances_BRS.abs().max()))
            calibration = (_CALIBRATION - decay[distances_BRS.abs()]).log()
            bias[:, :, visual] += calibration[:, :, visual]
        masked: Tensor = bias.masked_fill(~allowed_BRS, torch.finfo(dtype).min).to(dtype)
        return masked[:, None]

    def _rotary_decay(self, longest: int) -> Tensor:
        """D of each distance: the mean cosine of the rotary angles, 1 at 0."""
        frequencies = self._text.rotary_emb.inv_freq.float()
        decay: Tensor = (torch.arange(longest + 1, device=frequencies.device)[:, None] * frequencies).cos().mean(dim=1)
        return decay

    def _is_sliding(self, index: int) -> bool:
        return getattr(self._layers[index].self_attn, "sliding_window", None) is not None

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._model.lm_head(hidden)
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap


def _contiguous(sequence: _Sequence) -> _Sequence:
    """Positions one after the other, padding left out."""
    return replace(sequence, positions_BS=(sequence.valid_BS.long().cumsum(dim=1) - 1).clamp(min=0))


def _asked(prompts: Prompts) -> int:
    """Columns of the text after the images that belong to the prompt."""
    return int((~prompts.answer_BT.any(dim=0)).sum())
