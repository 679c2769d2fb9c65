"""CIDEr-D over a corpus of captions (Vedantam et al., CVPR 2015), as coco-caption and pycocoevalcap compute it.

The n-gram weights come from the references of the whole evaluated set. The score of a subset, or a bootstrap mean of
the values, is therefore a different metric. The values are 0 to 10; papers print 100 times their mean.

Variants:
    ptb: tokens by Penn Treebank rules in lower case, punctuation removed (`caption_tokens`).
    pretokenized: captions that are tokens separated by spaces already.

All references of an image count; give them all as the sample's answers.

The tokens follow coco-caption, without its Java runtime: the Stanford tokenizer in lower case, then without its list
of punctuation tokens. Clitics are split off (`do n't`, `man 's`). Numbers, abbreviations, file names and words with
hyphens or slashes stay whole. Brackets become `-lrb-` and so on, and runs of `?` and `!` stay: the official list of
punctuation contains neither of them.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from parcelray.benchmarks.metrics.base import MetricResult, scored_mean, variants
from parcelray.datasets.sample import Sample

_ORDERS = 4
_SIGMA = 6.0
_SCALE = 10.0

Ngram = tuple[str, ...]
Tokens = Sequence[str]


class _Weighted(NamedTuple):
    """A caption as one tf-idf vector per n-gram order."""

    weights: tuple[dict[Ngram, float], ...]
    norms: tuple[float, ...]
    length: int
    """Number of bigrams, which the official code uses as length."""


def cider_d(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """Returns the CIDEr-D of each caption against its references, 0 to 10.

    Args:
        captions: tokens of each caption.
        references: for each caption, the tokens of its references (at least one).
    """
    documents = [[_ngrams(reference) for reference in each] for each in references]
    frequencies = Counter(ngram for each in documents for ngram in set().union(*each))
    log_size = math.log(len(documents)) if documents else 0.0
    idf = {ngram: log_size - math.log(count) for ngram, count in frequencies.items()}
    scores = []
    for caption, each in zip(captions, documents, strict=True):
        candidate = _weighted(_ngrams(caption), idf, log_size)
        scores.append(
            _SCALE * sum(_similarity(candidate, _weighted(reference, idf, log_size)) for reference in each) / len(each)
        )
    return scores


@dataclass(frozen=True)
class Cider:
    """Mean CIDEr-D over a corpus."""

    variant: str
    tokens: Callable[[str], list[str]]
    name: str = "cider"
    additive: bool = False
    paper_scale: float = 100.0

    def __call__(self, predictions: Sequence[str], samples: Sequence[Sample]) -> MetricResult:
        pairs = list(zip(predictions, samples, strict=True))
        scored = [
            (self.tokens(prediction), [self.tokens(answer) for answer in sample.answers])
            for prediction, sample in pairs
            if sample.answers
        ]
        scores = iter(cider_d([caption for caption, _ in scored], [references for _, references in scored]))
        values = tuple(next(scores) if sample.answers else math.nan for sample in samples)
        return MetricResult(values, {self.name: scored_mean(values)}, 0)


def _ngrams(tokens: Tokens) -> Counter[Ngram]:
    return Counter(
        tuple(tokens[start : start + order])
        for order in range(1, _ORDERS + 1)
        for start in range(len(tokens) - order + 1)
    )


def _weighted(counts: Counter[Ngram], idf: dict[Ngram, float], unseen: float) -> _Weighted:
    weights: tuple[dict[Ngram, float], ...] = tuple({} for _ in range(_ORDERS))
    for ngram, count in counts.items():
        weights[len(ngram) - 1][ngram] = count * idf.get(ngram, unseen)
    norms = tuple(math.sqrt(sum(weight**2 for weight in each.values())) for each in weights)
    return _Weighted(weights, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2))


def _similarity(candidate: _Weighted, reference: _Weighted) -> float:
    """Returns the mean over the orders of the clipped cosine, times the penalty for a difference in length."""
    total = 0.0
    for ours, theirs, norm, other_norm in zip(
        candidate.weights, reference.weights, candidate.norms, reference.norms, strict=True
    ):
        if norm and other_norm:
            overlap = sum(
                min(weight, theirs[ngram]) * theirs[ngram] for ngram, weight in ours.items() if ngram in theirs
            )
            total += overlap / (norm * other_norm)
    difference = candidate.length - reference.length
    return total / _ORDERS * math.exp(-(difference**2) / (2 * _SIGMA**2))


_REMOVED = frozenset({'"', "''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"})
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_TYPOGRAPHY = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": " -- ", "\u2014": " -- ", "\u2026": "..."}
)
_ABBREVIATIONS = (
    "mr|mrs|ms|dr|prof|st|ave|blvd|jr|sr|vs|etc|inc|ltd|co|corp|dept|est|gen|gov|sen|rep|rev|lt|col|sgt|capt|mt|ft|"
    "jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec"
)
_TOKEN = re.compile(
    rf"""
    <[^<>\s]+>                                     # a tag
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)+                 # an address
    | (?:https?://|www\.)[^\s,;]+
    | (?:[^\W\d_]\.){{2,}}                         # u.s.
    | ph\.d\.?
    | (?:{_ABBREVIATIONS})\.(?=\s|,|$)
    | no\.(?=\s*\d)
    | [@\#][^\W\d]\w*                              # names and tags
    | \d+(?:[.,:/]\d+)*(?:[\w/-]*\w)?              # 3.5-inch, 1,000, 10:30, 1/2
    | '(?:tis|twas)\b | n't\b | y'(?=all\b)
    | o'clock\b | ma'am\b | [odl]'(?=[^\W\d_])\w+
    | [^\W\d_]\w*(?:[-/._&]\w+)*                   # a word, and its parts
    | '(?:s|re|ve|ll|d|m)\b
    | '\d0s | \.{{2,}} | -{{2,}} | [?!]+ | \S
    """,
    re.VERBOSE,
)
_NEGATION = re.compile(r"(?<=[^\W\d_])n't\b")
_PAIRS = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "wanna": ("wan", "na"),
    "gimme": ("gim", "me"),
    "lemme": ("lem", "me"),
    "'tis": ("'t", "is"),
    "'twas": ("'t", "was"),
}


def caption_tokens(text: str) -> list[str]:
    """Returns the tokens of a caption in lower case, without punctuation."""
    clean = _NEGATION.sub(" n't", text.lower().translate(_TYPOGRAPHY))
    tokens = (part for token in _TOKEN.findall(clean) for part in _PAIRS.get(token, (_BRACKETS.get(token, token),)))
    return [token for token in tokens if not _is_removed(token)]


def _is_removed(token: str) -> bool:
    return token in _REMOVED or not token.strip(".") or not token.strip("-")


CIDER = variants((Cider("ptb", caption_tokens), Cider("pretokenized", str.split)))
