"""A `SampleSource` over rows of conversations or of questions, with held-out splits and named bad rows."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from parcelray.config.data import ConversationsDataConfig, HubDataConfig
from parcelray.datasets.conversations.files import (
    FolderImages,
    ImageStore,
    TarImages,
    UnreadableImage,
    data_uri,
    expand,
    tar_members,
)
from parcelray.datasets.conversations.parsing import (
    BadRow,
    Conversation,
    ImageSource,
    parse_conversation,
    parse_question,
)
from parcelray.datasets.conversations.rows import DatasetRows, JsonRows, Position, RowStore, TarRows
from parcelray.datasets.held_out import SPLITS, RowSplit, assigned_splits
from parcelray.datasets.images import decode_image
from parcelray.datasets.sample import Sample
from parcelray.datasets.source import BadRowsError, SampleGroup, groups_by_images
from parcelray.errors import UserError

RowsConfig = ConversationsDataConfig | HubDataConfig
_SUFFIXES = (".json", ".jsonl", ".parquet", ".tar")


class _Index(NamedTuple):
    """The usable rows of a source."""

    positions_R3: NDArray[np.int64]
    """`Position` of each row."""
    num_images_R: NDArray[np.int16]
    num_characters_R: NDArray[np.int32]
    """Length of the text of all turns."""
    parts_R: NDArray[np.uint8]
    """Split of each row, as an index into `SPLITS`."""
    clusters_R: NDArray[np.int64]
    """First row that shares an image with the row, directly or through other rows."""
    repeated: frozenset[int]
    """Rows whose id an earlier row has."""
    num_rows: int
    """Number of rows, with those that cannot be used."""
    problems: dict[str, str]
    """Reasons of the rows that cannot be used, by row id."""
    digest: str
    """Digest of the texts and the names of the images of all usable rows."""


@dataclass(frozen=True)
class ConversationSource:
    """Reads one split of rows of conversations or of questions.

    The rows are listed once, in the process that opens the source; a copy for a worker has only their positions. The
    groups are named `images-<n>` after the number of images. A group's share of the steps is such that every row is
    read equally often.
    """

    config: RowsConfig
    split: RowSplit | Literal["all"] = "train"
    """Split to read; `all`: every row, whatever is held out."""

    @property
    def groups(self) -> tuple[SampleGroup, ...]:
        """One finite group for each number of images, in ascending order."""
        return groups_by_images(
            {count: len(rows) for count, rows in self._rows_of.items()},
            {count: self._index.num_characters_R[rows] for count, rows in self._rows_of.items()},
        )

    @property
    def max_skipped(self) -> int:
        """Largest number of rows that may still be skipped when their images cannot be read."""
        return self._limit - len(self._index.problems)

    @property
    def problems(self) -> dict[str, str]:
        """Reasons of the rows whose structure cannot be used, by row id; they are in no group."""
        return dict(self._index.problems)

    @property
    def rows(self) -> NDArray[np.int64]:
        """The numbers of the usable rows of the split, for `clusters_R` and `sample_of`."""
        if self.split == "all":
            return np.arange(len(self._index.parts_R))
        return np.flatnonzero(self._index.parts_R == SPLITS.index(self.split))

    @property
    def revision(self) -> str:
        """Digest of the texts of all rows and of the names of their images, not of the images' content."""
        return f"rows:{self._index.digest}"

    def get(self, group: str, index: int) -> Sample:
        """Reads sample `index` of a group.

        Raises:
            BadRowsError: an image of the row does not exist.
            SystemFailure: the storage cannot be read.
        """
        rows = self._rows_of[int(group.removeprefix("images-"))]
        return self.sample_of(int(rows[index]))

    def sample_of(self, row: int) -> Sample:
        """Reads a row as a sample with all its turns; see `get`."""
        conversation = _parsed(self.config, self._store.read(Position(*self._index.positions_R3[row].tolist())))
        name = self._name(conversation, row)
        try:
            images = tuple(self._image(image) for image in conversation.images)
        except UnreadableImage as error:
            raise BadRowsError({name: str(error)}) from None
        first, *later = conversation.turns
        return Sample(
            id=name,
            benchmark=self.config.type,
            family=self.config.type,
            task=self.config.type,
            images=images,
            prompt=first.question,
            answers=(first.answer,),
            metric=self.config.metric,
            scene=f"row-{self.clusters_R[row]}",
            later_turns=tuple((turn.question, turn.answer) for turn in later),
        )

    def questions(self, count: int) -> list[Sample]:
        """Reads about `count` questions of the split for an evaluation, spread over its rows: one sample per turn.

        Rows with an image that cannot be decoded are left out.
        """
        samples: list[Sample] = []
        rows = self.rows
        for row in rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))] if count else ():
            try:
                sample = self.sample_of(int(row))
                for image in sample.images:
                    decode_image(image)
            except UserError:
                continue
            samples += single_questions(sample)
        return samples[:count]

    @property
    def clusters_R(self) -> NDArray[np.int64]:
        """The first row of the cluster of each usable row of all splits: rows of one cluster share images."""
        return self._index.clusters_R

    def check(self) -> None:
        """Checks the structure of all rows.

        Raises:
            BadRowsError: more rows cannot be used than `max_bad_rows` permits.
            UserError: no row of the split can be used.
        """
        if self.max_skipped < 0:
            raise BadRowsError(self._index.problems, self._limit)
        if not len(self.rows):
            raise UserError(
                f"The data have {self._index.num_rows} rows, of which {len(self.rows)} are usable and in the"
                f" split {self.split}; add rows, or change data.held_out."
            )

    @property
    def _limit(self) -> int:
        return int(self.config.max_bad_rows * self._index.num_rows)

    def _name(self, conversation: Conversation, row: int) -> str:
        name = f"row-{row}" if conversation.id is None else conversation.id
        return f"{name} (row {row})" if row in self._index.repeated else name

    def _image(self, image: ImageSource) -> bytes:
        if isinstance(image, bytes):
            return image
        return data_uri(image) if image.startswith("data:") else self._images.read(image)

    @cached_property
    def _rows_of(self) -> dict[int, NDArray[np.int64]]:
        counts = self._index.num_images_R
        return {int(count): self.rows[counts[self.rows] == count] for count in np.unique(counts[self.rows])}

    @cached_property
    def _index(self) -> _Index:
        return _listed(self.config)

    @cached_property
    def _store(self) -> RowStore:
        return _opened(self.config)[0]

    @cached_property
    def _images(self) -> ImageStore:
        return _opened(self.config)[1]


def single_questions(sample: Sample) -> list[Sample]:
    """Splits a conversation into one sample per turn, without the turns before it."""
    if not sample.later_turns:
        return [sample]
    turns = [(sample.prompt, sample.answers[0]), *sample.later_turns]
    return [
        replace(sample, id=f"{sample.id}#{number}", prompt=question, answers=(answer,), later_turns=())
        for number, (question, answer) in enumerate(turns)
    ]


@lru_cache(maxsize=8)
def _opened(config: RowsConfig) -> tuple[RowStore, ImageStore]:
    """Opens rows and images; the places of tar members are kept, as listing them reads whole shards."""
    if isinstance(config, HubDataConfig):
        path = config.path or ""
        files = tuple(expand(path)) if path.endswith(".parquet") else ()
        return DatasetRows(config.id or path, config.name, config.split, config.revision, files), FolderImages(path)
    files = tuple(expand(config.path))
    suffixes = {PurePosixPath(file).suffix for file in files}
    if len(suffixes) > 1 or not suffixes <= set(_SUFFIXES):
        raise UserError(
            f"{config.path} has files of the types {', '.join(sorted(suffixes)) or 'none'}; legal is one of"
            f" {', '.join(_SUFFIXES)}."
        )
    images: ImageStore = FolderImages(files[0].rpartition("/")[0] or ".")
    if config.images is not None:
        is_tar = config.images.endswith(".tar")
        images = (
            TarImages({name: part for file in expand(config.images) for name, part in tar_members(file)})
            if is_tar
            else FolderImages(config.images)
        )
    match suffixes.pop():
        case ".parquet":
            return DatasetRows(config.path, files=files), images
        case ".tar":
            rows = TarRows(files)
            return rows, images if config.images is not None else TarImages(rows.images)
        case _:
            return JsonRows(files), images


def _parsed(config: RowsConfig, row: Mapping[str, Any]) -> Conversation:
    if isinstance(config, HubDataConfig) and config.answer is not None:
        return parse_question(row, config.images, config.prompt, config.answer)
    return parse_conversation(row)


@lru_cache(maxsize=4)
def _listed(config: RowsConfig) -> _Index:
    """Lists the rows of a source, checks their structure, and assigns them to the splits."""
    store, images = _opened(config)
    has_names = isinstance(store, JsonRows | TarRows)
    positions: list[Position] = []
    counts: list[int] = []
    lengths: list[int] = []
    problems: dict[str, str] = {}
    seen: set[str] = set()
    repeated: list[int] = []
    clusters = _Clusters()
    digest = hashlib.sha256()
    num_rows = 0
    for listed in store.listed(digests=config.held_out.any):
        num_rows += 1
        try:
            if listed.cells is None:
                raise BadRow(listed.reason)
            conversation = _parsed(config, listed.cells)
            names = [_key(image) for image in conversation.images]
            missing = [each for each in names if has_names and not each.startswith("data:") and images.lacks(each)]
            if missing:
                raise BadRow(f"the image {missing[0]} does not exist")
        except BadRow as error:
            name = (listed.cells or {}).get("id", f"row-{num_rows - 1}")
            problems[f"{name} (row {num_rows - 1})" if name in problems else str(name)] = str(error)
            continue
        if conversation.id is not None and conversation.id in seen:
            repeated.append(len(positions))
        if conversation.id is not None:
            seen.add(conversation.id)
        clusters.add(names)
        digest.update(json.dumps([conversation.id, names, conversation.turns]).encode())
        positions.append(listed.position)
        counts.append(len(names))
        lengths.append(sum(len(turn.question) + len(turn.answer) for turn in conversation.turns))
    clusters_R = clusters.firsts()
    return _Index(
        np.array(positions, dtype=np.int64).reshape(-1, len(Position._fields)),
        np.array(counts, dtype=np.int16),
        np.array(lengths, dtype=np.int32),
        assigned_splits([clusters.keys[row] for row in clusters_R.tolist()], config.held_out),
        clusters_R,
        frozenset(repeated),
        num_rows,
        problems,
        digest.hexdigest()[:16],
    )


def _key(image: ImageSource) -> str:
    """A text that is equal for equal images: the name, or the digest of an image that is in the row."""
    if isinstance(image, str) and not image.startswith("data:"):
        return image
    return "data:" + hashlib.sha256(image.encode() if isinstance(image, str) else image).hexdigest()


class _Clusters:
    """Joins rows that share an image (union-find over the rows)."""

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._row_of: dict[str, int] = {}
        self.keys: list[str] = []
        """Name of the first image of each row, or the number of a row without images."""

    def add(self, names: list[str]) -> None:
        """Adds the next row."""
        row = len(self._parents)
        self._parents.append(row)
        self.keys.append(names[0] if names else f"row-{row}")
        for name in names:
            first = self._root(self._row_of.setdefault(name, row))
            own = self._root(row)
            self._parents[max(first, own)] = min(first, own)

    def firsts(self) -> NDArray[np.int64]:
        """The first row of the cluster of each row."""
        return np.array([self._root(row) for row in range(len(self._parents))], dtype=np.int64)

    def _root(self, row: int) -> int:
        while self._parents[row] != row:
            self._parents[row] = self._parents[self._parents[row]]
            row = self._parents[row]
        return row
