"""The NLVR corpus: human-written sentences about pictures of three boxes (Suhr et al., ACL 2017; CC-BY-4.0).

A picture has 400 x 100 pixels: three boxes of 100 x 100 pixels at x = 0, 150 and 300. Each sentence has up to four sets
of boxes, and each set six pictures, one for each permutation of the boxes. The identifier `3776-0` names a sentence and
one of its sets. Position k of picture p shows box `PERMUTATIONS[p][k]` of the structured
representation. This order was verified by rendering the representation: in all 11,874 pictures of the two splits, no
other order is closer to the pixels.

The metrics of the corpus are accuracy over pictures, and consistency: the fraction of sentences whose pictures, of all
sets, are answered correctly.
"""

import functools
import hashlib
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from parcelray.datasets.images import decode_image
from parcelray.datasets.nlvr.questions import TASKS, Question, Thing, questions_of
from parcelray.datasets.sample import Sample
from parcelray.datasets.source import SampleGroup
from parcelray.errors import UserError

BOX = 100
"""Side of a box in pixels."""
BOX_STARTS = (0, 150, 300)
PERMUTATIONS = tuple(itertools.permutations(range(3)))
_VALIDATION_SHARE = 0.15
_BOX_WEIGHT = 0.2
"""Fraction of the training steps with box questions; the other steps draw from all other questions uniformly."""

_COLUMNS = ("sentence", "label", "identifier", "permutation", "directory", "structured_rep", "image")

CorpusSplit = Literal["dev", "test"]
Part = Literal["train", "validation", "all"]
View = Literal["boxes", "picture"]


class NlvrRow(NamedTuple):
    """One picture with its sentence."""

    id: str
    sentence: str
    label: str
    identifier: str
    permutation: int
    directory: str
    things: tuple[tuple[Thing, ...], ...]
    """Objects of each box, in the order of the picture."""
    image: bytes | Path
    """PNG bytes, or the path of the PNG file."""

    @property
    def sentence_id(self) -> str:
        """The first part of the identifier, which all pictures of a sentence share."""
        return self.identifier.partition("-")[0]


class _Item(NamedTuple):
    """A question about the picture in a row of the split."""

    row: int
    question: Question


@dataclass(frozen=True)
class NlvrSource:
    """A `SampleSource` over NLVR.

    The groups are `boxes` (three images per prompt) or `picture` (one image), and `box` (one image, for the box
    questions).

    Args:
        path: folder with dev.parquet and test.parquet, or the corpus's repository (nlvr/dev/dev.json and its images).
        split: split of the corpus.
        part: part of the split. `train` and `validation` are disjoint sets of its directories; a directory contains
            sentences that were written together.
        view: three boxes as three images, or the whole picture as one image, padded to a square with its background.
        questions: names from `TASKS`: `statement`, and kinds of derived questions.
        seed: seed of the validation directories and of the derived questions.
        image_size: side of the images in pixels.

    Raises:
        UserError: the corpus is missing or malformed.
    """

    path: Path
    split: CorpusSplit
    part: Part
    view: View = "boxes"
    questions: tuple[str, ...] = TASKS
    seed: int = 0
    image_size: int = 64

    def __post_init__(self) -> None:
        unknown = [name for name in self.questions if name not in TASKS]
        if unknown or not self.questions:
            raise UserError(f"NLVR has no question kinds {unknown}; choose at least one of {', '.join(TASKS)}.")
        if _layout(self.path, self.split) is None:
            raise UserError(
                f"{self.path} contains no NLVR corpus (neither {self.split}.parquet nor"
                f" nlvr/{self.split}/{self.split}.json); get the corpus NLVR by Suhr et al. (ACL 2017) and set"
                " data.path to its folder: --set data.path=FOLDER."
            )

    @property
    def groups(self) -> Sequence[SampleGroup]:
        """The non-empty groups of the chosen questions; their weights sum to 1."""
        sizes = {name: len(items) for name, items in _items(self).items() if items}
        shares = {name: _BOX_WEIGHT if name == "box" else 1 - _BOX_WEIGHT for name in sizes}
        total = sum(shares.values())
        return tuple(
            SampleGroup(name, 3 if name == "boxes" else 1, shares[name] / total, size) for name, size in sizes.items()
        )

    def get(self, group: str, index: int) -> Sample:
        """Reads sample `index` of a group.

        Raises:
            UserError: the group is not one of `groups`.
            IndexError: the index is out of range.
        """
        items = _items(self).get(group)
        if not items:
            raise UserError(
                f"NLVR has no group {group!r} with the chosen questions; legal:"
                f" {', '.join(each.name for each in self.groups)}."
            )
        if not 0 <= index < len(items):
            raise IndexError(f"index {index} is out of range for group {group!r} with {len(items)} samples")
        item = items[index]
        row = _rows(self.path, self.split)[item.row]
        return Sample(
            id=f"{row.id}/{item.question.task}" + (f"/{item.question.key}" if item.question.key else ""),
            benchmark="nlvr",
            family=item.question.task,
            task=item.question.task,
            images=self._images(row, item.question),
            prompt=item.question.prompt,
            answers=item.question.answers,
            metric=item.question.metric,
            scene=row.sentence_id,
            metadata={"identifier": row.identifier, "permutation": row.permutation, "directory": row.directory},
        )

    @property
    def pictures(self) -> Sequence[NlvrRow]:
        """The pictures of the part, in the order of the corpus; the six pictures of a set of boxes are consecutive."""
        rows = _rows(self.path, self.split)
        return tuple(rows[row] for row in _part(self))

    def questions_in_order(self) -> Iterator[tuple[str, int, NlvrRow]]:
        """Yields group, index within the group, and picture of every question."""
        rows = _rows(self.path, self.split)
        for group, items in _items(self).items():
            for index, item in enumerate(items):
                yield group, index, rows[item.row]

    def _images(self, row: NlvrRow, question: Question) -> tuple[bytes, ...]:
        picture = _open(row)
        if question.box is not None:
            return (self._png(_box(picture, question.box)),)
        if self.view == "boxes":
            return tuple(self._png(_box(picture, index)) for index in range(3))
        square = Image.new("RGB", (picture.width, picture.width), picture.getpixel((BOX + 1, 0)))
        square.paste(picture, (0, (picture.width - picture.height) // 2))
        return (self._png(square),)

    def _png(self, image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC).save(
            buffer, format="PNG", compress_level=1
        )
        return buffer.getvalue()


def _open(row: NlvrRow) -> Image.Image:
    data = row.image if isinstance(row.image, bytes) else row.image.read_bytes()
    try:
        return decode_image(data)
    except UserError:
        raise UserError(f"The picture of NLVR row {row.id} cannot be decoded; download the corpus again.") from None


def _box(picture: Image.Image, index: int) -> Image.Image:
    left = BOX_STARTS[index]
    return picture.crop((left, 0, left + BOX, BOX))


def _layout(path: Path, split: str) -> Path | None:
    """Finds the file that lists the rows of a split; None if there is none."""
    candidates = (path / f"{split}.parquet", path / "nlvr" / split / f"{split}.json", path / split / f"{split}.json")
    return next((file for file in candidates if file.is_file()), None)


@functools.lru_cache(maxsize=4)
def _rows(path: Path, split: str) -> tuple[NlvrRow, ...]:
    """Reads all pictures of a split in the order of the corpus, once per process."""
    file = _layout(path, split)
    assert file is not None, "checked when the source was created"
    if file.suffix == ".parquet":
        return tuple(
            _row(
                row["sentence"],
                row["label"],
                row["identifier"],
                row["permutation"],
                row["directory"],
                row["structured_rep"],
                row["image"]["bytes"],
                split,
            )
            for row in _read_parquet(file).to_pylist()
        )
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        entry = json.loads(line)
        missing = [name for name in _COLUMNS if name not in entry and name not in ("permutation", "image")]
        if missing:
            raise UserError(
                f"Line {number} of {file} lacks {', '.join(map(repr, missing))}, as the lines of NLVR's hidden split"
                " do; give the dev or test split of the corpus."
            )
        for permutation in range(len(PERMUTATIONS)):
            image = (
                file.parent / "images" / str(entry["directory"]) / f"{split}-{entry['identifier']}-{permutation}.png"
            )
            if not image.is_file():
                raise UserError(
                    f"{image} does not exist, but NLVR has six pictures for each line of {file.name}; download its"
                    " images too."
                )
            rows.append(
                _row(
                    entry["sentence"],
                    entry["label"],
                    entry["identifier"],
                    permutation,
                    str(entry["directory"]),
                    entry["structured_rep"],
                    image,
                    split,
                )
            )
    return tuple(rows)


def _read_parquet(file: Path) -> pa.Table:
    try:
        names = pq.read_schema(file).names
    except pa.ArrowInvalid:
        raise UserError(f"{file} is not a parquet file; download the NLVR corpus again.") from None
    missing = [name for name in _COLUMNS if name not in names]
    if missing:
        raise UserError(
            f"{file} lacks the columns {', '.join(missing)}; give NLVR files with the columns {', '.join(_COLUMNS)}."
        )
    return pq.read_table(file, columns=list(_COLUMNS), memory_map=True)


def _row(
    sentence: str,
    label: str,
    identifier: str,
    permutation: int,
    directory: str,
    boxes: str | list[list[dict[str, object]]],
    image: bytes | Path,
    split: str,
) -> NlvrRow:
    parsed = json.loads(boxes) if isinstance(boxes, str) else boxes
    things = tuple(tuple(Thing.from_json(entry) for entry in parsed[box]) for box in PERMUTATIONS[permutation])
    return NlvrRow(
        f"{split}-{identifier}-{permutation}", sentence, label, identifier, permutation, directory, things, image
    )


@functools.lru_cache(maxsize=8)
def _items(source: NlvrSource) -> dict[str, tuple[_Item, ...]]:
    """Creates all questions of a source by group, in the order of the pictures."""
    groups: dict[str, list[_Item]] = {source.view: [], "box": []}
    rows = _rows(source.path, source.split)
    for index in _part(source):
        row = rows[index]
        for question in questions_of(row.sentence, row.label, row.things, source.questions, f"{source.seed}/{row.id}"):
            groups["box" if question.box is not None else source.view].append(_Item(index, question))
    return {name: tuple(items) for name, items in groups.items()}


@functools.lru_cache(maxsize=8)
def _part(source: NlvrSource) -> tuple[int, ...]:
    """Returns the row indices of the part's pictures."""
    rows = _rows(source.path, source.split)
    held_out = _validation_directories({row.directory for row in rows}, source.seed)
    return tuple(
        index
        for index, row in enumerate(rows)
        if source.part == "all" or (row.directory in held_out) == (source.part == "validation")
    )


def _validation_directories(directories: set[str], seed: int) -> set[str]:
    """Selects a seeded fraction of the directories, and at least one if there are two."""
    shuffled = sorted(directories, key=lambda name: hashlib.blake2b(f"{seed}/{name}".encode()).digest())
    return set(shuffled[: max(len(shuffled) > 1, round(_VALIDATION_SHARE * len(shuffled)))])
