"""Adds words to a checkpoint's tokenizer and embeddings; the ids of all existing tokens stay the same."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import normalize

from parcelray.errors import UserError
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor

_MULTIPLE = 64
"""The number of embeddings is a multiple of this, which keeps the output head's matrix product on aligned shapes."""


def add_words(model: ElasticVLM, processor: ElasticProcessor, words: Sequence[str]) -> None:
    """Makes each word a single token, whose embedding starts from the mean of those of its former tokens.

    The part of the mean that all embeddings of the vocabulary have in common is removed. Where the base has hardly seen
    the former tokens, this part is nearly all of their embeddings: the new words would start as almost the same vector.

    A new token is the last merge of the byte-pair tokenizer, so a text is encoded as before up to the new merges. The
    tokens that lead to a word are new, too.

    Args:
        model: changed in place; it gets more embeddings if it has no unused ones.
        processor: changed in place.
        words: words as they stand inside a text, without spaces.

    Raises:
        UserError: the tokenizer has another type than byte-pair encoding.
    """
    tokenizer = processor.tokenizer
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    if content["model"]["type"] != "BPE":
        raise UserError(
            f"new_words needs a byte-pair tokenizer, but the checkpoint's is of type {content['model']['type']}; remove"
            " new_words."
        )
    # Tokens that are not in the model's own vocabulary would be numbered again, after its new tokens.
    vocabulary: dict[str, int] = content["model"]["vocab"]
    vocabulary |= {token["content"]: token["id"] for token in content["added_tokens"]}
    first = len(tokenizer)
    parts: dict[int, list[int]] = {}
    for word, ids in zip(words, processor.encode_text(words), strict=True):
        if any(character.isspace() for character in word) or not ids:
            raise UserError(f"new_words has {word!r}; give single words without spaces.")
        left, *rest = tokenizer.convert_ids_to_tokens(ids)
        for count, right in enumerate(rest, 2):
            if left + right not in vocabulary:
                vocabulary[left + right] = first + len(parts)
                parts[vocabulary[left + right]] = ids[:count]
                content["model"]["merges"].append([left, right])
            left += right
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    embeddings, _ = _embeddings(model)
    needed = first + len(parts)
    if needed > len(embeddings):
        resize: Any = model.resize_token_embeddings  # typed as a tensor by torch
        resize(needed, pad_to_multiple_of=_MULTIPLE, mean_resizing=False)
    with torch.no_grad():
        for weights_VD in set(_embeddings(model)):
            common_D = normalize(weights_VD[:first].float().mean(dim=0), dim=0)
            for new, former in parts.items():
                mean_D = weights_VD[former].float().mean(dim=0)
                weights_VD[new] = mean_D - (mean_D @ common_D) * common_D


def _embeddings(model: ElasticVLM) -> tuple[Tensor, Tensor]:
    """Returns the input and the output embeddings, [V, D]; they can be one tensor."""
    embeddings, head = model.get_input_embeddings(), model.lm_head
    assert isinstance(embeddings, torch.nn.Embedding)
    assert isinstance(head, torch.nn.Linear)
    return embeddings.weight, head.weight
