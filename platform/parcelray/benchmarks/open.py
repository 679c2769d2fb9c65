"""Opens the reader that belongs to a benchmark's configuration."""

from pathlib import Path

from parcelray.benchmarks.readers.base import BenchmarkReader
from parcelray.benchmarks.readers.easy_vqa import EasyVqaReader, easy_vqa_folder
from parcelray.benchmarks.readers.samples import MiniReader, NlvrReader, RowsReader, SamplesReader
from parcelray.benchmarks.readers.table import TableReader
from parcelray.config import benchmark as config
from parcelray.datasets.conversations.source import ConversationSource
from parcelray.datasets.nlvr.source import CorpusSplit, NlvrSource, Part
from parcelray.errors import UserError

DEFAULT_IMAGE_SIZE = 64
_NLVR_PARTS: dict[str, tuple[CorpusSplit, Part]] = {"test": ("test", "all"), "validation": ("dev", "validation")}


def open_reader(
    benchmark: config.BenchmarkConfig,
    *,
    family: config.PromptFamily = "paligemma",
    data: Path | None = None,
    image_size: int = DEFAULT_IMAGE_SIZE,
    at_random: bool = False,
) -> BenchmarkReader:
    """Opens the reader of a benchmark.

    Args:
        benchmark: configuration of the benchmark.
        family: model family, which selects the prompt template, the expected answers and the metric.
        data: file or folder of its data; None: the hub, or procedural data.
        image_size: side in pixels of the images that a procedural benchmark draws.
        at_random: whether rows will be read in any order, as in a training; parquet files are then memory-mapped.

    Raises:
        UserError: the benchmark needs local data and `data` is None, or it has no prompt for the family.
    """
    source = benchmark.source
    if isinstance(source, config.TableSource):
        return TableReader(benchmark, family, data, at_random)
    if isinstance(source, config.MiniSource):
        return MiniReader(source.split, source.families, source.samples, source.seed, image_size)
    if isinstance(source, config.EasyVqaSource):
        return EasyVqaReader(source.split, data or easy_vqa_folder())
    if isinstance(source, config.RowsSource):
        if source.data is None:
            raise UserError(
                f"{benchmark.name} has no rows; describe them in source.data, as in the section data of a training."
            )
        return RowsReader(benchmark.name, ConversationSource(source.data, source.split))
    if data is None:
        raise UserError(f"{benchmark.name} is read from local files; give their folder with data:.")
    if isinstance(source, config.SamplesSource):
        return SamplesReader(benchmark.name, data / source.split)
    split, part = _NLVR_PARTS[source.split]
    nlvr = NlvrSource(
        data, split, part, view=source.view, questions=source.questions, seed=source.seed, image_size=image_size
    )
    return NlvrReader(nlvr)
