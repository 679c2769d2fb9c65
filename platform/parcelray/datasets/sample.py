"""The unit that every reader yields and every trainer, evaluator and server reads."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about one or more images, with its acceptable answers.

    Images stay encoded (PNG or JPEG bytes) until the process that needs pixels decodes them: bytes are about 20 times
    smaller than decoded images in Ray's object store.
    """

    id: str
    """Unique within the benchmark, stable between runs."""
    benchmark: str
    """For example `mini` or `nlvr`."""
    family: str
    """Group for reporting: `general`, `resolution`, `grounding`, `video`, ..."""
    task: str
    """Kind of question within the family, for example `count`."""
    images: tuple[bytes, ...]
    """Encoded images in prompt order; the frames of a video in time order."""
    prompt: str
    """Text after the images, without image placeholders."""
    answers: tuple[str, ...]
    """Acceptable answers; the first one is the training target."""
    metric: str = "exact_match"
    """Name of the per-sample metric in `parcelray.benchmarks.metrics`."""
    scene: str = ""
    """What must never be split between training and testing (a scene, a sentence)."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """JSON-serialisable extras, for example an NLVR permutation."""
