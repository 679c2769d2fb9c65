"""Images, questions and models of the studies of attention and redundancy."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from parcelray.config.evaluate import EvaluateJob
from parcelray.config.model import CheckpointModelConfig
from parcelray.datasets.images import decode_image
from parcelray.datasets.mini.suite import MiniSuite
from parcelray.datasets.sample import Sample
from parcelray.errors import UserError
from parcelray.evaluation.setup import prepare
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.checkpoint import ResolvedCheckpoint
from parcelray.models.vlm import load_processor, load_vlm, use_sdpa_where_exact
from parcelray.tracking.provenance import resolve_model

MINI = "mini"
"""As the source of images: single-image questions of the mini suite's test split."""
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class Pair:
    """One image with a question and its answer."""

    image: Image.Image
    prompt: str
    answer: str


class StudyModel(NamedTuple):
    """A model in evaluation mode on the best device here."""

    checkpoint: ResolvedCheckpoint
    model: ElasticVLM
    processor: ElasticProcessor


def open_model(reference: str, tracking_uri: str | None) -> StudyModel:
    """Resolves and loads a model reference.

    Raises:
        UserError: it cannot be resolved or loaded.
    """
    checkpoint = resolve_model(CheckpointModelConfig(reference=reference), tracking_uri)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_vlm(checkpoint.path).eval().to(device)
    use_sdpa_where_exact(model)
    return StudyModel(checkpoint, model, load_processor(checkpoint.path))


def study_images(source: str, count: int, image_size: int) -> list[Image.Image]:
    """Images of the mini suite, or of a folder in the order of their names.

    Raises:
        UserError: there are not as many.
    """
    if source == MINI:
        return [decode_image(sample.images[0]) for sample in _mini(count, image_size)]
    folder = Path(source)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES) if folder.is_dir() else []
    if len(files) < count:
        raise UserError(
            f"{source} holds {len(files)} images, fewer than the {count} that are asked for; lower --count, or name"
            f" another folder or {MINI}."
        )
    return [decode_image(path.read_bytes()) for path in files[:count]]


def study_prompts(
    source: str, count: int, prompts: Sequence[str], image_size: int, per_image: int = 3
) -> list[list[str]]:
    """Prompts of each image: the same ones everywhere, or of the mini suite each image's own and those of the next images of its family.

    Raises:
        UserError: a folder of images without at least two prompts.
    """
    if len(prompts) >= 2:
        return [list(prompts)] * count
    if source != MINI or prompts:
        raise UserError(
            f"{len(prompts)} prompts were given with the images of {source}; give at least two with --prompt, which is"
            " repeatable."
        )
    samples = _mini(count * per_image, image_size)
    own: dict[str, list[str]] = {}
    for sample in samples:
        own.setdefault(sample.family, []).append(sample.prompt)
    return [_different(sample, own[sample.family], per_image) for sample in samples[:count]]


def mini_pairs(count: int, image_size: int) -> list[Pair]:
    """Questions of the mini suite with one image each."""
    return [
        Pair(decode_image(sample.images[0]), sample.prompt, sample.answers[0]) for sample in _mini(count, image_size)
    ]


def benchmark_pairs(job: EvaluateJob, count: int, image_size: int) -> list[Pair]:
    """Questions of a job's benchmarks with one image each.

    Raises:
        UserError: see `benchmark_samples`.
    """
    return [
        Pair(decode_image(sample.images[0]), sample.prompt, sample.answers[0])
        for sample in benchmark_samples(job, count, image_size)
    ]


def benchmark_prompts(
    job: EvaluateJob, count: int, image_size: int, per_image: int = 3
) -> tuple[list[Image.Image], list[list[str]]]:
    """Images of a job's benchmarks, and prompts of each: its own and those of other images of its benchmark and family.

    Raises:
        UserError: see `benchmark_samples`; or the questions are all the same.
    """
    samples = benchmark_samples(job, count, image_size)
    own: dict[tuple[str, str], list[str]] = {}
    for sample in samples:
        own.setdefault((sample.benchmark, sample.family), []).append(sample.prompt)
    everyone = [sample.prompt for sample in samples]
    if len(set(everyone)) < per_image:
        raise UserError(
            f"The {count} questions hold {len(set(everyone))} different ones, fewer than {per_image}; ask more, or"
            " another benchmark."
        )
    # Where a family has too few different questions, those of the others follow.
    alike = {kind: each if len(set(each)) >= per_image else [*each, *everyone] for kind, each in own.items()}
    prompts = [_different(sample, alike[sample.benchmark, sample.family], per_image) for sample in samples]
    return [decode_image(sample.images[0]) for sample in samples], prompts


def benchmark_samples(job: EvaluateJob, count: int, image_size: int) -> list[Sample]:
    """The first questions of a job's benchmarks that show one image and have an answer, the benchmarks and their families in turn.

    Raises:
        UserError: there are not as many, or a benchmark cannot be opened.
    """
    queues: dict[tuple[str, str], list[Sample]] = {}
    for each in prepare(job, image_size):
        for row in each.task.rows:
            for sample in each.task.reader.read(row).samples:
                if len(sample.images) == 1 and sample.answers:
                    queues.setdefault((sample.benchmark, sample.family), []).append(sample)
    in_turn = [sample for turn in itertools.zip_longest(*queues.values()) for sample in turn if sample is not None]
    if len(in_turn) < count:
        names = ", ".join(choice.name for choice in job.benchmarks)
        raise UserError(
            f"{names} gave {len(in_turn)} questions about one image, fewer than the {count} that are asked for; raise"
            " their limit or samples."
        )
    return in_turn[:count]


def _mini(count: int, image_size: int) -> list[Sample]:
    suite = MiniSuite(split="test", image_size=image_size)
    return [suite.get("single", index) for index in range(count)]


def _different(sample: Sample, candidates: Sequence[str], count: int) -> list[str]:
    others = [prompt for prompt in dict.fromkeys(candidates) if prompt != sample.prompt]
    # From a place of the image's own on, so that not all images get the same ones.
    start = sum(sample.id.encode()) % max(1, len(others))
    return [sample.prompt, *itertools.islice(itertools.chain(others[start:], others[:start]), count - 1)]
