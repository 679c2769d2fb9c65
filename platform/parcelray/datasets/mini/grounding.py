"""The grounding family: the box of a described object as PaliGemma location tokens."""

from collections.abc import Callable

from parcelray.datasets.mini.drawing import COLORS, SHAPES
from parcelray.datasets.mini.scenes import KINDS, LARGE, SMALL, Draw, ObjectPicture, Question, Spec, loc_tokens, without

METRIC = "box_iou"


def box(draw: Draw) -> Question:
    """`detect red circle`, where exactly one object is a red circle; distractors share its colour or its shape."""
    target = draw.spec(SHAPES)
    distractors = [
        Spec(target.kind, draw.rng.choice(without(COLORS, target.color))),
        Spec(draw.rng.choice(without(KINDS, target.kind)), target.color),
    ]
    others = [spec for spec in draw.fillers(0, 2) if spec[:2] != target[:2]]
    things = draw.scatter([target, *draw.rng.sample(distractors, draw.rng.randint(1, 2)), *others])
    return Question(f"detect {things[0].name}", (loc_tokens(things[0].box),), (ObjectPicture(things),), METRIC)


def box_largest(draw: Draw) -> Question:
    """`detect the largest circle`: one large circle among one or two small ones."""
    kind = draw.rng.choice(SHAPES)
    small = [Spec(kind, draw.rng.choice(COLORS), size=SMALL) for _ in range(draw.rng.randint(1, 2))]
    things = draw.scatter(
        [Spec(kind, draw.rng.choice(COLORS), size=LARGE), *small, *draw.fillers(1, 3, kinds=without(KINDS, kind))]
    )
    return Question(f"detect the largest {kind}", (loc_tokens(things[0].box),), (ObjectPicture(things),), METRIC)


def box_digit(draw: Draw) -> Question:
    """`detect the digit 7` among other digits and shapes."""
    values = draw.rng.sample(range(10), draw.rng.randint(2, 3))
    digits = [Spec("digit", draw.rng.choice(COLORS), value) for value in values]
    things = draw.scatter([*digits, *draw.fillers(1, 2, kinds=SHAPES)])
    return Question(
        f"detect the digit {things[0].label}", (loc_tokens(things[0].box),), (ObjectPicture(things),), METRIC
    )


TASKS: dict[str, Callable[[Draw], Question]] = {"box": box, "box_largest": box_largest, "box_digit": box_digit}
