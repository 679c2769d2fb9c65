"""Scores of one checkpoint on held-out samples, at every budget in one pass, beside the majority class and the blind model."""

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from parcelray.config.data import DataConfig
from parcelray.data.sample import Sample
from parcelray.data.sources import held_out_samples, training_source
from parcelray.evaluation.predictor import BLIND, Predictor
from parcelray.evaluation.score import Score, score
from parcelray.models.processor import ElasticPaliGemmaProcessor
from parcelray.models.vlm import load_vlm, use_sdpa_where_exact

_MAJORITY_SAMPLES = 2000
"""Training samples that the majority answers are counted over."""


def score_checkpoint(model_folder: Path, samples: Sequence[Sample], budgets: Sequence[int]) -> dict[int, list[Score]]:
    """Scores a checkpoint at several budgets; 0 is the blind model, which sees no image.

    Each image passes the vision tower once, whatever the number of budgets.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = ElasticPaliGemmaProcessor.from_pretrained(model_folder)
    model = load_vlm(model_folder).eval().to(device)
    use_sdpa_where_exact(model)
    predictions = Predictor(model, processor, device=device).generate_budgets(samples, budgets)
    return {budget: score(samples, predictions[budget], num_visual_tokens=budget) for budget in budgets}


def score_majority(data: DataConfig, samples: Sequence[Sample], image_size: int) -> list[Score]:
    """Scores of always giving the answer that is most frequent for the task in the training data."""
    answers = dict(_majority_answers(data, image_size))
    return score(samples, [answers.get(sample.task, "") for sample in samples], num_visual_tokens=BLIND)


def held_out(data: DataConfig, count: int, model_folder: Path) -> list[Sample]:
    """The first `count` test samples of each family or question kind, at the checkpoint's image size."""
    return held_out_samples(data, "test", count, image_size_of(model_folder))


def image_size_of(model_folder: Path) -> int:
    """Side of a checkpoint's input images, pixels."""
    return int(ElasticPaliGemmaProcessor.from_pretrained(model_folder).image_processor.size["height"])


@functools.lru_cache(maxsize=8)
def _majority_answers(data: DataConfig, image_size: int) -> tuple[tuple[str, str], ...]:
    source = training_source(data, image_size)
    counts: dict[str, Counter[str]] = {}
    for group in source.groups:
        share = min(group.size or _MAJORITY_SAMPLES, max(1, round(_MAJORITY_SAMPLES * group.weight)))
        for index in range(share):
            sample = source.get(group.name, index)
            counts.setdefault(sample.task, Counter())[sample.answers[0]] += 1
    return tuple((task, counter.most_common(1)[0][0]) for task, counter in counts.items())
