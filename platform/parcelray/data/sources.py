"""From a data configuration to the samples that a run reads."""

from pathlib import Path
from typing import Literal

from parcelray.benchmarks.mini.suite import MiniSuite, family_samples
from parcelray.benchmarks.nlvr import NlvrSource
from parcelray.config.data import DataConfig, MiniDataConfig, NlvrDataConfig
from parcelray.data.parquet_source import ParquetSource
from parcelray.data.sample import Sample
from parcelray.data.source import SampleSource

Split = Literal["train", "validation", "test"]


def training_source(config: DataConfig, image_size: int) -> SampleSource:
    """What a training reads.

    Args:
        config: the job's data.
        image_size: side of the model's input images, pixels.

    Raises:
        UserError: the data are not there or not as expected.
    """
    return _source(config, "train", image_size)


def held_out_samples(config: DataConfig, split: Literal["validation", "test"], count: int, image_size: int) -> list[Sample]:
    """The first `count` samples of each family (mini suite), question kind (NLVR) or family of a parquet folder, in a fixed order."""
    if isinstance(config, MiniDataConfig):
        return [sample for family in config.families for sample in family_samples(split, family, count, seed=config.seed, image_size=image_size)]
    source = _source(config, split, image_size)
    chosen: dict[str, list[Sample]] = {}
    for group in source.groups:
        for index in range(group.size or 0):
            sample = source.get(group.name, index)
            members = chosen.setdefault(f"{sample.family}/{sample.task}", [])
            if len(members) < count:
                members.append(sample)
    return [sample for members in chosen.values() for sample in members]


def _source(config: DataConfig, split: Split, image_size: int) -> SampleSource:
    if isinstance(config, MiniDataConfig):
        return MiniSuite(split=split, seed=config.seed, families=config.families, dense_fraction=config.dense_fraction, image_size=image_size)
    if isinstance(config, NlvrDataConfig):
        return _nlvr(config, split, image_size)
    return ParquetSource(Path(config.path) / split)


def _nlvr(config: NlvrDataConfig, split: Split, image_size: int) -> SampleSource:
    # The training split of the corpus is not needed: the development split is trained on, a part of its directories kept for validation.
    corpus_split, part = ("test", "all") if split == "test" else ("dev", split)
    return NlvrSource(Path(config.path), corpus_split, part, view=config.view, questions=config.questions, seed=config.seed, image_size=image_size)
