"""Answers of the mini suite, checked against the objects in the metadata, and objects checked against the pixels."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from parcelray.datasets.mini import FAMILIES, MiniSuite, family_samples
from parcelray.datasets.mini.drawing import COLORS, PALETTE, SHAPES, shape_mask
from parcelray.datasets.mini.font import LETTERS, LEXICON, text_glyphs, text_width
from parcelray.datasets.mini.resolution import FORM_KEYS
from parcelray.datasets.mini.scenes import KINDS, PLURALS, Box, loc_tokens
from parcelray.datasets.sample import Sample

PROMPT_WORDS = """
a above all appears at bar bars both bottom caption cell color colors corner count detect digit digits do does down end
first frame frames has how image images in is largest last left list many more move no number objects of read right row
same second shape shapes show spell start tall tallest the top track up way what which word yes and
"""
"""All words of prompts and training targets except names of colours, shapes, texts and form keys."""
SINGULAR = {plural: kind for kind, plural in PLURALS.items()}


@pytest.fixture(scope="module")
def by_task() -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = {}
    for family in FAMILIES:
        for sample in family_samples("test", family, 200):
            samples.setdefault(sample.task, []).append(sample)
    return samples


def objects(sample: Sample, image: int = 0) -> list[tuple[str, str, Box]]:
    """Lists (colour, label, box) of each object of an image."""
    return [(*entry["name"].split(), tuple(entry["box"])) for entry in sample.metadata["objects"][image]]


def of_kind(sample: Sample, kind: str, image: int = 0) -> list[tuple[str, str, Box]]:
    return [entry for entry in objects(sample, image) if entry[1] == kind or (kind == "digit" and entry[1].isdigit())]


def cell(box: Box) -> tuple[int, int]:
    return (box[0] + box[2]) // 2 // 16, (box[1] + box[3]) // 2 // 16


def test_color_of_shape(by_task):
    for sample in by_task["color_of_shape"]:
        [(color, _, _)] = of_kind(sample, sample.prompt.split()[-1])
        assert sample.answers == (("purple", "violet") if color == "purple" else (color,))


def test_shape_of_color(by_task):
    counts = set()
    for sample in by_task["shape_of_color"]:
        color = sample.prompt.split()[-1]
        labels = {label for c, label, _ in objects(sample) if c == color}
        assert labels == set(sample.answers) <= set(SHAPES)
        counts.add(len(labels))
    assert counts == {1, 2}


def test_count(by_task):
    for sample in by_task["count"]:
        what = sample.prompt.split()[2]
        number = (
            len(of_kind(sample, SINGULAR[what]))
            if what in SINGULAR
            else sum(color == what for color, _, _ in objects(sample))
        )
        assert sample.answers == (str(number), ("zero", "one", "two", "three", "four")[number])
        assert 5 <= len(objects(sample)) <= 7


def test_relation(by_task):
    for sample in by_task["relation"]:
        match = re.fullmatch(r"is the (\w+ \w+) (left of|above) the (\w+ \w+)", sample.prompt)
        assert match
        boxes = [
            [box for color, label, box in objects(sample) if f"{color} {label}" == name] for name in match.group(1, 3)
        ]
        assert [len(candidates) for candidates in boxes] == [1, 1]
        axis = 1 if match[2] == "left of" else 0
        first, second = (cell(candidates[0])[axis] for candidates in boxes)
        assert first != second
        assert sample.answers == ("yes" if first < second else "no",)


def test_corner(by_task):
    for sample in by_task["corner"]:
        vertical, horizontal = sample.prompt.split()[-3:-1]
        corner = (3 if vertical == "bottom" else 0, 3 if horizontal == "right" else 0)
        [name] = [f"{color} {label}" for color, label, box in objects(sample) if cell(box) == corner]
        assert sample.answers[0] == name


def test_pairs(by_task):
    for sample in by_task["pair_more"]:
        first, second = (len(of_kind(sample, SINGULAR[sample.prompt.split()[-1]], image)) for image in range(2))
        assert sample.answers[0] == ("first" if first > second else "second" if second > first else "same")
    for sample in by_task["pair_both"]:
        assert sample.answers[0] == (
            "yes" if all(of_kind(sample, sample.prompt.split()[-1], image) for image in range(2)) else "no"
        )
    for sample in by_task["pair_color"]:
        words = sample.prompt.split()
        [(color, _, _)] = of_kind(sample, words[4], ("first", "second").index(words[7]))
        assert sample.answers[0] == color


def test_texts(by_task):
    for task in ("word", "number"):
        for sample in by_task[task]:
            assert sample.answers[0] == sample.metadata["objects"][0][0]["name"]
    for sample in by_task["form"]:
        fields = dict(entry["name"].split() for entry in sample.metadata["objects"][0])
        assert sample.answers == (fields[sample.prompt.split()[-1]],)


def test_bars(by_task):
    for sample in by_task["bar_tallest"]:
        heights = sorted((int(height), color) for color, height, _ in objects(sample))
        assert sample.answers[0] == heights[-1][1]
        assert heights[-1][0] > heights[-2][0]
    for sample in by_task["bar_height"]:
        assert sample.answers[0] == {color: height for color, height, _ in objects(sample)}[sample.prompt.split()[-2]]


def test_grounding(by_task):
    for sample in by_task["box"]:
        [(_, _, box)] = [entry for entry in objects(sample) if f"detect {entry[0]} {entry[1]}" == sample.prompt]
        assert sample.answers == (loc_tokens(box),)
    for sample in by_task["box_largest"]:
        sizes = sorted((box[2] - box[0], box) for _, _, box in of_kind(sample, sample.prompt.split()[-1]))
        assert len(sizes) > 1
        assert sizes[-1][0] > sizes[-2][0]
        assert sample.answers == (loc_tokens(sizes[-1][1]),)
    for sample in by_task["box_digit"]:
        [(_, _, box)] = of_kind(sample, sample.prompt.split()[-1])
        assert sample.answers == (loc_tokens(box),)


def test_direction(by_task):
    for sample in by_task["direction"]:
        color, label = sample.prompt.split()[4:6]
        path = [
            next(box for c, name, box in objects(sample, frame) if (c, name) == (color, label)) for frame in range(4)
        ]
        dy, dx = path[3][0] - path[0][0], path[3][1] - path[0][1]
        assert sample.answers == (
            {(0, 1): "right", (0, -1): "left", (1, 0): "down", (-1, 0): "up"}[int(np.sign(dy)), int(np.sign(dx))],
        )
        assert abs(dy + dx) in (24, 36)


def test_other_videos(by_task):
    for sample in by_task["color_change"]:
        words = sample.prompt.split()
        [(color, _, _)] = of_kind(sample, words[4], 3 if words[-1] == "end" else 0)
        assert sample.answers[0] == color
    for sample in by_task["order"]:
        appeared: list[str] = []
        for frame in range(4):
            new = [label for _, label, _ in objects(sample, frame) if label not in appeared]
            assert len(new) <= 1
            appeared += new
        assert sample.answers == (appeared[0] if sample.prompt.endswith("first") else appeared[-1],)
    for sample in by_task["digit_frames"]:
        assert sample.answers[0] == str(sum(bool(of_kind(sample, "digit", frame)) for frame in range(4)))


def test_pixels_show_the_listed_objects(by_task):
    for task in ("count", "pair_more", "box", "direction", "color_change", "bar_height"):
        for sample in by_task[task][:40]:
            for index, image in enumerate(sample.images):
                pixels = np.asarray(Image.open(io.BytesIO(image))).astype(int)
                for color, label, (top, left, bottom, right) in objects(sample, index):
                    region = pixels[top:bottom, left:right]
                    assert region.shape == (bottom - top, right - left, 3)
                    if label in SHAPES or task == "bar_height":
                        near = np.abs(region - np.array(PALETTE[color])).max(axis=-1) <= 2
                        assert near.mean() > 0.12, (task, color, label)


def test_objects_do_not_overlap(by_task):
    for task in ("count", "box_digit", "relation", "direction", "pair_more"):
        for sample in by_task[task]:
            for image in range(len(sample.images)):
                covered = np.zeros((64, 64), dtype=int)
                for _, _, (top, left, bottom, right) in objects(sample, image):
                    covered[top:bottom, left:right] += 1
                assert covered.max() == 1


def test_loc_tokens_round_trip():
    assert loc_tokens((0, 16, 32, 64)) == "<loc0000><loc0256><loc0512><loc1023>"
    for edge in range(65):
        bins = [int(value) for value in re.findall(r"<loc(\d{4})>", loc_tokens((edge, 0, 64, 64)))]
        assert round(bins[0] / 1023 * 64) == edge


def test_dense_answers_describe_the_scene():
    suite = MiniSuite("train", dense_fraction=1.0)
    checked = set()
    for group, count in (("single", 300), ("pair", 40), ("video", 60)):
        for index in range(count):
            sample = suite.get(group, index)
            names = [sorted(entry["name"] for entry in image) for image in sample.metadata["objects"]]
            answer = sample.answers[0]
            if sample.task in ("dense_caption", "dense_pair"):
                word = 0 if sample.prompt.endswith("colors") else 1
                parts = [part.split() for part in answer.split(" | ")]
                assert [part[::2] for part in parts] == [list("abcdefghijklmnop")] * len(sample.images)
                words = [sorted(entry for entry in part[1::2] if entry != ".") for part in parts]
                assert words == [sorted(name.split()[word] for name in image) for image in names]
            elif sample.task in ("dense_pair_lists", "dense_frames"):
                assert [sorted(re.findall(r"\w+ \w+", part)) for part in answer.split(" | ")] == names
            elif sample.task == "dense_detect":
                expected = sorted(
                    f"{loc_tokens(tuple(entry['box']))} {entry['name']}" for entry in sample.metadata["objects"][0]
                )
                assert sorted(answer.split(" ; ")) == expected
            elif sample.task == "dense_spell":
                assert answer == " ".join(sample.metadata["objects"][0][0]["name"])
            elif sample.task in ("dense_read", "dense_bars"):
                assert answer == (" ; " if sample.task == "dense_read" else " ").join(
                    entry["name"] for entry in sample.metadata["objects"][0]
                )
            elif sample.task == "dense_cell":
                position = divmod("abcdefghijklmnop".index(sample.prompt.split()[1]), 4)
                assert answer == next(
                    (f"{color} {label}" for color, label, box in objects(sample) if cell(box) == position), "."
                )
            elif sample.task == "dense_colors":
                assert answer == " ".join(
                    f"{color} {sum(c == color for c, _, _ in objects(sample))}" for color in COLORS
                )
            elif sample.task == "dense_track":
                label = sample.prompt.split()[-1]
                cells = [
                    next(cell(box) for _, name, box in objects(sample, frame) if name == label) for frame in range(4)
                ]
                assert answer == " ".join("abcdefghijklmnop"[4 * row + column] for row, column in cells)
            else:
                continue
            checked.add(sample.task)
    assert len(checked) == 11


def test_vocabulary_is_closed():
    texts = list(MiniSuite("train").texts(6000))
    words = {word for text in texts for word in re.sub(r"<loc\d{4}>", " ", text).split()}
    names = {*COLORS, *KINDS, *PLURALS.values(), *LEXICON, *FORM_KEYS, *LETTERS, *"0123456789"}
    assert {word for word in words if not re.fullmatch(r"\d\d+", word)} == {*PROMPT_WORDS.split(), *names, *".;|"}
    assert list(MiniSuite("train").texts(50)) == list(MiniSuite("train").texts(50))


def test_shapes_and_glyphs_are_distinct():
    for size in (8, 12):
        masks = [shape_mask(shape, size) for shape in SHAPES]
        distances = [np.abs(a - b).mean() for i, a in enumerate(masks) for b in masks[:i]]
        assert min(distances) > 0.15
    glyphs = [text_glyphs(character, 1)[0][1] for character in LETTERS + "0123456789"]
    assert min(int((a != b).sum()) for i, a in enumerate(glyphs) for b in glyphs[:i]) >= 2
    assert all(glyph.shape == (7, 5) for glyph in glyphs)


def test_the_lexicon_fits_and_uses_every_letter():
    assert len(set(LEXICON)) == len(LEXICON) == 40
    assert set("".join(LEXICON)) == set(LETTERS)
    assert max(text_width(word, 2) for word in LEXICON) < 64
