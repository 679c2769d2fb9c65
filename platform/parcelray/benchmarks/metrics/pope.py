"""POPE: does the model see objects that are not there (Li et al., EMNLP 2023); the positive class is yes.

Variants:
    official: the first sentence without commas; no if it holds the word No, no or not, else yes (the authors' script,
        LLaVA and the papers on token compression). It reads every answer, so `assumed_yes` counts those that hold
        neither word. Headline F1.
    whole_output: the whole answer must be yes or no in any case (lmms-eval). Headline F1; an answer that is neither is
        wrong and, if the truth is yes, a miss (lmms-eval leaves it out of the recall).
    paligemma: the same reading, without stripping; headline accuracy (big_vision).

The totals are unweighted means over the categories (random, popular, adversarial), as papers report them. `yes_ratio`
is the share of yes among the predictions.

Metadata read: `category` (optional; sub-scores and the mean over them).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from parcelray.benchmarks.metrics.base import (
    UNPARSED,
    UNSCORED,
    Judgement,
    MetricResult,
    count_unparsed,
    scored_mean,
    variants,
)
from parcelray.datasets.sample import Sample

_NAMES = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def read_official(text: str) -> str:
    """`no` if the first sentence denies, else `yes`."""
    return "no" if {"No", "not", "no"} & set(_first_sentence(text).split(" ")) else "yes"


def read_whole_output(text: str) -> str | None:
    """The answer itself, if it is yes or no."""
    return _yes_or_no(text.strip().lower())


def read_paligemma(text: str) -> str | None:
    """The answer itself in lower case, spaces kept."""
    return _yes_or_no(text.lower())


@dataclass(frozen=True)
class Pope:
    """Accuracy, precision, recall, F1 and the ratio of yes."""

    variant: str
    read: Callable[[str], str | None]
    headline: str = "f1"
    name: str = "pope"
    paper_scale: float = 100.0
    additive: bool = False

    def __call__(self, predictions: Sequence[str], samples: Sequence[Sample]) -> MetricResult:
        given = [self.read(prediction) for prediction in predictions]
        truth = [_yes_or_no(sample.answers[0].strip().lower()) if sample.answers else None for sample in samples]
        judged = [_judge(said, right) for said, right in zip(given, truth, strict=True)]
        categories: dict[str, list[tuple[str | None, str]]] = {}
        for said, right, sample in zip(given, truth, samples, strict=True):
            if right is not None:
                categories.setdefault(str(sample.metadata.get("category") or ""), []).append((said, right))
        scores = {category: _scores(pairs) for category, pairs in sorted(categories.items())}
        means = {name: scored_mean(each[name] for each in scores.values()) for name in _NAMES}
        parts = {
            f"category/{category}/{name}": value
            for category, each in scores.items()
            if category
            for name, value in each.items()
        }
        assumed = (
            {"assumed_yes": float(sum(not _says_either(text) for text in predictions))}
            if self.read is read_official
            else {}
        )
        return MetricResult(
            tuple(each.value for each in judged),
            {self.name: means[self.headline]} | means | assumed | parts,
            count_unparsed(judged),
        )


def _judge(said: str | None, right: str | None) -> Judgement:
    if right is None:
        return UNSCORED
    return UNPARSED if said is None else Judgement(float(said == right))


def _scores(pairs: Sequence[tuple[str | None, str]]) -> dict[str, float]:
    hits = sum(said == right == "yes" for said, right in pairs)
    said_yes = sum(said == "yes" for said, _ in pairs)
    are_yes = sum(right == "yes" for _, right in pairs)
    return {
        "accuracy": sum(said == right for said, right in pairs) / len(pairs) if pairs else math.nan,
        "precision": hits / said_yes if said_yes else 0.0,
        "recall": hits / are_yes if are_yes else 0.0,
        # 2PR / (P + R) with P = hits / said_yes and R = hits / are_yes.
        "f1": 2 * hits / (said_yes + are_yes) if said_yes + are_yes else 0.0,
        "yes_ratio": said_yes / len(pairs) if pairs else math.nan,
    }


def _first_sentence(text: str) -> str:
    return text.split(".")[0].replace(",", "")


def _says_either(text: str) -> bool:
    return bool({"yes", "no", "not"} & set(_first_sentence(text).lower().split(" ")))


def _yes_or_no(text: str) -> str | None:
    return text if text in ("yes", "no") else None


POPE = variants(
    (
        Pope("official", read_official),
        Pope("whole_output", read_whole_output),
        Pope("paligemma", read_paligemma, headline="accuracy"),
    )
)
