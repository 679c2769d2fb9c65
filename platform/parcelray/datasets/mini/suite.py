"""The mini suite as a sample source: four families and three splits; each sample is a pure function of its index."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from parcelray.datasets.mini import general, grounding, resolution, video
from parcelray.datasets.mini.dense import DENSE_TASKS
from parcelray.datasets.mini.drawing import CANVAS, Backdrop, encode_png
from parcelray.datasets.mini.regions import regions_of
from parcelray.datasets.mini.scenes import SPLITS, Draw, Question, Split, split_of
from parcelray.datasets.sample import Sample
from parcelray.datasets.source import SampleGroup
from parcelray.errors import UserError

Generator = Callable[[Draw], Question]

BENCHMARK = "mini"
FAMILIES = ("general", "resolution", "grounding", "video")
EVAL_GROUP_SIZE = 4000
"""Samples in each group of the validation and test splits."""

_GENERATORS: dict[tuple[str, str], dict[str, Generator]] = {
    ("single", "general"): general.SINGLE_TASKS,
    ("single", "resolution"): resolution.TASKS,
    ("single", "grounding"): grounding.TASKS,
    ("pair", "general"): general.PAIR_TASKS,
    ("video", "video"): video.TASKS,
}
_GROUPS = {"single": (1, 0.7), "pair": (2, 0.12), "video": (4, 0.18)}

TASKS: dict[str, tuple[str, ...]] = {
    family: tuple(task for (_, owner), tasks in _GENERATORS.items() if owner == family for task in tasks)
    for family in FAMILIES
}
"""The tasks of each family, without dense supervision."""


class _Item(NamedTuple):
    """A question that is not yet rendered; `rng` then draws the backdrop and the noise."""

    family: str
    task: str
    dense: bool
    question: Question
    rng: Random


@dataclass(frozen=True)
class MiniSuite:
    """The procedural suite as a `SampleSource`.

    The groups are `single` (one image), `pair` (two images, general family) and `video` (four frames). The training
    split is endless and includes dense supervision. Validation and test have `EVAL_GROUP_SIZE` samples per group, which
    cycle through the families and tasks and have no dense supervision.
    """

    split: Split
    seed: int = 0
    """Seed of the scenes."""
    families: tuple[str, ...] = FAMILIES
    """Families to draw samples from."""
    dense_fraction: float = 0.5
    """Fraction of dense-supervision samples in the training split; 0 in the other splits."""
    image_size: int = CANVAS
    """Side of the images in pixels; scenes are drawn at 64 pixels and resized."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise UserError(f"The mini suite has no split {self.split!r}; choose one of {', '.join(SPLITS)}.")
        unknown = [family for family in self.families if family not in FAMILIES]
        if unknown or not self.families:
            raise UserError(f"The mini suite has no families {unknown}; choose at least one of {', '.join(FAMILIES)}.")
        if not 0 <= self.dense_fraction <= 1:
            raise UserError(f"dense_fraction is {self.dense_fraction}; legal: 0 to 1.")
        if self.image_size < CANVAS:
            raise UserError(
                f"image_size is {self.image_size}; legal for images of the mini suite: at least {CANVAS} pixels."
            )
        if self.split != "train":
            object.__setattr__(self, "dense_fraction", 0.0)

    @property
    def groups(self) -> tuple[SampleGroup, ...]:
        """The non-empty groups of the chosen families, with weights that sum to 1."""
        names = [name for name in _GROUPS if self._families_of(name)]
        total = sum(_GROUPS[name][1] for name in names)
        size = None if self.split == "train" else EVAL_GROUP_SIZE
        return tuple(SampleGroup(name, _GROUPS[name][0], _GROUPS[name][1] / total, size) for name in names)

    def get(self, group: str, index: int) -> Sample:
        """Generates sample `index` of a group, a pure function of the source's fields, the group and the index.

        Raises:
            UserError: the group is not one of `groups`.
            IndexError: the index is negative or past the end of an evaluation split.
        """
        item = self._item(group, index)
        return _render(item, self.split, f"{self.split}-{self.seed}-{group}-{index:06d}", self.image_size)

    def texts(self, count: int) -> Iterator[str]:
        """Yields prompt and first answer of about `count` samples, without rendering images.

        The number of samples per group is proportional to the weights.
        """
        for group in self.groups:
            for index in range(round(count * group.weight)):
                question = self._item(group.name, index).question
                yield f"{question.prompt} {question.answers[0]}"

    def _families_of(self, group: str) -> list[str]:
        return [family for family in FAMILIES if family in self.families and (group, family) in _GENERATORS]

    def _item(self, group: str, index: int) -> _Item:
        families = self._families_of(group) if group in _GROUPS else []
        if not families:
            raise UserError(f"The mini suite has no group {group!r}; legal: {', '.join(g.name for g in self.groups)}.")
        if index < 0 or (self.split != "train" and index >= EVAL_GROUP_SIZE):
            raise IndexError(f"index {index} is out of range for group {group!r} of split {self.split!r}")
        rng = _rng(self.seed, self.split, group, index)
        if self.split != "train":
            family = families[index % len(families)]
            return _cycled(rng, self.split, family, _GENERATORS[group, family], index // len(families))
        family = rng.choice(families)
        dense = rng.random() < self.dense_fraction
        generators = (DENSE_TASKS if dense else _GENERATORS)[group, family]
        task = rng.choice(list(generators))
        return _Item(family, task, dense, _draw(rng, self.split, generators[task]), rng)


def family_sample(split: Split, family: str, index: int, seed: int = 0, image_size: int = CANVAS) -> Sample:
    """Generates evaluation sample `index` of a family; the samples cycle through all tasks of the family."""
    if family not in FAMILIES:
        raise UserError(f"The mini suite has no family {family!r}; choose one of {', '.join(FAMILIES)}.")
    generators = {
        task: generator
        for (_, owner), tasks in _GENERATORS.items()
        if owner == family
        for task, generator in tasks.items()
    }
    item = _cycled(_rng(seed, split, f"family-{family}", index), split, family, generators, index)
    return _render(item, split, family_sample_id(split, family, index, seed), image_size)


def family_sample_id(split: Split, family: str, index: int, seed: int = 0) -> str:
    """Returns the id of an evaluation sample of a family."""
    return f"{split}-{seed}-{family}-{index:06d}"


def family_samples(split: Split, family: str, count: int, seed: int = 0, image_size: int = CANVAS) -> list[Sample]:
    """Generates the first `count` evaluation samples of a family."""
    return [family_sample(split, family, index, seed, image_size) for index in range(count)]


def _rng(seed: int, split: str, stream: str, index: int) -> Random:
    # Python hashes a string seed with SHA-512, so adjacent indices are independent and all processes agree.
    return Random(f"{BENCHMARK}/{seed}/{split}/{stream}/{index}")


def _cycled(rng: Random, split: Split, family: str, generators: dict[str, Generator], position: int) -> _Item:
    task = list(generators)[position % len(generators)]
    return _Item(family, task, False, _draw(rng, split, generators[task]), rng)


def _draw(rng: Random, split: Split, generator: Generator) -> Question:
    """Draws questions until the scene of one belongs to the split."""
    draw = Draw(rng, split)
    while True:
        question = generator(draw)
        if split_of(question.scene) == split:
            return question


def _render(item: _Item, split: Split, sample_id: str, image_size: int) -> Sample:
    backdrop = Backdrop.sample(item.rng)
    images = []
    for picture in item.question.pictures:
        canvas = backdrop.canvas(item.rng)
        picture.paint(canvas, backdrop)
        images.append(encode_png(canvas, image_size))
    objects = [picture.objects for picture in item.question.pictures]
    metadata = {"split": split, "dense": item.dense, "objects": objects}
    if item.dense and (regions := regions_of(item.question.prompt, item.task, objects)) is not None:
        metadata["regions"] = [
            [{**region, "box": [side / CANVAS for side in region["box"]]} for region in image] for image in regions
        ]
    return Sample(
        id=sample_id,
        benchmark=BENCHMARK,
        family=item.family,
        task=item.task,
        images=tuple(images),
        prompt=item.question.prompt,
        answers=item.question.answers,
        metric=item.question.metric,
        scene=item.question.scene,
        metadata=metadata,
    )
