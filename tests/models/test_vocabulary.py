"""New words of a tokenizer: single tokens with distinct embeddings, and nothing else changes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from parcelray.errors import UserError
from parcelray.models.backbones import ElasticVLM
from parcelray.models.checkpoint import resolve_checkpoint
from parcelray.models.vlm import load_processor, load_vlm
from parcelray.models.vocabulary import add_words

WORDS = ("gray", "teal", "rectangle", "contain")
LARGEST_COSINE = 0.8


def _embeddings(model: ElasticVLM) -> Tensor:
    found = model.get_input_embeddings()
    assert isinstance(found, torch.nn.Embedding)
    return found.weight.detach()


def test_new_words_are_single_tokens_with_distinct_embeddings(tmp_path: Path) -> None:
    base = resolve_checkpoint("mini_base").path
    model, processor = load_vlm(base), load_processor(base)
    before, known = load_processor(base).tokenizer, _embeddings(load_vlm(base))
    add_words(model, processor, (*WORDS, "red"))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, processor = load_vlm(tmp_path), load_processor(tmp_path)
    ids = [processor.encode_text([word])[0] for word in WORDS]
    assert all(len(each) == 1 and each[0] >= len(before) for each in ids)
    assert processor.tokenizer.decode([number for each in ids for number in each]).split() == list(WORDS)
    assert processor.tokenizer.convert_ids_to_tokens(range(len(before))) == before.convert_ids_to_tokens(
        range(len(before))
    )
    unchanged = "answer en what color is the circle? red 12 <loc0123>"
    assert processor.tokenizer(unchanged)["input_ids"] == before(unchanged)["input_ids"]
    weights_VD = _embeddings(model)
    assert torch.equal(weights_VD[: len(before)], known[: len(before)])
    # Means of the former tokens have cosines of 0.98 to 1.00 here, and a training did not learn to tell them apart.
    units_WD = normalize(torch.stack([weights_VD[each[0]] for each in ids]), dim=1)
    assert float((units_WD @ units_WD.T - torch.eye(len(ids))).max()) < LARGEST_COSINE


def test_a_word_with_a_space_is_refused() -> None:
    base = resolve_checkpoint("mini_base").path
    with pytest.raises(UserError, match="new_words has 'light blue'"):
        add_words(load_vlm(base), load_processor(base), ["light blue"])
