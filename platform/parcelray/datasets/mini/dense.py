"""Dense supervision for training: long targets that describe a whole image.

Single-word answers give a small model from scratch too little signal to learn more than the answer prior. Captions of
all cells, boxes of all objects and spelled texts give enough.
"""

from collections.abc import Callable

from parcelray.datasets.mini import video
from parcelray.datasets.mini.drawing import COLORS
from parcelray.datasets.mini.font import LETTERS, LEXICON
from parcelray.datasets.mini.resolution import bars, form_picture, place_text, stack_lines
from parcelray.datasets.mini.scenes import GRID, Draw, ObjectPicture, Question, Thing, loc_tokens, raster

EMPTY = "."
ASPECTS = ("colors", "shapes")
_VIDEO_TASKS = tuple(video.TASKS.values())


def dense_caption(draw: Draw) -> Question:
    """`caption colors` or `caption shapes`: letter and word of each of the 16 cells.

    The letters are a to p in reading order; the word of an empty cell is `.`. The letter names the described cell.
    Without it, the model would have to count the preceding words, which a model from scratch learns late.
    """
    things = draw.scatter(draw.fillers(5, 9))
    aspect = draw.rng.choice(ASPECTS)
    return Question(f"caption {aspect}", (grid_caption(things, aspect),), (ObjectPicture(things),))


def dense_row(draw: Draw) -> Question:
    """`row 2 colors` or `row 2 shapes`: letter and word of each cell of a row; rows count from 1 at the top."""
    things = draw.scatter(draw.fillers(4, 7))
    row, aspect = draw.rng.randrange(GRID), draw.rng.choice(ASPECTS)
    return Question(
        f"row {row + 1} {aspect}",
        (" ".join(_words(things, aspect)[GRID * row : GRID * (row + 1)]),),
        (ObjectPicture(things),),
    )


def dense_cell(draw: Draw) -> Question:
    """`cell g`: the object in a cell (a to p in reading order), or `.` if it is empty (with probability 1/5)."""
    things = draw.scatter(draw.fillers(4, 7))
    cells = _cells(things)
    empty = draw.rng.random() < 0.2
    cell = draw.rng.choice([index for index, text in enumerate(cells) if (text == EMPTY) == empty])
    return Question(f"cell {LETTERS[cell]}", (cells[cell],), (ObjectPicture(things),))


def dense_colors(draw: Draw) -> Question:
    """`count all colors`: the number of objects of each colour, in the order of the palette."""
    things = draw.scatter(draw.fillers(3, 7))
    counts = " ".join(f"{color} {sum(thing.color == color for thing in things)}" for color in COLORS)
    return Question("count all colors", (counts,), (ObjectPicture(things),))


def dense_detect(draw: Draw) -> Question:
    """`detect all`: boxes and names of up to four objects, in reading order."""
    things = draw.scatter(draw.fillers(2, 4))
    return Question(
        "detect all",
        (" ; ".join(f"{loc_tokens(thing.box)} {thing.name}" for thing in raster(things)),),
        (ObjectPicture(things),),
    )


def dense_spell(draw: Draw) -> Question:
    """`spell`: the characters of a word, a random string or a number, separated by spaces."""
    source = draw.rng.random()
    characters = draw.rng.choices(LETTERS if source < 0.7 else "0123456789", k=draw.rng.randint(3, 6))
    text = draw.rng.choice(LEXICON) if source < 0.3 else "".join(characters)
    return Question("spell", (" ".join(text),), (place_text(draw, text),))


def dense_read(draw: Draw) -> Question:
    """`read all`: the lines of a form or of a list of words, from top to bottom."""
    if draw.rng.random() < 0.6:
        picture, fields = form_picture(draw)
        lines = [f"{key} {value}" for key, value in fields.items()]
    else:
        lines = draw.rng.sample(LEXICON, draw.rng.randint(2, 3))
        picture = stack_lines(draw, lines)
    return Question("read all", (" ; ".join(lines),), (picture,))


def dense_bars(draw: Draw) -> Question:
    """`read all bars`: colour and height of each bar, from left to right."""
    picture = bars(draw)
    return Question("read all bars", (" ".join(f"{color} {height}" for color, height in picture.bars),), (picture,))


def dense_pair(draw: Draw) -> Question:
    """`caption colors` or `caption shapes` for two images: letter and word of each cell."""
    first, second = draw.scatter(draw.fillers(2, 4)), draw.scatter(draw.fillers(2, 4))
    aspect = draw.rng.choice(ASPECTS)
    answer = f"{grid_caption(first, aspect)} | {grid_caption(second, aspect)}"
    return Question(f"caption {aspect}", (answer,), (ObjectPicture(first), ObjectPicture(second)))


def dense_pair_lists(draw: Draw) -> Question:
    """`list all`: the objects of both images, in reading order."""
    pictures = tuple(ObjectPicture(draw.scatter(draw.fillers(2, 5))) for _ in range(2))
    return Question("list all", (" | ".join(_names(picture.things) for picture in pictures),), pictures)


def dense_frame(draw: Draw) -> Question:
    """`caption frame 3 colors` or `... shapes`: letter and word of each cell of one frame; frames count from 1."""
    frames = _video(draw)
    index, aspect = draw.rng.randrange(len(frames)), draw.rng.choice(ASPECTS)
    return Question(f"caption frame {index + 1} {aspect}", (grid_caption(frames[index].things, aspect),), frames)


def dense_frames(draw: Draw) -> Question:
    """`list all frames`: the objects of each frame, in reading order."""
    frames = _video(draw)
    return Question("list all frames", (" | ".join(_names(frame.things) or EMPTY for frame in frames),), frames)


def dense_track(draw: Draw) -> Question:
    """`track the circle`: the letter of its cell in each frame."""
    frames = tuple(picture for picture in video.direction(draw).pictures if isinstance(picture, ObjectPicture))
    subject = draw.rng.choice(frames[0].things)
    path = [next(thing for thing in frame.things if thing.label == subject.label) for frame in frames]
    return Question(
        f"track the {subject.label}", (" ".join(LETTERS[thing.row * GRID + thing.column] for thing in path),), frames
    )


def grid_caption(things: tuple[Thing, ...], aspect: str) -> str:
    """Writes letter and word of each cell in reading order: colour or shape (for digits the value), or `.` if empty."""
    return " ".join(_words(things, aspect))


def _words(things: tuple[Thing, ...], aspect: str) -> list[str]:
    words = [EMPTY] * (GRID * GRID)
    for thing in things:
        words[thing.row * GRID + thing.column] = thing.color if aspect == "colors" else thing.label
    return [f"{letter} {word}" for letter, word in zip(LETTERS, words, strict=False)]


def _cells(things: tuple[Thing, ...]) -> list[str]:
    cells = [EMPTY] * (GRID * GRID)
    for thing in things:
        cells[thing.row * GRID + thing.column] = thing.name
    return cells


def _names(things: tuple[Thing, ...]) -> str:
    return " ".join(thing.name for thing in raster(things))


def _video(draw: Draw) -> tuple[ObjectPicture, ...]:
    question = draw.rng.choice(_VIDEO_TASKS)(draw)
    return tuple(picture for picture in question.pictures if isinstance(picture, ObjectPicture))


DENSE_TASKS: dict[tuple[str, str], dict[str, Callable[[Draw], Question]]] = {
    ("single", "general"): {
        "dense_caption": dense_caption,
        "dense_row": dense_row,
        "dense_cell": dense_cell,
        "dense_colors": dense_colors,
    },
    ("single", "resolution"): {"dense_spell": dense_spell, "dense_read": dense_read, "dense_bars": dense_bars},
    ("single", "grounding"): {"dense_detect": dense_detect},
    ("pair", "general"): {"dense_pair": dense_pair, "dense_pair_lists": dense_pair_lists},
    ("video", "video"): {"dense_frame": dense_frame, "dense_frames": dense_frames, "dense_track": dense_track},
}
"""The generators of dense supervision by group and family."""
