"""From a data configuration to the samples that a run reads."""

from pathlib import Path
from typing import Literal

from parcelray.config.data import DataConfig, MiniDataConfig, NlvrDataConfig
from parcelray.datasets.mini.suite import MiniSuite, family_samples
from parcelray.datasets.nlvr.source import PERMUTATIONS, CorpusSplit, NlvrSource, Part
from parcelray.datasets.parquet import ParquetSource
from parcelray.datasets.sample import Sample
from parcelray.datasets.source import SampleSource

Split = Literal["train", "validation", "test"]
_NLVR_PARTS: dict[Split, tuple[CorpusSplit, Part]] = {
    "train": ("dev", "train"),
    "validation": ("dev", "validation"),
    "test": ("test", "all"),
}
_PICTURES_OF_A_SENTENCE = len(PERMUTATIONS)


def training_source(config: DataConfig, image_size: int) -> SampleSource:
    """What a training reads.

    Args:
        config: the job's data.
        image_size: side of the model's input images, pixels.

    Raises:
        UserError: the data are not there or not as expected.
    """
    return _source(config, "train", image_size)


def held_out_samples(
    config: DataConfig, split: Literal["validation", "test"], count: int, image_size: int
) -> list[Sample]:
    """About `count` samples of each family (mini suite, parquet) or question kind (NLVR), always the same ones."""
    if isinstance(config, MiniDataConfig):
        return [
            sample
            for family in config.families
            for sample in family_samples(split, family, count, seed=config.seed, image_size=image_size)
        ]
    if isinstance(config, NlvrDataConfig):
        return [
            sample
            for question in config.questions
            for sample in _spread(_nlvr(config, split, image_size, (question,)), count)
        ]
    source = _source(config, split, image_size)
    chosen: dict[str, list[Sample]] = {}
    for group in source.groups:
        for index in range(group.size or 0):
            sample = source.get(group.name, index)
            members = chosen.setdefault(sample.family, [])
            if len(members) < count:
                members.append(sample)
    return [sample for members in chosen.values() for sample in members]


def _spread(source: NlvrSource, count: int) -> list[Sample]:
    """Blocks of six samples in a row (for statements: whole sentences, as consistency needs them), evenly over the split."""
    samples = []
    for group in source.groups:
        blocks = (group.size or 0) // _PICTURES_OF_A_SENTENCE
        wanted = min(blocks, max(1, count // _PICTURES_OF_A_SENTENCE))
        for block in (number * blocks // wanted for number in range(wanted)):
            first = block * _PICTURES_OF_A_SENTENCE
            samples += [source.get(group.name, index) for index in range(first, first + _PICTURES_OF_A_SENTENCE)]
    return samples


def _source(config: DataConfig, split: Split, image_size: int) -> SampleSource:
    if isinstance(config, MiniDataConfig):
        return MiniSuite(
            split=split,
            seed=config.seed,
            families=config.families,
            dense_fraction=config.dense_fraction,
            image_size=image_size,
        )
    if isinstance(config, NlvrDataConfig):
        return _nlvr(config, split, image_size, config.questions)
    return ParquetSource(Path(config.path) / split)


def _nlvr(config: NlvrDataConfig, split: Split, image_size: int, questions: tuple[str, ...]) -> NlvrSource:
    # The development split is trained on, and a part of its directories kept for validation; the corpus's training
    # split is not needed.
    corpus_split, part = _NLVR_PARTS[split]
    return NlvrSource(
        Path(config.path),
        corpus_split,
        part,
        view=config.view,
        questions=questions,
        seed=config.seed,
        image_size=image_size,
    )
