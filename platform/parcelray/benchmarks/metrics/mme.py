"""MME (Fu et al., 2023): two yes/no questions per image; a subtask scores accuracy + accuracy+ in percent.

accuracy: share of correct questions. accuracy+: share of images with both questions correct. A subtask has at most 200
points. Perception is the sum of 10 subtasks (0 to 2000 points), cognition of 4 (0 to 800). The headline is the sum of
the parts that are present. A subset of rows does not preserve these points.

A prediction is parsed as yes or no if it is yes, no, y or n, or contains yes or no within its first four characters.
Anything else is wrong and counted as unparsed. An image without exactly two scored questions is left out and counted in
`incomplete_images`.

Metadata read: `category` (required; name of the subtask), `image_id` (required; shared by the two questions of an
image).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from parcelray.benchmarks.metrics.base import (
    UNPARSED,
    UNSCORED,
    Judgement,
    MetricResult,
    count_unparsed,
    needed,
    scored_mean,
    variants,
    wrong_metadata,
)
from parcelray.datasets.sample import Sample
from parcelray.errors import UserError

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_PREFIX = 4
_PAIR = 2


def read_yes_no(text: str) -> str | None:
    """Parses `yes` or `no`; None if the text is neither."""
    answer = text.lower().strip().replace(".", "")
    if len(answer) == 1:
        return {"y": "yes", "n": "no"}.get(answer)
    return next((word for word in ("yes", "no") if word in answer[:_PREFIX]), None)


@dataclass(frozen=True)
class Mme:
    """Sum of the points of all subtasks."""

    name: str = "mme"
    variant: str = "official"
    additive: bool = False
    paper_scale: float = 1.0

    def __call__(self, predictions: Sequence[str], samples: Sequence[Sample]) -> MetricResult:
        judged = [_judge(prediction, sample) for prediction, sample in zip(predictions, samples, strict=True)]
        pairs: dict[tuple[str, str], list[float]] = {}
        for judgement, sample in zip(judged, samples, strict=True):
            if sample.metadata.get("image_id") is None:
                raise wrong_metadata(sample, "image_id", "an id that the two questions of an image share", self.name)
            pairs.setdefault((_subtask(sample), str(sample.metadata["image_id"])), []).append(judgement.value)
        whole = {
            key: pair
            for key, pair in pairs.items()
            if len(pair) == _PAIR and not any(math.isnan(value) for value in pair)
        }
        totals = {self.name: math.nan} | _points(whole) | {"incomplete_images": float(len(pairs) - len(whole))}
        totals[self.name] = (
            math.fsum(totals[part] for part in ("perception", "cognition") if part in totals) if whole else math.nan
        )
        return MetricResult(tuple(judgement.value for judgement in judged), totals, count_unparsed(judged))


def _judge(prediction: str, sample: Sample) -> Judgement:
    target = read_yes_no(sample.answers[0]) if sample.answers else None
    if target is None:
        return UNSCORED
    given = read_yes_no(prediction)
    return UNPARSED if given is None else Judgement(float(given == target))


def _subtask(sample: Sample) -> str:
    category = needed(sample, "category", str, "mme")
    if category not in PERCEPTION + COGNITION:
        raise UserError(
            f"MME has no subtask {category!r} (sample {sample.id!r}); legal: {', '.join(PERCEPTION + COGNITION)}."
        )
    return category


def _points(pairs: dict[tuple[str, str], list[float]]) -> dict[str, float]:
    totals = {
        "accuracy": scored_mean(value for pair in pairs.values() for value in pair),
        "accuracy_plus": _plus(list(pairs.values())),
    }
    for part, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        points = {}
        for subtask in subtasks:
            members = [pair for (category, _), pair in pairs.items() if category == subtask]
            if members:
                points[f"{part}/{subtask}"] = 100 * (
                    scored_mean(value for pair in members for value in pair) + _plus(members)
                )
        if points:
            totals |= {part: math.fsum(points.values()), **points}
    return totals


def _plus(pairs: Sequence[Sequence[float]]) -> float:
    return scored_mean(float(all(pair)) for pair in pairs)


MME = variants((Mme(),))
