"""The general family: colours, shapes, counts and relations in one image, and comparisons of two images."""

from collections.abc import Callable

from parcelray.datasets.mini.drawing import COLORS, SHAPES
from parcelray.datasets.mini.scenes import (
    GRID,
    KINDS,
    PLURALS,
    Draw,
    ObjectPicture,
    Question,
    Spec,
    Thing,
    color_answers,
    number_answers,
    raster,
    without,
)

_CORNERS = {"top left": 0, "top right": GRID - 1, "bottom left": GRID * (GRID - 1), "bottom right": GRID * GRID - 1}


def color_of_shape(draw: Draw) -> Question:
    """`what color is the circle`, where exactly one object is a circle."""
    target = draw.spec()
    things = draw.scatter([target, *draw.fillers(2, 5, kinds=without(KINDS, target.kind))])
    return Question(f"what color is the {target.kind}", color_answers(target.color), (ObjectPicture(things),))


def shape_of_color(draw: Draw) -> Question:
    """`what shape is red`; of two red objects both shapes are accepted, and the first in reading order is trained."""
    color = draw.rng.choice(COLORS)
    specs = [draw.spec(SHAPES, (color,)) for _ in range(2 if draw.rng.random() < 0.25 else 1)]
    things = draw.scatter([*specs, *draw.fillers(2, 4, colors=without(COLORS, color))])
    shapes = dict.fromkeys(thing.label for thing in raster(things[: len(specs)]))
    return Question(f"what shape is {color}", tuple(shapes), (ObjectPicture(things),))


def count(draw: Draw) -> Question:
    """`how many circles` or `how many red objects`: 0 to 4."""
    # The total is drawn independently of the answer, so that counting all objects does not reveal the answer.
    number, total = draw.rng.randint(0, 4), draw.rng.randint(5, 7)
    others = total - number
    if draw.rng.random() < 0.5:
        kind = draw.rng.choice(KINDS)
        specs = [draw.spec((kind,)) for _ in range(number)] + draw.fillers(others, others, kinds=without(KINDS, kind))
        prompt = f"how many {PLURALS[kind]}"
    else:
        color = draw.rng.choice(COLORS)
        specs = [draw.spec(colors=(color,)) for _ in range(number)] + draw.fillers(
            others, others, colors=without(COLORS, color)
        )
        prompt = f"how many {color} objects"
    return Question(prompt, number_answers(number), (ObjectPicture(draw.scatter(specs)),))


def relation(draw: Draw) -> Question:
    """`is the red circle left of the blue square` or `above`; both are unique and in different columns or rows."""
    holds, phrase = draw.rng.random() < 0.5, draw.rng.choice(("left of", "above"))
    subject = draw.spec(SHAPES)
    other = Spec(draw.rng.choice(without(SHAPES, subject.kind)), draw.rng.choice(without(COLORS, subject.color)))
    rest = [spec for spec in draw.fillers(1, 3) if spec[:2] not in (subject[:2], other[:2])]
    while True:
        things = draw.scatter([subject, other, *rest])
        first, second = (thing.column if phrase == "left of" else thing.row for thing in things[:2])
        if first != second and (first < second) == holds:
            break
    return Question(
        f"is the {things[0].name} {phrase} the {things[1].name}", ("yes" if holds else "no",), (ObjectPicture(things),)
    )


def corner(draw: Draw) -> Question:
    """`what color and shape is in the top left corner`; for a digit, the answer is colour and value."""
    name = draw.rng.choice(list(_CORNERS))
    things = [draw.place(draw.spec(), _CORNERS[name])]
    cells = draw.rng.sample(_without_cell(_CORNERS[name]), draw.rng.randint(2, 5))
    things += [draw.place(draw.spec(), cell) for cell in cells]
    return Question(
        f"what color and shape is in the {name} corner", _name_answers(things[0]), (ObjectPicture(tuple(things)),)
    )


def pair_more(draw: Draw) -> Question:
    """`which image has more circles`: `first`, `second` or `same`."""
    answer, kind = draw.rng.choice(("first", "second", "same")), draw.rng.choice(KINDS)
    few, many = sorted(draw.rng.sample(range(4), 2))
    counts = {"first": (many, few), "second": (few, many), "same": (many, many)}[answer]
    pictures = []
    for number in counts:
        others = draw.rng.randint(4, 5) - number
        specs = [draw.spec((kind,)) for _ in range(number)] + draw.fillers(others, others, kinds=without(KINDS, kind))
        pictures.append(ObjectPicture(draw.scatter(specs)))
    return Question(
        f"which image has more {PLURALS[kind]}", ("same", "equal") if answer == "same" else (answer,), tuple(pictures)
    )


def pair_both(draw: Draw) -> Question:
    """`do both images show a circle`; if the answer is `no`, one image or neither shows one."""
    kind = draw.rng.choice(KINDS)
    shown = (
        (True, True)
        if draw.rng.random() < 0.5
        else draw.rng.choice(((True, False), (False, True), (True, False), (False, True), (False, False)))
    )
    others = without(KINDS, kind)
    pictures = tuple(
        ObjectPicture(draw.scatter([draw.spec((kind,) if show else others), *draw.fillers(1, 3, kinds=others)]))
        for show in shown
    )
    return Question(f"do both images show a {kind}", ("yes" if all(shown) else "no",), pictures)


def pair_color(draw: Draw) -> Question:
    """`what color is the circle in the second image`, where the other image has a circle of another colour."""
    kind, which = draw.rng.choice(KINDS), draw.rng.randrange(2)
    colors = draw.rng.sample(COLORS, 2)
    others = without(KINDS, kind)
    pictures = tuple(
        ObjectPicture(draw.scatter([Spec(kind, color), *draw.fillers(1, 3, kinds=others)])) for color in colors
    )
    return Question(
        f"what color is the {kind} in the {('first', 'second')[which]} image", color_answers(colors[which]), pictures
    )


def _without_cell(excluded: int) -> list[int]:
    """Lists all cells except one."""
    return [cell for cell in range(GRID * GRID) if cell != excluded]


def _name_answers(thing: Thing) -> tuple[str, ...]:
    """Lists the acceptable names of an object: colour, and shape or value."""
    return tuple(f"{color} {thing.label}" for color in color_answers(thing.color))


SINGLE_TASKS: dict[str, Callable[[Draw], Question]] = {
    "color_of_shape": color_of_shape,
    "shape_of_color": shape_of_color,
    "count": count,
    "relation": relation,
    "corner": corner,
}
PAIR_TASKS: dict[str, Callable[[Draw], Question]] = {
    "pair_more": pair_more,
    "pair_both": pair_both,
    "pair_color": pair_color,
}
