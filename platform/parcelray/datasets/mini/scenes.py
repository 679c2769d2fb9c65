"""Scenes of the mini suite: what is in a picture, how it is drawn, and which split it belongs to.

A scene's content (objects, colours, cells, sizes, digit images, texts; not jitter, backdrop or noise) is hashed, and
the hash decides the split. Generators draw until a scene falls into the wanted split, so no scene can occur in two.
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
"""Pixels between the places that objects can take."""

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Spec(NamedTuple):
    """What to place, before it has a position."""

    kind: str
    color: str
    value: int | None = None
    """Value of a digit; None draws one."""
    size: int | None = None
    """Side of a shape in pixels; None draws small or large."""


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
    """What one image shows."""

    @property
    def content(self) -> str:
        """Canonical description without nuisances; equal contents are the same scene."""
        ...

    @property
    def objects(self) -> list[dict[str, Any]]:
        """Name and box of each part, JSON-serialisable."""
        ...

    def paint(self, canvas: Canvas, backdrop: Backdrop) -> None:
        """Draws the picture."""
        ...


@dataclass(frozen=True, slots=True)
class ObjectPicture:
    """Objects in cells."""

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
    """The randomness of one sample, and the split whose digit images it may use."""

    rng: Random
    split: Split

    def thing(self, spec: Spec, top: int, left: int) -> Thing:
        """Realises a spec in the middle of the cell whose top left corner is at (`top`, `left`)."""
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
        """Realises a spec in a cell (row-major index), anywhere inside it on the 4-pixel lattice of the patches.

        Off the lattice every shape looks different to every patch, and a model from scratch needs several times the
        samples.
        """
        top, left = cell // GRID * CELL, cell % GRID * CELL
        thing = self.thing(spec, top, left)
        steps_y, steps_x = (CELL - thing.height) // LATTICE, (CELL - thing.width) // LATTICE
        return thing._replace(
            top=top + LATTICE * self.rng.randint(0, steps_y), left=left + LATTICE * self.rng.randint(0, steps_x)
        )

    def scatter(self, specs: Sequence[Spec]) -> tuple[Thing, ...]:
        """Realises specs in distinct random cells; the result keeps their order."""
        return tuple(
            self.place(spec, cell)
            for spec, cell in zip(specs, self.rng.sample(range(GRID * GRID), len(specs)), strict=True)
        )

    def spec(self, kinds: Sequence[str] = KINDS, colors: Sequence[str] = COLORS) -> Spec:
        """A random spec from the given kinds and colours."""
        return Spec(self.rng.choice(kinds), self.rng.choice(colors))

    def fillers(self, low: int, high: int, kinds: Sequence[str] = KINDS, colors: Sequence[str] = COLORS) -> list[Spec]:
        """`low` to `high` random specs from the given kinds and colours."""
        return [self.spec(kinds, colors) for _ in range(self.rng.randint(low, high))]


def split_of(scene: str) -> Split:
    """The split that a scene hash belongs to: 80 % training, 10 % validation, 10 % test."""
    bucket = int(scene, 16) % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"


def without(values: Iterable[str], *excluded: str) -> list[str]:
    """The values that are not excluded, in order."""
    return [value for value in values if value not in excluded]


def raster(things: Iterable[Thing]) -> list[Thing]:
    """Objects in reading order of their cells."""
    return sorted(things, key=lambda thing: (thing.row, thing.column))


def color_answers(color: str) -> tuple[str, ...]:
    """Acceptable names of a colour."""
    return ("purple", "violet") if color == "purple" else (color,)


def number_answers(number: int) -> tuple[str, ...]:
    """Acceptable ways to write a number from 0 to 9."""
    return (str(number), NUMBER_WORDS[number])


def loc_tokens(box: Box) -> str:
    """PaliGemma location tokens of a box: top, left, bottom, right, each in 1024 bins over the image's side."""
    return "".join(f"<loc{round(edge / CANVAS * 1023):04d}>" for edge in box)
