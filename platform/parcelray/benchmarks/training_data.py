"""Opens the data sources and held-out samples of a data configuration."""

from pathlib import Path
from typing import Any, Literal

from parcelray.benchmarks.catalog import catalog, find
from parcelray.benchmarks.open import open_reader
from parcelray.benchmarks.reader_source import ReaderSource
from parcelray.config.benchmark import EasyVqaSource, TableSource
from parcelray.config.data import (
    BenchmarkDataConfig,
    ConversationsDataConfig,
    DataConfig,
    HeldOut,
    HubDataConfig,
    MiniDataConfig,
    MixtureDataConfig,
    NlvrDataConfig,
    ParquetDataConfig,
)
from parcelray.datasets.conversations.files import expand
from parcelray.datasets.conversations.source import ConversationSource
from parcelray.datasets.mini.suite import MiniSuite, family_samples
from parcelray.datasets.mixture import MixtureSource
from parcelray.datasets.nlvr.source import PERMUTATIONS, CorpusSplit, NlvrSource, Part
from parcelray.datasets.parquet import ParquetSource
from parcelray.datasets.sample import Sample
from parcelray.datasets.source import SampleSource
from parcelray.errors import UserError

Split = Literal["train", "validation", "test"]
_NLVR_PARTS: dict[Split, tuple[CorpusSplit, Part]] = {
    "train": ("dev", "train"),
    "validation": ("dev", "validation"),
    "test": ("test", "all"),
}
_PICTURES_PER_SET = len(PERMUTATIONS)


def training_source(config: DataConfig, image_size: int) -> SampleSource:
    """Opens the training split of a data configuration.

    Args:
        config: data configuration of the job.
        image_size: side of the model's input images, pixels.

    Raises:
        UserError: the data are missing or malformed.
    """
    return _source(config, "train", image_size)


def held_out_samples(
    config: DataConfig, split: Literal["validation", "test"], count: int, image_size: int
) -> list[Sample]:
    """Reads about `count` held-out samples, the same in every call.

    The count is per family of the mini suite and of parquet files, per question kind of NLVR, and per other source.
    """
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
    if isinstance(config, MixtureDataConfig):
        return [
            sample for member in config.sources for sample in held_out_samples(member.data, split, count, image_size)
        ]
    source = _source(config, split, image_size)
    if isinstance(source, ConversationSource | ReaderSource):
        return source.questions(count)
    chosen: dict[str, list[Sample]] = {}
    for group in source.groups:
        for index in range(group.size or 0):
            sample = source.get(group.name, index)
            members = chosen.setdefault(sample.family, [])
            if len(members) < count:
                members.append(sample)
    return [sample for members in chosen.values() for sample in members]


def data_paths(config: DataConfig) -> tuple[str, ...]:
    """Returns the local files and folders that every host reads the data from; none for what is generated or remote."""
    if isinstance(config, MixtureDataConfig):
        return tuple(path for member in config.sources for path in data_paths(member.data))
    if isinstance(config, ConversationsDataConfig):
        images = (config.images,) if config.images is not None else ()
        return tuple(file for pattern in (config.path, *images) for file in _local_files(str(pattern)))
    if isinstance(config, HubDataConfig):
        return _local_files(str(config.path)) if config.path is not None else ()
    if isinstance(config, BenchmarkDataConfig):
        return (str(config.data),) if config.data is not None else ()
    return () if isinstance(config, MiniDataConfig) else (str(config.path),)


def _local_files(pattern: str) -> tuple[str, ...]:
    if "://" in pattern:
        return ()
    return (pattern,) if Path(pattern).exists() else tuple(expand(pattern))


def check_rows(config: DataConfig) -> dict[str, str]:
    """Checks the structure of all rows that a training reads, without decoding images.

    The rows of the other sources are made, or are checked when the source is opened.

    Returns:
        The reasons of the rows that are skipped, by row id.

    Raises:
        BadRowsError: the message names the first rows that cannot be used.
        UserError: the data are missing or malformed.
    """
    if isinstance(config, NlvrDataConfig):
        # The corpus is looked for when the source is created; its rows are read later.
        _nlvr(config, "train", image_size=1, questions=config.questions)
    if isinstance(config, ConversationsDataConfig | HubDataConfig):
        source = ConversationSource(config)
        source.check()
        return source.problems
    if isinstance(config, MixtureDataConfig):
        return {name: reason for member in config.sources for name, reason in check_rows(member.data).items()}
    if isinstance(config, ParquetDataConfig):
        for split in ("train", "validation"):
            ParquetSource(Path(config.path) / split).check()
    return {}


def _spread(source: NlvrSource, count: int) -> list[Sample]:
    """Reads blocks of six consecutive samples, evenly spread over the split.

    For statements, a block is all permutations of one set of boxes.
    """
    samples = []
    for group in source.groups:
        blocks = (group.size or 0) // _PICTURES_PER_SET
        num_chosen = min(blocks, max(1, count // _PICTURES_PER_SET))
        for block in (number * blocks // num_chosen for number in range(num_chosen)):
            first = block * _PICTURES_PER_SET
            samples += [source.get(group.name, index) for index in range(first, first + _PICTURES_PER_SET)]
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
    if isinstance(config, ConversationsDataConfig | HubDataConfig):
        return ConversationSource(config, split)
    if isinstance(config, BenchmarkDataConfig):
        return _benchmark(config, split, image_size)
    if isinstance(config, MixtureDataConfig):
        return MixtureSource(config, tuple(_source(member.data, split, image_size) for member in config.sources))
    return ParquetSource(Path(config.path) / split)


def _nlvr(config: NlvrDataConfig, split: Split, image_size: int, questions: tuple[str, ...]) -> NlvrSource:
    # Training uses the development split, of which some directories are held out for validation. The training split of
    # the corpus is not used.
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


def _benchmark(config: BenchmarkDataConfig, split: Split, image_size: int) -> ReaderSource:
    found = find(config.name, catalog([Path(path) for path in config.catalog]))
    source = found.source
    if isinstance(source, TableSource):
        changed: dict[str, Any] = {"splits": (config.split,), "rows": None}
    elif isinstance(source, EasyVqaSource):
        changed = {"split": config.split}
    else:
        raise UserError(
            f"{config.name} has a training split of its own; write data: {{type: {source.type}}}, or describe the rows"
            " as conversations."
        )
    found = found.model_copy(update={"source": source.model_copy(update=changed)})
    data = Path(config.data) if config.data is not None else None
    reader = open_reader(found, family=config.prompt_family, data=data, image_size=image_size, at_random=True)
    held_out = HeldOut(validation=config.validation, seed=config.seed)
    return ReaderSource(reader, held_out, split, config.max_bad_rows, config.rows_per_sample)
