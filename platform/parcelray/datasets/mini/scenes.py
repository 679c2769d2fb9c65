"""Scenes of the mini suite: the objects of a picture, their rendering, and the split of a scene.

The content of a scene (objects, colours, cells, sizes, digit images, texts; not jitter, backdrop or noise) is hashed,
and the hash decides the split. Generators draw scenes until one belongs to the required split. No scene can therefore
occur in two splits.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from typing import Any, Literal, NamedTuple, Protocol

from parcelray.datasets.mini.digits import digit_images
from parcelray.datasets.mini.drawing import CANVAS, COLORS, SHAPES, Backdrop, Canvas, Mask, shape_mask, stamp

Split = Literal["train", "validation", "test"]
Box = tuple[int, int, int, int]
"""(top, left, bottom, right) in canvas pixels; bottom and right are exclusive."""

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
GRID = 4
CELL = CANVAS // GRID
KINDS = (*SHAPES, "digit")
PLURALS = {kind: "crosses" if kind == "cross" else f"{kind}s" for kind in KINDS}
SMALL, LARGE = 8, 12
LATTICE = 4
"""Distance between the possible positions of objects, pixels."""

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Spec(NamedTuple):
    """Specification of an object that has no position yet."""

    kind: str
    color: str
    value: int | None = None
    """Value of a digit; None: drawn at random."""
    size: int | None = None
    """Side of a shape in pixels; None: small or large, drawn at random."""


class Thing(NamedTuple):
    """An object at a position."""

    label: str
    """Name of the shape, or the digit's value."""
    color: str
    top: int
    left: int
    height: int
    width: int
    digit: int = -1
    """Row of the handwritten image in its data set; -1 for a shape."""
    mask: Mask | None = None

    @property
    def kind(self) -> str:
        """The shape, or `digit`."""
        return "digit" if self.digit >= 0 else self.label

    @property
    def name(self) -> str:
        """Colour and shape or value, for example `red circle` or `blue 7`."""
        return f"{self.color} {self.label}"

    @property
    def box(self) -> Box:
        """The bounding box."""
        return (self.top, self.left, self.top + self.height, self.left + self.width)

    @property
    def row(self) -> int:
        """Row of the cell that holds the centre, from 0 at the top."""
        return (self.top + self.height // 2) // CELL

    @property
    def column(self) -> int:
        """Column of the cell that holds the centre, from 0 at the left."""
        return (self.left + self.width // 2) // CELL

    def paint(self, canvas: Canvas) -> None:
        """Draws the object."""
        stamp(
            canvas,
            shape_mask(self.label, self.height) if self.mask is None else self.mask,
            self.top,
            self.left,
            self.color,
        )


class Picture(Protocol):
    """The content of one image."""

    @property
    def content(self) -> str:
        """Canonical description without jitter, backdrop and noise; equal descriptions are the same scene."""
        ...

    @property
    def objects(self) -> list[dict[str, Any]]:
        """Name and box of each object or line of text, JSON-serialisable."""
        ...

    def paint(self, canvas: Canvas, backdrop: Backdrop) -> None:
        """Draws the picture."""
        ...


@dataclass(frozen=True, slots=True)
class ObjectPicture:
    """A picture of objects in cells."""

    things: tuple[Thing, ...]

    @property
    def content(self) -> str:
        return ";".join(sorted(f"{t.row}{t.column} {t.color} {t.label} {t.height} {t.digit}" for t in self.things))

    @property
    def objects(self) -> list[dict[str, Any]]:
        return [{"name": thing.name, "box": list(thing.box)} for thing in self.things]

    def paint(self, canvas: Canvas, backdrop: Backdrop) -> None:
        for thing in self.things:
            thing.paint(canvas)


@dataclass(frozen=True, slots=True)
class Question:
    """A question about one or more pictures, not yet rendered."""

    prompt: str
    answers: tuple[str, ...]
    """Acceptable answers, the training target first."""
    pictures: tuple[Picture, ...]
    metric: str = "exact_match"

    @property
    def scene(self) -> str:
        """Hash of the contents of all pictures, 16 hexadecimal digits."""
        return blake2b("|".join(picture.content for picture in self.pictures).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class Draw:
    """The random generator of one sample, and the split whose digit images it may use."""

    rng: Random
    split: Split

    def thing(self, spec: Spec, top: int, left: int) -> Thing:
        """Creates an object in the middle of the cell whose top left corner is at (`top`, `left`)."""
        if spec.kind == "digit":
            value = self.rng.randrange(10) if spec.value is None else spec.value
            image = self.rng.choice(digit_images(self.split)[value])
            height, width = image.mask.shape
            return Thing(
                str(value),
                spec.color,
                top,
                left + (CELL - width) // 2 // LATTICE * LATTICE,
                height,
                width,
                image.row,
                image.mask,
            )
        size = self.rng.choice((SMALL, LARGE)) if spec.size is None else spec.size
        offset = (CELL - size) // 2 // LATTICE * LATTICE
        return Thing(spec.kind, spec.color, top + offset, left + offset, size, size)

    def place(self, spec: Spec, cell: int) -> Thing:
        """Creates an object at a random position inside a cell (row-major index), on the 4-pixel grid of the patches.

        At other positions, the same shape would look different in every patch, and a model from scratch would need
        several times as many samples.
        """
        top, left = cell // GRID * CELL, cell % GRID * CELL
        thing = self.thing(spec, top, left)
        steps_y, steps_x = (CELL - thing.height) // LATTICE, (CELL - thing.width) // LATTICE
        return thing._replace(
            top=top + LATTICE * self.rng.randint(0, steps_y), left=left + LATTICE * self.rng.randint(0, steps_x)
        )

    def scatter(self, specs: Sequence[Spec]) -> tuple[Thing, ...]:
        """Creates objects in distinct random cells, in the order of the specs."""
        return tuple(
            self.place(spec, cell)
            for spec, cell in zip(specs, self.rng.sample(range(GRID * GRID), len(specs)), strict=True)
        )

    def spec(self, kinds: Sequence[str] = KINDS, colors: Sequence[str] = COLORS) -> Spec:
        """Draws a random spec from the given kinds and colours."""
        return Spec(self.rng.choice(kinds), self.rng.choice(colors))

    def fillers(self, low: int, high: int, kinds: Sequence[str] = KINDS, colors: Sequence[str] = COLORS) -> list[Spec]:
        """Draws `low` to `high` random specs from the given kinds and colours."""
        return [self.spec(kinds, colors) for _ in range(self.rng.randint(low, high))]


def split_of(scene: str) -> Split:
    """Returns the split of a scene hash: 80 % training, 10 % validation, 10 % test."""
    bucket = int(scene, 16) % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"


def without(values: Iterable[str], *excluded: str) -> list[str]:
    """Lists the values that are not excluded, in order."""
    return [value for value in values if value not in excluded]


def raster(things: Iterable[Thing]) -> list[Thing]:
    """Sorts objects in the reading order of their cells."""
    return sorted(things, key=lambda thing: (thing.row, thing.column))


def color_answers(color: str) -> tuple[str, ...]:
    """Lists the acceptable names of a colour."""
    return ("purple", "violet") if color == "purple" else (color,)


def number_answers(number: int) -> tuple[str, ...]:
    """Lists the acceptable ways to write a number from 0 to 9."""
    return (str(number), NUMBER_WORDS[number])


def loc_tokens(box: Box) -> str:
    """Writes a box as PaliGemma location tokens: top, left, bottom, right, each in 1024 bins over the image's side."""
    return "".join(f"<loc{round(edge / CANVAS * 1023):04d}>" for edge in box)
