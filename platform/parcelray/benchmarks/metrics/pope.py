"""POPE: object hallucination, with yes as the positive class (Li et al., EMNLP 2023).

Variants:
    official: a prediction is no if its first sentence, without commas, contains the word No, no or not; else yes (the
        authors' script, LLaVA and the papers on token compression). Every prediction is parsed, so `assumed_yes`
        counts the predictions that contain neither yes nor no. Headline: F1.
    whole_output: the whole prediction must be yes or no in any case (lmms-eval). Headline: F1. A prediction that is
        neither is wrong and, if the answer is yes, a false negative (lmms-eval leaves it out of the recall).
    paligemma: like whole_output, but without stripping (big_vision). Headline: accuracy.

The totals are unweighted means over the categories (random, popular, adversarial), as in papers. `yes_ratio` is the
share of yes among the predictions.

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
    """Returns `no` if the first sentence contains No, no or not; else `yes`."""
    return "no" if {"No", "not", "no"} & set(_first_sentence(text).split(" ")) else "yes"


def read_whole_output(text: str) -> str | None:
    """Returns the stripped prediction in lower case if it is yes or no, else None."""
    return _yes_or_no(text.strip().lower())


def read_paligemma(text: str) -> str | None:
    """Returns the prediction in lower case, spaces kept, if it is yes or no, else None."""
    return _yes_or_no(text.lower())


@dataclass(frozen=True)
class Pope:
    """Accuracy, precision, recall, F1 and the share of yes."""

    variant: str
    read: Callable[[str], str | None]
    headline: str = "f1"
    name: str = "pope"
    paper_scale: float = 100.0
    additive: bool = False

    def __call__(self, predictions: Sequence[str], samples: Sequence[Sample]) -> MetricResult:
        given = [self.read(prediction) for prediction in predictions]
        truth = [_yes_or_no(sample.answers[0].strip().lower()) if sample.answers else None for sample in samples]
        judged = [_judge(parsed, target) for parsed, target in zip(given, truth, strict=True)]
        categories: dict[str, list[tuple[str | None, str]]] = {}
        for parsed, target, sample in zip(given, truth, samples, strict=True):
            if target is not None:
                categories.setdefault(str(sample.metadata.get("category") or ""), []).append((parsed, target))
        scores = {category: _scores(pairs) for category, pairs in sorted(categories.items())}
        means = {name: scored_mean(each[name] for each in scores.values()) for name in _NAMES}
        parts = {
            f"category/{category}/{name}": value
            for category, each in scores.items()
            if category
            for name, value in each.items()
        }
        assumed = (
            {"assumed_yes": float(sum(not _contains_yes_or_no(text) for text in predictions))}
            if self.read is read_official
            else {}
        )
        return MetricResult(
            tuple(each.value for each in judged),
            {self.name: means[self.headline]} | means | assumed | parts,
            count_unparsed(judged),
        )


def _judge(parsed: str | None, target: str | None) -> Judgement:
    if target is None:
        return UNSCORED
    return UNPARSED if parsed is None else Judgement(float(parsed == target))


def _scores(pairs: Sequence[tuple[str | None, str]]) -> dict[str, float]:
    hits = sum(parsed == target == "yes" for parsed, target in pairs)
    predicted_yes = sum(parsed == "yes" for parsed, _ in pairs)
    actual_yes = sum(target == "yes" for _, target in pairs)
    return {
        "accuracy": sum(parsed == target for parsed, target in pairs) / len(pairs) if pairs else math.nan,
        "precision": hits / predicted_yes if predicted_yes else 0.0,
        "recall": hits / actual_yes if actual_yes else 0.0,
        # 2PR / (P + R) with P = hits / predicted_yes and R = hits / actual_yes.
        "f1": 2 * hits / (predicted_yes + actual_yes) if predicted_yes + actual_yes else 0.0,
        "yes_ratio": predicted_yes / len(pairs) if pairs else math.nan,
    }


def _first_sentence(text: str) -> str:
    return text.split(".")[0].replace(",", "")


def _contains_yes_or_no(text: str) -> bool:
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
