"""Models, images and questions for the studies of attention and redundancy."""

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
from parcelray.evaluation.plan import prepare
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.checkpoint import ResolvedCheckpoint
from parcelray.models.vlm import load_processor, load_vlm, use_sdpa_where_exact
from parcelray.tracking.registry import resolve_model

MINI = "mini"
"""Name of the image source that is the mini suite: single-image questions of its test split."""
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class Pair:
    """An image-question pair with the reference answer."""

    image: Image.Image
    prompt: str
    answer: str


class StudyModel(NamedTuple):
    """A model in evaluation mode, on the GPU if there is one."""

    checkpoint: ResolvedCheckpoint
    model: ElasticVLM
    processor: ElasticProcessor


def open_model(reference: str, tracking_uri: str | None) -> StudyModel:
    """Resolves and loads a model reference.

    Raises:
        UserError: the reference cannot be resolved, or the model cannot be loaded.
    """
    checkpoint = resolve_model(CheckpointModelConfig(reference=reference), tracking_uri)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_vlm(checkpoint.path).eval().to(device)
    use_sdpa_where_exact(model)
    return StudyModel(checkpoint, model, load_processor(checkpoint.path))


def study_images(source: str, count: int, image_size: int) -> list[Image.Image]:
    """Reads `count` images of the mini suite, or of a folder in the order of the file names.

    Raises:
        UserError: there are fewer images, or one cannot be decoded.
    """
    if source == MINI:
        return [decode_image(sample.images[0]) for sample in _mini(count, image_size)]
    folder = Path(source).expanduser()
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES) if folder.is_dir() else []
    if len(files) < count:
        raise UserError(
            f"{source} holds {len(files)} images, but {count} are needed; lower --count, or give another folder or"
            f" {MINI}."
        )
    return [_decoded(path.read_bytes(), str(path)) for path in files[:count]]


def study_prompts(
    source: str, count: int, prompts: Sequence[str], image_size: int, per_image: int = 3
) -> list[list[str]]:
    """Returns the prompts of each image.

    With at least two prompts, all images have these. Without prompts, an image of the mini suite has its own prompt and
    those of other images of its family.

    Raises:
        UserError: there is one prompt, or there are none for a folder of images.
    """
    if len(prompts) >= 2:
        return [list(prompts)] * count
    if source != MINI or prompts:
        raise UserError(
            f"{len(prompts)} prompts were given for the images of {source}; give at least two, by repeating --prompt."
        )
    samples = _mini(count * per_image, image_size)
    own: dict[str, list[str]] = {}
    for sample in samples:
        own.setdefault(sample.family, []).append(sample.prompt)
    return [_with_others(sample, own[sample.family], per_image) for sample in samples[:count]]


def mini_pairs(count: int, image_size: int) -> list[Pair]:
    """Returns image-question pairs of the mini suite."""
    return [
        Pair(decode_image(sample.images[0]), sample.prompt, sample.answers[0]) for sample in _mini(count, image_size)
    ]


def benchmark_pairs(job: EvaluateJob, count: int, image_size: int) -> list[Pair]:
    """Returns image-question pairs of a job's benchmarks.

    Raises:
        UserError: see `benchmark_samples`.
    """
    return [
        Pair(_first_image(sample), sample.prompt, sample.answers[0])
        for sample in benchmark_samples(job, count, image_size)
    ]


def benchmark_prompts(
    job: EvaluateJob, count: int, image_size: int, per_image: int = 3
) -> tuple[list[Image.Image], list[list[str]]]:
    """Returns images of a job's benchmarks, and prompts for each image.

    An image has its own prompt and prompts of other images of its benchmark and family.

    Raises:
        UserError: see `benchmark_samples`; or there are too few distinct questions.
    """
    samples = benchmark_samples(job, count, image_size)
    own: dict[tuple[str, str], list[str]] = {}
    for sample in samples:
        own.setdefault((sample.benchmark, sample.family), []).append(sample.prompt)
    prompts_of_all = [sample.prompt for sample in samples]
    if len(set(prompts_of_all)) < per_image:
        raise UserError(
            f"The {count} samples have {len(set(prompts_of_all))} distinct questions, but {per_image} are needed; use"
            " more samples, or another benchmark."
        )
    # A family with too few distinct questions also uses those of the other families.
    candidates = {kind: each if len(set(each)) >= per_image else [*each, *prompts_of_all] for kind, each in own.items()}
    prompts = [_with_others(sample, candidates[sample.benchmark, sample.family], per_image) for sample in samples]
    return [_first_image(sample) for sample in samples], prompts


def benchmark_samples(job: EvaluateJob, count: int, image_size: int) -> list[Sample]:
    """Returns the first samples of a job's benchmarks that have one image and a reference answer.

    Samples are taken from the benchmarks and their families in turn.

    Raises:
        UserError: there are too few such samples, or a benchmark cannot be opened.
    """
    queues: dict[tuple[str, str], list[Sample]] = {}
    for each in prepare(job, image_size):
        for row in each.rows:
            for sample in each.reader.read(row).samples:
                if len(sample.images) == 1 and sample.answers:
                    queues.setdefault((sample.benchmark, sample.family), []).append(sample)
    in_turn = [sample for turn in itertools.zip_longest(*queues.values()) for sample in turn if sample is not None]
    if len(in_turn) < count:
        names = ", ".join(choice.name for choice in job.benchmarks)
        raise UserError(
            f"{names} have {len(in_turn)} samples with one image, but {count} are needed; raise the limit or the"
            " number of samples of the benchmarks."
        )
    return in_turn[:count]


def _first_image(sample: Sample) -> Image.Image:
    return _decoded(sample.images[0], f"Sample {sample.id!r} of {sample.benchmark}")


def _decoded(data: bytes, name: str) -> Image.Image:
    try:
        return decode_image(data)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _mini(count: int, image_size: int) -> list[Sample]:
    suite = MiniSuite(split="test", image_size=image_size)
    return [suite.get("single", index) for index in range(count)]


def _with_others(sample: Sample, candidates: Sequence[str], count: int) -> list[str]:
    """The sample's prompt and `count - 1` other candidates."""
    others = [prompt for prompt in dict.fromkeys(candidates) if prompt != sample.prompt]
    # The start depends on the sample, so that not all images get the same prompts.
    start = sum(sample.id.encode()) % max(1, len(others))
    return [sample.prompt, *itertools.islice(itertools.chain(others[start:], others[:start]), count - 1)]
