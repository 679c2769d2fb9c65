"""The video family: four frames with motion, colour changes, appearing objects and digits."""

from collections.abc import Callable, Sequence

from parcelray.datasets.mini.drawing import CANVAS, COLORS, SHAPES
from parcelray.datasets.mini.scenes import (
    CELL,
    GRID,
    LATTICE,
    Draw,
    ObjectPicture,
    Question,
    Spec,
    Thing,
    color_answers,
    number_answers,
    without,
)

NUM_FRAMES = 4
_DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}


def direction(draw: Draw) -> Question:
    """`which way does the red circle move`; a second object may move or rest in another lane."""
    answer = draw.rng.choice(list(_DIRECTIONS))
    subject = draw.spec(SHAPES)
    lanes = draw.rng.sample(range(GRID), 2)
    tracks = [_track(draw, subject, answer, lanes[0], moving=True)]
    if draw.rng.random() < 0.6:
        other = Spec(draw.rng.choice(without(SHAPES, subject.kind)), draw.rng.choice(COLORS))
        options = ("left", "right") if answer in ("left", "right") else ("up", "down")
        tracks.append(_track(draw, other, draw.rng.choice(options), lanes[1], moving=draw.rng.random() < 0.6))
    return Question(f"which way does the {tracks[0][0].name} move", (answer,), _frames(tracks))


def color_change(draw: Draw) -> Question:
    """`what color is the square at the end` or `at the start`; the square changes its colour once and does not move."""
    kind, moment = draw.rng.choice(SHAPES), draw.rng.choice(("start", "end"))
    before, after = draw.rng.sample(COLORS, 2)
    change = draw.rng.randint(1, NUM_FRAMES - 1)
    target, *rest = draw.scatter([Spec(kind, before), *draw.fillers(0, 1, kinds=without(SHAPES, kind))])
    frames = [[target._replace(color=before if frame < change else after), *rest] for frame in range(NUM_FRAMES)]
    return Question(
        f"what color is the {kind} at the {moment}",
        color_answers(before if moment == "start" else after),
        _pictures(frames),
    )


def order(draw: Draw) -> Question:
    """`which shape appears first` or `last`; two or three shapes appear in different frames and stay."""
    number, which = draw.rng.randint(2, 3), draw.rng.choice(("first", "last"))
    kinds = draw.rng.sample(SHAPES, number)
    things = draw.scatter([Spec(kind, draw.rng.choice(COLORS)) for kind in kinds])
    starts = sorted(draw.rng.sample(range(NUM_FRAMES), number))
    frames = [
        [thing for thing, start in zip(things, starts, strict=True) if start <= frame] for frame in range(NUM_FRAMES)
    ]
    return Question(f"which shape appears {which}", (kinds[0] if which == "first" else kinds[-1],), _pictures(frames))


def digit_frames(draw: Draw) -> Question:
    """`how many frames show a digit`: 0 to 4; each frame shows two objects."""
    number = draw.rng.randint(0, NUM_FRAMES)
    with_digit = set(draw.rng.sample(range(NUM_FRAMES), number))
    frames = [
        draw.scatter([draw.spec(SHAPES), draw.spec(("digit",) if frame in with_digit else SHAPES)])
        for frame in range(NUM_FRAMES)
    ]
    return Question("how many frames show a digit", number_answers(number), _pictures(frames))


def _track(draw: Draw, spec: Spec, heading: str, lane: int, *, moving: bool) -> list[Thing]:
    """Creates the object of each frame; it moves 8 or 12 pixels per frame along a row or column, or rests."""
    step = draw.rng.choice((8, 12)) if moving else 0
    d_row, d_column = _DIRECTIONS[heading]
    travel = step * (NUM_FRAMES - 1)
    start = LATTICE * draw.rng.randint(0, (CANVAS - CELL - travel) // LATTICE)
    if d_row + d_column < 0:
        start += travel
    lane_start = lane * CELL
    thing = draw.thing(spec, *((start, lane_start) if d_row else (lane_start, start)))
    return [
        thing._replace(top=thing.top + d_row * step * frame, left=thing.left + d_column * step * frame)
        for frame in range(NUM_FRAMES)
    ]


def _frames(tracks: Sequence[Sequence[Thing]]) -> tuple[ObjectPicture, ...]:
    return tuple(ObjectPicture(things) for things in zip(*tracks, strict=True))


def _pictures(frames: Sequence[Sequence[Thing]]) -> tuple[ObjectPicture, ...]:
    return tuple(ObjectPicture(tuple(things)) for things in frames)


TASKS: dict[str, Callable[[Draw], Question]] = {
    "direction": direction,
    "color_change": color_change,
    "order": order,
    "digit_frames": digit_frames,
}
