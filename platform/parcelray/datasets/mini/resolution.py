"""The resolution-sensitive family: rendered words and numbers, bar charts, small forms."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from parcelray.datasets.mini.drawing import CANVAS, COLORS, Backdrop, Canvas, fill
from parcelray.datasets.mini.font import GLYPH_HEIGHT, LEXICON, text_glyphs, text_width
from parcelray.datasets.mini.scenes import Draw, Question, color_answers, number_answers

FORM_KEYS = ("id", "qty", "row", "bin", "age", "lot")
MAX_BAR = 8
_BAR_UNIT, _BAR_WIDTH, _BAR_PITCH, _BASE, _AXIS = 6, 8, 12, 58, 13


@dataclass(frozen=True, slots=True)
class TextLine:
    """A line of text with its position (`top`, `left`) in canvas pixels."""

    text: str
    top: int
    left: int
    scale: int


@dataclass(frozen=True, slots=True)
class TextPicture:
    """A picture of lines of text in one colour."""

    lines: tuple[TextLine, ...]

    @property
    def content(self) -> str:
        return ";".join(f"{line.text} {line.top} {line.left} {line.scale}" for line in self.lines)

    @property
    def objects(self) -> list[dict[str, Any]]:
        return [
            {
                "name": line.text,
                "box": [
                    line.top,
                    line.left,
                    line.top + GLYPH_HEIGHT * line.scale,
                    line.left + text_width(line.text, line.scale),
                ],
            }
            for line in self.lines
        ]

    def paint(self, canvas: Canvas, backdrop: Backdrop) -> None:
        for line in self.lines:
            for offset, mask in text_glyphs(line.text, line.scale):
                height, width = mask.shape
                left = line.left + offset
                region = canvas[line.top : line.top + height, left : left + width]
                region[mask > 0] = backdrop.ink


@dataclass(frozen=True, slots=True)
class BarPicture:
    """A bar chart with integer heights and an axis with ticks from 0 to 8, labelled at 4 and 8."""

    bars: tuple[tuple[str, int], ...]
    """(colour, height) from left to right."""

    @property
    def content(self) -> str:
        return ";".join(f"{color} {height}" for color, height in self.bars)

    @property
    def objects(self) -> list[dict[str, Any]]:
        return [
            {"name": f"{color} {height}", "box": list(self._box(index, height))}
            for index, (color, height) in enumerate(self.bars)
        ]

    def paint(self, canvas: Canvas, backdrop: Backdrop) -> None:
        ink = backdrop.ink
        fill(canvas, (_BASE - MAX_BAR * _BAR_UNIT, _AXIS, _BASE + 1, _AXIS + 1), ink)
        fill(canvas, (_BASE, _AXIS, _BASE + 1, CANVAS - 2), ink)
        for value in range(1, MAX_BAR + 1):
            fill(
                canvas,
                (_BASE - value * _BAR_UNIT, _AXIS - (4 if value % 4 == 0 else 2), _BASE - value * _BAR_UNIT + 1, _AXIS),
                ink,
            )
        labels = TextPicture(tuple(TextLine(str(value), _BASE - value * _BAR_UNIT - 3, 2, 1) for value in (4, 8)))
        labels.paint(canvas, backdrop)
        for index, (color, height) in enumerate(self.bars):
            fill(canvas, self._box(index, height), color)

    @staticmethod
    def _box(index: int, height: int) -> tuple[int, int, int, int]:
        left = _AXIS + 3 + index * _BAR_PITCH
        return (_BASE - height * _BAR_UNIT, left, _BASE, left + _BAR_WIDTH)


def word(draw: Draw) -> Question:
    """`read the word`: a word of the lexicon in one of two sizes, at a random position."""
    text = draw.rng.choice(LEXICON)
    return Question("read the word", (text,), (place_text(draw, text),))


def number(draw: Draw) -> Question:
    """`read the number`: one to three digits, each length with the same probability."""
    text = str(random_number(draw, draw.rng.randint(1, 3)))
    return Question("read the number", (text,), (place_text(draw, text),))


def bar_tallest(draw: Draw) -> Question:
    """`which bar is tallest`, where exactly one bar is the tallest."""
    while True:
        picture = bars(draw)
        color, height = max(picture.bars, key=lambda bar: bar[1])
        if sum(other == height for _, other in picture.bars) == 1:
            return Question("which bar is tallest", color_answers(color), (picture,))


def bar_height(draw: Draw) -> Question:
    """`how tall is the red bar`: 1 to 8."""
    picture = bars(draw)
    color, height = draw.rng.choice(picture.bars)
    return Question(f"how tall is the {color} bar", number_answers(height), (picture,))


def form(draw: Draw) -> Question:
    """`what is the qty` in a form of two or three lines, such as `qty 42`."""
    picture, fields = form_picture(draw)
    key = draw.rng.choice(list(fields))
    return Question(f"what is the {key}", (fields[key],), (picture,))


def form_picture(draw: Draw) -> tuple[TextPicture, dict[str, str]]:
    """Draws a form of two or three lines; returns its picture and its values by key, from top to bottom."""
    keys = draw.rng.sample(FORM_KEYS, draw.rng.randint(2, 3))
    fields = {key: str(random_number(draw, draw.rng.randint(1, 2))) for key in keys}
    return stack_lines(draw, [f"{key} {value}" for key, value in fields.items()]), fields


def stack_lines(draw: Draw, texts: list[str]) -> TextPicture:
    """Draws up to three small, left-aligned lines of text at a random position on the 4-pixel grid."""
    pitch = 16
    width = max(text_width(text, 1) for text in texts)
    height = pitch * (len(texts) - 1) + GLYPH_HEIGHT
    left, top = _grid_position(draw, width), _grid_position(draw, height)
    return TextPicture(tuple(TextLine(text, top + pitch * line, left, 1) for line, text in enumerate(texts)))


def place_text(draw: Draw, text: str) -> TextPicture:
    """Draws one line of text with a random size and position on the 4-pixel grid."""
    scale = draw.rng.choice((1, 2)) if text_width(text, 2) <= CANVAS - 2 else 1
    left, top = _grid_position(draw, text_width(text, scale)), _grid_position(draw, GLYPH_HEIGHT * scale)
    return TextPicture((TextLine(text, top, left, scale),))


def bars(draw: Draw) -> BarPicture:
    """Draws three or four bars of different colours and independent heights."""
    colors = draw.rng.sample(COLORS, draw.rng.randint(3, 4))
    return BarPicture(tuple((color, draw.rng.randint(1, MAX_BAR)) for color in colors))


def random_number(draw: Draw, figures: int) -> int:
    """Draws a number with the given number of digits, without leading zeros."""
    return draw.rng.randint(10 ** (figures - 1) if figures > 1 else 0, 10**figures - 1)


def _grid_position(draw: Draw, extent: int) -> int:
    """Draws a start coordinate 4 k + 1, so that the position of a glyph within its patches is always the same."""
    return 4 * draw.rng.randint(0, (CANVAS - 2 - extent) // 4) + 1


TASKS: dict[str, Callable[[Draw], Question]] = {
    "word": word,
    "number": number,
    "bar_tallest": bar_tallest,
    "bar_height": bar_height,
    "form": form,
}
