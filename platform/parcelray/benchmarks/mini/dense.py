"""Dense supervision, for training only: long targets that say everything about an image.

Single-word answers give a small model from scratch too little signal to leave the plateau of the answer prior; captions of all
cells, boxes of all objects and spelled texts do.
"""

from collections.abc import Callable

from parcelray.benchmarks.mini import video
from parcelray.benchmarks.mini.drawing import COLORS
from parcelray.benchmarks.mini.font import LETTERS, LEXICON
from parcelray.benchmarks.mini.resolution import bars, form_picture, place_text, stack_lines
from parcelray.benchmarks.mini.scenes import GRID, Draw, ObjectPicture, Question, Thing, loc_tokens, raster

EMPTY = "."
_VIDEO_TASKS = tuple(video.TASKS.values())


def dense_caption(draw: Draw) -> Question:
    """`caption`: all 16 cells in reading order, `.` for an empty one."""
    things = draw.scatter(draw.fillers(3, 7))
    return Question("caption", (grid_caption(things),), (ObjectPicture(things),))


def dense_row(draw: Draw) -> Question:
    """`row 2`: the four cells of a row, counted from 1 at the top."""
    things = draw.scatter(draw.fillers(4, 7))
    row = draw.rng.randrange(GRID)
    return Question(f"row {row + 1}", (" ".join(_cells(things)[GRID * row : GRID * (row + 1)]),), (ObjectPicture(things),))


def dense_cell(draw: Draw) -> Question:
    """`cell 2 3`: the object in row 2, column 3, both counted from 1; `.` if it is empty (one time in five)."""
    things = draw.scatter(draw.fillers(4, 7))
    cells = _cells(things)
    empty = draw.rng.random() < 0.2
    cell = draw.rng.choice([index for index, text in enumerate(cells) if (text == EMPTY) == empty])
    return Question(f"cell {cell // GRID + 1} {cell % GRID + 1}", (cells[cell],), (ObjectPicture(things),))


def dense_colors(draw: Draw) -> Question:
    """`count all colors`: the number of objects of each colour, in the palette's order."""
    things = draw.scatter(draw.fillers(3, 7))
    counts = " ".join(f"{color} {sum(thing.color == color for thing in things)}" for color in COLORS)
    return Question("count all colors", (counts,), (ObjectPicture(things),))


def dense_detect(draw: Draw) -> Question:
    """`detect all`: box and name of up to four objects in reading order."""
    things = draw.scatter(draw.fillers(2, 4))
    return Question("detect all", (" ; ".join(f"{loc_tokens(thing.box)} {thing.name}" for thing in raster(things)),), (ObjectPicture(things),))


def dense_spell(draw: Draw) -> Question:
    """`spell`: the characters of a word, of random letters or of a number, separated by spaces."""
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
    """`read all bars`: colour and height from left to right."""
    picture = bars(draw)
    return Question("read all bars", (" ".join(f"{color} {height}" for color, height in picture.bars),), (picture,))


def dense_pair(draw: Draw) -> Question:
    """`caption`: the cells of both images."""
    first, second = draw.scatter(draw.fillers(2, 4)), draw.scatter(draw.fillers(2, 4))
    return Question("caption", (f"{grid_caption(first)} | {grid_caption(second)}",), (ObjectPicture(first), ObjectPicture(second)))


def dense_pair_lists(draw: Draw) -> Question:
    """`list all`: the objects of each image in reading order."""
    pictures = tuple(ObjectPicture(draw.scatter(draw.fillers(2, 5))) for _ in range(2))
    return Question("list all", (" | ".join(_names(picture.things) for picture in pictures),), pictures)


def dense_frame(draw: Draw) -> Question:
    """`caption frame 3`: the cells of one frame, frames counted from 1."""
    frames = _video(draw)
    index = draw.rng.randrange(len(frames))
    return Question(f"caption frame {index + 1}", (grid_caption(frames[index].things),), frames)


def dense_frames(draw: Draw) -> Question:
    """`list all frames`: the objects of each frame in reading order."""
    frames = _video(draw)
    return Question("list all frames", (" | ".join(_names(frame.things) or EMPTY for frame in frames),), frames)


def dense_track(draw: Draw) -> Question:
    """`track the circle`: row and column of its cell in each frame, counted from 1."""
    frames = tuple(picture for picture in video.direction(draw).pictures if isinstance(picture, ObjectPicture))
    subject = draw.rng.choice(frames[0].things)
    path = [next(thing for thing in frame.things if thing.label == subject.label) for frame in frames]
    return Question(f"track the {subject.label}", (" | ".join(f"{thing.row + 1} {thing.column + 1}" for thing in path),), frames)


def grid_caption(things: tuple[Thing, ...]) -> str:
    """The names of all cells in reading order; `.` for an empty cell."""
    return " ".join(_cells(things))


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
"""The generators by group and family."""
