"""The sample type of all data sources and benchmark readers."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about one or more images, with its acceptable answers.

    Images stay encoded (PNG or JPEG bytes) until a process needs their pixels. In Ray's object store, the bytes are
    about 20 times smaller than decoded images.
    """

    id: str
    """Identifier, unique within the benchmark and stable between runs."""
    benchmark: str
    """Name of the benchmark, for example `mini` or `nlvr`."""
    family: str
    """Group for reporting: `general`, `resolution`, `grounding`, `video`, ..."""
    task: str
    """Kind of question within the family, for example `count`."""
    images: tuple[bytes, ...]
    """Encoded images in the order of the prompt; the frames of a video in temporal order."""
    prompt: str
    """Text after the images, without image placeholders."""
    answers: tuple[str, ...]
    """Acceptable answers; the first one is the training target."""
    metric: str = "exact_match"
    """Name of the per-sample metric in `parcelray.benchmarks.metrics`."""
    scene: str = ""
    """Identifier of the scene or sentence; samples with the same value must be in the same split."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Further JSON-serialisable values, for example an NLVR permutation."""
    later_turns: tuple[tuple[str, str], ...] = ()
    """Further questions about the same images with their answers, for training; see `ElasticProcessor.encode_turns`."""
