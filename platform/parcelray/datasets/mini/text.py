"""The closed vocabulary of the mini suite, and texts for training a tokenizer."""

from collections.abc import Iterator

from parcelray.datasets.mini.drawing import COLORS
from parcelray.datasets.mini.font import LETTERS, LEXICON
from parcelray.datasets.mini.resolution import FORM_KEYS
from parcelray.datasets.mini.scenes import KINDS, NUMBER_WORDS, PLURALS
from parcelray.datasets.mini.suite import MiniSuite

_PROMPT_WORDS = """
a above all appears at bar bars both bottom caption cell color colors corner count detect digit digits do does down end
equal first frame frames has how image images in is largest last left list many more move no number object objects of
read right row same second shape shapes show spell start tall tallest the top track up violet way what which word yes
and
"""
SYMBOLS = (".", ";", "|")
VOCABULARY = tuple(
    sorted(
        {
            *_PROMPT_WORDS.split(),
            *COLORS,
            *KINDS,
            *PLURALS.values(),
            *NUMBER_WORDS,
            *LEXICON,
            *FORM_KEYS,
            *LETTERS,
            *"0123456789",
        }
    )
)
"""All words of prompts and answers, without location tokens, symbols and numbers of several digits."""


def corpus(count: int = 20_000, seed: int = 0) -> Iterator[str]:
    """Yields prompt and answer of `count` training samples in fixed order, then one line with the whole vocabulary."""
    yield from MiniSuite("train", seed).texts(count)
    yield " ".join((*VOCABULARY, *SYMBOLS))
