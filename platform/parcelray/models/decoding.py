"""Rules of decoding that evaluation, training validation, serving and the reduced decoder share.

Greedy decoding takes the likeliest token of the model's own logits. Of a checkpoint's generation_config.json only the
end tokens are used. Its other settings (penalties, suppressed or forced tokens, minimum lengths, temperature, ...) have
no effect, because only a job or a request chooses how answers are generated.

Shapes: B prompts, S tokens of a prompt, M generated tokens, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from parcelray.models.backbones import ElasticVLM

NOT_FINITE = "The model's logits are not finite (NaN or infinite); run it in bfloat16 or float32, or check its weights."
"""Reason why a prompt has no answer. The most likely of such logits is an arbitrary token."""


def end_token_ids(model: ElasticVLM, tokenizer: Any) -> frozenset[int]:
    """Returns the ids of the tokens that end an answer.

    They are the union of those of the checkpoint's generation_config.json, of its config.json and of its tokenizer.
    Like transformers, it reads the language model's configuration only if the outer one names no end token.
    """
    config = model.config
    outer = getattr(config, "eos_token_id", None)
    sources = (
        model.generation_config.eos_token_id,
        outer if outer is not None else getattr(config.text_config, "eos_token_id", None),
        tokenizer.eos_token_id,
    )
    listed = [each if isinstance(each, list | tuple) else [each] for each in sources]
    return frozenset(int(token) for tokens in listed for token in tokens if token is not None)


def generate(
    model: ElasticVLM,
    inputs: Mapping[str, Any],
    *,
    max_new_tokens: int,
    end_ids: frozenset[int],
    pad_token_id: int,
    num_beams: int = 1,
    on_scores: Callable[[Tensor], None] = lambda scores: None,
) -> Tensor:
    """Generates answers with transformers' `generate`, by greedy decoding or beam search.

    Args:
        model: model in evaluation mode.
        inputs: model inputs of left-padded prompts, with `input_ids` [B, S].
        max_new_tokens: maximum length of an answer, in tokens.
        end_ids: tokens that end an answer, see `end_token_ids`; empty: every answer has the maximum length.
        pad_token_id: token after the end of shorter answers.
        num_beams: number of beams of a beam search; 1: greedy decoding.
        on_scores: called at every step with the logits [B, V], or with the log-probabilities [B x beams, V].

    Returns:
        Token ids [B, at most M].
    """

    def record(_: Tensor, scores: Tensor) -> Tensor:
        on_scores(scores)
        return scores

    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=num_beams,
        eos_token_id=sorted(end_ids) or None,
        pad_token_id=pad_token_id,
    )
    # `generate` fills every setting that is not given from the model's own configuration.
    own, model.generation_config = model.generation_config, settings
    try:
        ids = model.generate(**inputs, generation_config=settings, logits_processor=LogitsProcessorList([record]))
    finally:
        model.generation_config = own
    new: Tensor = ids[:, inputs["input_ids"].shape[1] :]
    return new


def answer_lengths(new_BM: Tensor, end_ids: frozenset[int]) -> tuple[list[int], list[bool]]:
    """Returns the length of each answer, including its end token, and whether it has an end token.

    Tokens after the first end token are padding. An answer without an end token has all M tokens.
    """
    ended_BM = torch.isin(new_BM, torch.tensor(sorted(end_ids), dtype=new_BM.dtype, device=new_BM.device))
    ended_B = ended_BM.any(1)
    return torch.where(ended_B, ended_BM.int().argmax(1) + 1, new_BM.shape[1]).tolist(), ended_B.tolist()


def decode_answers(tokenizer: Any, new_BM: Tensor, lengths: Sequence[int], ended: Sequence[bool]) -> list[str]:
    """Decodes answers without their end token and what follows it, and without outer white space."""
    rows = [ids[: length - has_end] for ids, length, has_end in zip(new_BM.tolist(), lengths, ended, strict=True)]
    return [str(text).strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
