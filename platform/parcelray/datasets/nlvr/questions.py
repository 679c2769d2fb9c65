"""Questions about an NLVR picture: its sentence, and questions derived from its structured representation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

from parcelray.datasets.boxes import Box, format_locations

TASKS = ("statement", "count", "color", "size", "box")
_COLORS = {"yellow": "yellow", "black": "black", "#0099ff": "blue"}
_SIZES = {10: "small", 20: "medium", 30: "big"}
_SHAPES = ("square", "triangle", "circle")
_SIDE = 100


class Thing(NamedTuple):
    """One object in a box, with lengths in pixels of a 100 x 100 box."""

    shape: str
    color: str
    size: int
    x: int
    y: int

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Thing":
        """Reads one entry of the structured representation."""
        return cls(
            str(entry["type"]),
            _COLORS[str(entry["color"]).lower()],
            int(entry["size"]),
            int(entry["x_loc"]),
            int(entry["y_loc"]),
        )

    @property
    def name(self) -> str:
        """Size, colour and shape in words, for example `small yellow circle`."""
        return f"{_SIZES[self.size]} {self.color} {self.shape}"

    @property
    def box(self) -> Box:
        """The bounding box in fractions of the box's sides, clipped to the box."""
        return Box(*(min(value, _SIDE) / _SIDE for value in (self.y, self.x, self.y + self.size, self.x + self.size)))


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt with its acceptable answers and its metric."""

    task: str
    prompt: str
    answers: tuple[str, ...]
    metric: str = "exact_match"
    box: int | None = None
    """Index of the only box that is shown; None: the whole picture."""
    key: str = ""
    """Suffix of the sample id that distinguishes several questions of one task about the same picture."""


def questions_of(
    sentence: str, label: str, boxes: Sequence[Sequence[Thing]], tasks: Sequence[str], seed: str
) -> list[Question]:
    """Creates the questions about one picture: one per task, if the picture allows it.

    Args:
        sentence: sentence about the picture.
        label: whether the sentence is true (`true` or `false`).
        boxes: objects of each box, in the order of the picture.
        tasks: names from `TASKS`.
        seed: seed of the random choices; the same seed gives the same questions.
    """
    rng = Random(seed)
    things = [thing for box in boxes for thing in box]
    by_task = {
        "statement": Question(
            "statement", f"true or false: {' '.join(sentence.lower().split())}", (label.lower(),), metric="nlvr2"
        ),
        "count": _count(things, rng),
        "color": _color(things, rng),
        "size": _size(things, rng),
        "box": _box(boxes, rng),
    }
    return [question for task in tasks if (question := by_task[task]) is not None]


def _count(things: Sequence[Thing], rng: Random) -> Question:
    """Asks for the number of objects of a colour, a shape or both, over all boxes.

    With probability 3/4, the picture contains such an object.
    """
    example = rng.choice(things) if things and rng.random() < 0.75 else None
    color = example.color if example is not None else rng.choice(list(_COLORS.values()))
    shape = example.shape if example is not None else rng.choice(_SHAPES)
    color, shape = rng.choice([(color, shape), (color, ""), ("", shape)])
    count = sum((not color or thing.color == color) and (not shape or thing.shape == shape) for thing in things)
    words = " ".join(word for word in (color, f"{shape}s" if shape else "objects") if word)
    return Question("count", f"how many {words}", (str(count),))


def _color(things: Sequence[Thing], rng: Random) -> Question | None:
    """Asks for the colour of a shape, or of a size and shape, whose objects all have the same colour."""
    kinds: dict[str, set[str]] = {}
    for thing in things:
        for name in (thing.shape, f"{_SIZES[thing.size]} {thing.shape}"):
            kinds.setdefault(name, set()).add(thing.color)
    unique = sorted(name for name, colors in kinds.items() if len(colors) == 1)
    if not unique:
        return None
    name = rng.choice(unique)
    return Question("color", f"what color is the {name}", (next(iter(kinds[name])),))


def _size(things: Sequence[Thing], rng: Random) -> Question | None:
    """Asks for the size of a colour and shape whose objects all have the same size."""
    kinds: dict[str, set[int]] = {}
    for thing in things:
        kinds.setdefault(f"{thing.color} {thing.shape}", set()).add(thing.size)
    unique = sorted(name for name, sizes in kinds.items() if len(sizes) == 1)
    if not unique:
        return None
    # Most objects are medium. The size is therefore drawn first, so that the constant answer "medium" scores low.
    size = rng.choice(sorted({next(iter(kinds[name])) for name in unique}))
    name = rng.choice([name for name in unique if kinds[name] == {size}])
    return Question("size", f"what size is the {name}", (_SIZES[size],))


def _box(boxes: Sequence[Sequence[Thing]], rng: Random) -> Question | None:
    """Asks for the bounding box of an object whose description is unique within its box."""
    candidates = [
        (index, thing)
        for index, box in enumerate(boxes)
        for thing in box
        if sum(other.name == thing.name for other in box) == 1
    ]
    if not candidates:
        return None
    index, thing = rng.choice(candidates)
    return Question("box", f"detect {thing.name}", (format_locations(thing.box),), metric="box_iou", box=index)
