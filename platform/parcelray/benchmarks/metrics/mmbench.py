"""MMBench (Liu et al., ECCV 2024): a question is right only if it is right in every rotation of its options.

Variants:
    circular: as in the paper. Rows of one question share their index modulo a million.
    vanilla: only the first rotation of each question. Scores are several points higher; never mix them with circular.

Predictions are parsed by the rules of `multiple_choice:option`, which are VLMEvalKit's. It calls a judge model where no
rule applies (lmms-eval does too); here such a prediction is wrong and counted as unparsed. There is one value per row,
so the headline is not the mean of the values.

Metadata read: `index` (required; unique), `choices` (required; an empty choice keeps its letter), `category` (optional;
sub-scores). The first answer is the correct letter.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from parcelray.benchmarks.metrics.base import (
    MetricResult,
    count_unparsed,
    needed,
    scored_mean,
    variants,
    wrong_metadata,
)
from parcelray.benchmarks.metrics.multiple_choice import judge_choice, read_option
from parcelray.datasets.sample import Sample

_ROTATION = 1_000_000


@dataclass(frozen=True)
class MMBench:
    """Accuracy over questions."""

    variant: str
    name: str = "mmbench"
    additive: bool = False
    paper_scale: float = 100.0

    def __call__(self, predictions: Sequence[str], samples: Sequence[Sample]) -> MetricResult:
        judged = [
            judge_choice(read_option, prediction, sample, self.name)
            for prediction, sample in zip(predictions, samples, strict=True)
        ]
        values = tuple(judgement.value for judgement in judged)
        rotations: dict[int, dict[int, tuple[float, Sample]]] = {}
        for value, sample in zip(values, samples, strict=True):
            index = needed(sample, "index", int, self.name)
            rows = rotations.setdefault(index % _ROTATION, {})
            if index in rows:
                raise wrong_metadata(sample, "index", "every row another index", self.name)
            rows[index] = (value, sample)
        questions = {
            question: self._question([rows[index] for index in sorted(rows)]) for question, rows in rotations.items()
        }
        totals = {self.name: scored_mean(value for value, _ in questions.values()), "rows": scored_mean(values)}
        return MetricResult(values, totals | _by_category(questions), count_unparsed(judged))

    def _question(self, rows: Sequence[tuple[float, Sample]]) -> tuple[float, str]:
        """Returns the value and category of a question. The value is NaN if a counted row cannot be scored."""
        counted = rows if self.variant == "circular" else rows[:1]
        values = [value for value, _ in counted]
        return (math.nan if any(math.isnan(value) for value in values) else float(all(values))), str(
            rows[0][1].metadata.get("category") or ""
        )


def _by_category(questions: dict[int, tuple[float, str]]) -> dict[str, float]:
    names = sorted({category for _, category in questions.values() if category})
    return {
        f"category/{name}": scored_mean(value for value, category in questions.values() if category == name)
        for name in names
    }


MMBENCH = variants((MMBench("circular"), MMBench("vanilla")))
