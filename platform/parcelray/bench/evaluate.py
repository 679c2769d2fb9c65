"""`parcelray bench evaluate`: savings of one pass over all budgets and of shared images, cost of Ray Data, memory."""

import dataclasses
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from parcelray.bench.measure import Measure, Report, interquartile_range, machine_info, time_pairs
from parcelray.benchmarks.catalog import catalog, find
from parcelray.benchmarks.readers.base import DatasetFingerprint, RowSamples
from parcelray.benchmarks.readers.samples import SamplesReader
from parcelray.cluster.session import ray_session
from parcelray.config.connector import ParcelConnectorConfig
from parcelray.config.evaluate import BenchmarkChoice, PassConfig
from parcelray.config.model import MiniModelConfig
from parcelray.datasets.mini.suite import family_samples
from parcelray.datasets.parquet import to_table
from parcelray.datasets.sample import Sample
from parcelray.evaluation.passes.shards import EvaluatedModel, PreparedBenchmark
from parcelray.evaluation.predict.generation import GenerationSettings
from parcelray.evaluation.predict.predictor import Predictor
from parcelray.evaluation.run import evaluate_model
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.paligemma_processor import ElasticPaliGemmaProcessor
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.checkpoint import MINI_BASE, resolve_checkpoint
from parcelray.models.mini import build_config, build_model
from parcelray.models.vlm import load_processor, load_vlm, quiet_transformers, use_sdpa_where_exact

BUDGETS = (16, 64, 256)
_ANSWER = GenerationSettings(max_new_tokens=4)
_QUESTIONS = 48
"""Number of questions in the comparison of one pass with one pass per budget."""
_IMAGES = 12
"""Number of images in the comparison of shared images with copies.

At least `_QUESTIONS_PER_IMAGE`, because the questions about an image are taken from the first images.
"""
_QUESTIONS_PER_IMAGE = 5
_VISION_HEAVY = MiniModelConfig(vision_width=192, vision_layers=12, vision_heads=4, vision_mlp_width=768, text_layers=2)
_TINY = MiniModelConfig(
    vision_width=24,
    vision_layers=1,
    vision_heads=2,
    vision_mlp_width=32,
    text_width=24,
    text_layers=1,
    text_heads=2,
    text_kv_heads=1,
    text_mlp_width=32,
)
_MEMORY_POLL_S = 0.5
_DIFFERENT = 1000
"""Number of distinct samples in the memory comparison; further samples repeat them."""

Model = tuple[ElasticVLM, ElasticProcessor]


def bench_evaluation(*, samples: int, repeats: int, memory_samples: tuple[int, int]) -> Report:
    """Runs all four comparisons.

    Args:
        samples: number of samples in the comparison of Ray Data with a plain loop.
        repeats: number of rounds of each comparison.
        memory_samples: numbers of samples of a smaller and a larger evaluation, whose peak memory is compared.
    """
    with tempfile.TemporaryDirectory(prefix="parcelray-bench-") as name:
        folder = Path(name)
        mini = _save(_mini(), folder / "mini")
        measures = [
            *_one_pass("mini", mini, repeats),
            *_one_pass("vision-heavy", _random(_VISION_HEAVY), repeats),
            *_sharing(mini, repeats),
            *_ray_data(folder, samples, repeats),
            *_memory(folder, memory_samples),
        ]
    return Report(tuple(measures), machine_info())


def _one_pass(name: str, model: Model, repeats: int) -> Iterator[Measure]:
    """(a) Compares one pass over three budgets with one pass per budget."""
    predictor = Predictor(*model, settings=_ANSWER)
    samples = family_samples("test", "general", _QUESTIONS)
    apart = {budget: predictor.generate_budgets(samples, [budget])[budget] for budget in BUDGETS}
    together = predictor.generate_budgets(samples, BUDGETS)
    timing = time_pairs(
        lambda: [predictor.generate_budgets(samples, [budget]) for budget in BUDGETS],
        lambda: predictor.generate_budgets(samples, BUDGETS),
        repeats,
    )
    goal = ">= 1.8" if name == "vision-heavy" else None
    yield Measure(
        f"{name}: one pass over {len(BUDGETS)} budgets",
        timing.ratio,
        "times faster",
        timing.spread_ratio,
        goal,
        "one pass per budget",
    )
    yield Measure(
        f"{name}: answers that differ",
        _count_different(apart, together),
        "answers",
        goal="<= 0",
        against="one pass per budget",
    )


def _sharing(model: Model, repeats: int) -> Iterator[Measure]:
    """(b) Compares questions that share an image with the same questions about copies of the image."""
    predictor = Predictor(*model, settings=_ANSWER)
    images = family_samples("test", "general", _IMAGES)
    shared = [
        dataclasses.replace(sample, id=f"{sample.id}-{number}", prompt=images[number].prompt, images=sample.images[:1])
        for sample in images
        for number in range(_QUESTIONS_PER_IMAGE)
    ]
    # Extra bytes after the end of a PNG do not change the picture, but the images are no longer equal as bytes.
    copied = [
        dataclasses.replace(sample, images=(sample.images[0] + number.to_bytes(4, "big"),))
        for number, sample in enumerate(shared)
    ]
    together, apart = predictor.generate_budgets(shared, BUDGETS), predictor.generate_budgets(copied, BUDGETS)
    timing = time_pairs(
        lambda: predictor.generate_budgets(copied, BUDGETS),
        lambda: predictor.generate_budgets(shared, BUDGETS),
        repeats,
    )
    label = f"mini: {_QUESTIONS_PER_IMAGE} questions that share an image"
    yield Measure(label, timing.ratio, "times faster", timing.spread_ratio, against="the same without sharing")
    yield Measure(
        "mini: answers that differ",
        _count_different(apart, together),
        "answers",
        goal="<= 0",
        against="the same without sharing",
    )


def _ray_data(folder: Path, count: int, repeats: int) -> Iterator[Measure]:
    """(c) Compares the Ray Data path (one actor) with a plain loop, both timed from their first to their last shard."""
    benchmark = _benchmark(SamplesReader("samples", _export(folder / "samples", count)), _ANSWER)
    settings = PassConfig(rows_per_shard=64)
    rates: dict[str, list[float]] = {"plain loop": [], "ray data": []}
    startups: list[float] = []
    mini = resolve_checkpoint(folder / "mini")
    with ray_session():
        for number in range(repeats):
            clock = _Clock()
            _plain_loop(folder / "mini", benchmark, clock)
            rates["plain loop"].append(clock.rate())
            clock = _Clock()
            model = EvaluatedModel(mini.path, mini.pin, (64,), str(folder / f"store-{number}"))
            evaluate_model("bench", model, [benchmark], settings, on_progress=clock.note)
            rates["ray data"].append(clock.rate())
            startups.append(clock.first())
    for name, values in rates.items():
        yield Measure(f"{name}, {count} samples", statistics.median(values), "samples/s", interquartile_range(values))
    ratios = [ray / loop for ray, loop in zip(rates["ray data"], rates["plain loop"], strict=True)]
    yield Measure(
        "ray data over plain loop",
        statistics.median(ratios),
        "ratio",
        interquartile_range(ratios),
        ">= 0.9",
        "plain loop",
    )
    yield Measure(
        "ray data: until the first bundle is stored", statistics.median(startups), "s", interquartile_range(startups)
    )


def _benchmark(reader: SamplesReader, generation: GenerationSettings) -> PreparedBenchmark:
    choice = BenchmarkChoice(name="samples")
    return PreparedBenchmark(choice, find(choice.name, catalog()), reader, reader.order(), generation)


def _plain_loop(checkpoint: Path, benchmark: PreparedBenchmark, clock: "_Clock") -> None:
    """Evaluates without the platform: reads samples, predicts, and keeps the predictions in a list."""
    model = load_vlm(checkpoint).eval()
    use_sdpa_where_exact(model)
    predictor = Predictor(model, load_processor(checkpoint), settings=benchmark.generation)
    answers: list[str] = []
    rows, reader = benchmark.rows, benchmark.reader
    for start in range(0, len(rows), 64):
        samples = [sample for row in rows[start : start + 64] for sample in reader.read(row).samples]
        answers += predictor.generate(samples, num_visual_tokens=64)
        clock.note("samples", len(answers), len(rows))


def _memory(folder: Path, counts: tuple[int, int]) -> Iterator[Measure]:
    """(d) Compares the peak memory of a smaller and a larger evaluation: the driver and all processes of Ray."""
    data = _export(folder / "few", _DIFFERENT)
    checkpoint = folder / "tiny"
    _save(_random(_TINY), checkpoint)
    peaks = []
    for count in counts:
        peaks.append(_run_in_new_process(_peak_of_a_pass, (data, checkpoint, count, folder / f"store-{count}")))
        yield Measure(f"peak memory, {count} samples", peaks[-1] / 2**20, "MiB")
    yield Measure(
        f"peak memory, {counts[1]} over {counts[0]} samples",
        peaks[1] / peaks[0],
        "ratio",
        goal="<= 1.15",
        against=f"{counts[0]} samples",
    )


@dataclass(frozen=True)
class _Repeated(SamplesReader):
    """Repeats the same samples under new ids."""

    count: int = 0

    def fingerprint(self) -> DatasetFingerprint:
        """Returns the fingerprint of the samples, with the repeated number of rows."""
        return super().fingerprint()._replace(rows=self.count)

    def order(self) -> Sequence[int]:
        """Returns all rows, repeats included."""
        return range(self.count)

    def read(self, row: int) -> RowSamples:
        """Returns a sample with the row number in its id."""
        (sample,) = super().read(row % _DIFFERENT).samples
        return RowSamples((dataclasses.replace(sample, id=f"{sample.id}-{row}"),))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"count": self.count}


def _peak_of_a_pass(data: Path, checkpoint: Path, count: int, store: Path) -> int:
    benchmark = _benchmark(_Repeated("samples", data, count), GenerationSettings(max_new_tokens=2))
    model = EvaluatedModel(checkpoint, resolve_checkpoint(checkpoint).pin, (16,), str(store))
    with ray_session(object_store_bytes=512 * 2**20), _peak_memory() as peak:
        evaluate_model("bench", model, [benchmark], PassConfig(rows_per_shard=250))
    return peak()


@contextmanager
def _peak_memory() -> Iterator[Callable[[], int]]:
    """Polls the proportional memory of this process and its descendants; yields a function that returns the maximum."""
    peak = 0
    stop = threading.Event()

    def poll() -> None:
        nonlocal peak
        while not stop.wait(_MEMORY_POLL_S):
            peak = max(peak, sum(_proportional_bytes(process) for process in _descendants(os.getpid())))

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield lambda: peak
    finally:
        stop.set()
        thread.join()


def _descendants(root: int) -> list[int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    processes = [root]
    for process in processes:
        processes += [child for child, parent in parents.items() if parent == process]
    return processes


def _proportional_bytes(process: int) -> int:
    """Returns the memory of a process in bytes, with shared pages divided by the number of their processes."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def _run_in_new_process(call: Callable[..., int], arguments: tuple[Any, ...]) -> int:
    """Returns the result of a call in a new process, so that memory of earlier calls is not counted."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_put_result, args=(results, call, arguments))
    process.start()
    result: int = results.get(timeout=3600)
    process.join()
    return result


def _put_result(results: Any, call: Callable[..., int], arguments: tuple[Any, ...]) -> None:
    results.put(call(*arguments))


class _Clock:
    """Records when shards end."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started = clock()
        self._points: list[tuple[int, float]] = []

    def note(self, benchmark: str, rows: int, total: int) -> None:
        """Records the current time and the number of rows that are done."""
        self._points.append((rows, self._clock()))

    def rate(self) -> float:
        """Returns the rows per second from the end of the first shard to the end of the last."""
        (first_rows, first), (last_rows, last) = self._points[0], self._points[-1]
        return (last_rows - first_rows) / (last - first)

    def first(self) -> float:
        """Returns the seconds until the end of the first shard."""
        return self._points[0][1] - self._started


def _mini() -> Model:
    """Loads the mini base with a PARCEL connector, which has the cost of a trained elastic model."""
    base = resolve_checkpoint(MINI_BASE).path
    model = load_vlm(base, connector=ParcelConnectorConfig(num_heads=6)).eval()
    use_sdpa_where_exact(model)
    return model, load_processor(base)


def _random(config: MiniModelConfig) -> Model:
    processor = ElasticPaliGemmaProcessor.from_pretrained(resolve_checkpoint(MINI_BASE).path)
    full = build_config(config, processor)
    full.connector = ParcelConnectorConfig(num_heads=2).model_dump(mode="json")
    model = build_model(full, 0).eval()
    use_sdpa_where_exact(model)
    return model, processor


def _save(model: Model, folder: Path) -> Model:
    with quiet_transformers():
        for part in model:
            part.save_pretrained(folder)
    return model


def _export(folder: Path, count: int) -> Path:
    folder.mkdir()
    samples: list[Sample] = family_samples("test", "general", count // 2) + family_samples(
        "test", "resolution", count - count // 2
    )
    pq.write_table(to_table(samples), folder / "0.parquet", row_group_size=250)
    return folder


def _count_different(first: dict[int, list[str]], second: dict[int, list[str]]) -> int:
    return sum(a != b for budget in BUDGETS for a, b in zip(first[budget], second[budget], strict=True))
