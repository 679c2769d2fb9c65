"""Reader of benchmarks in tables: turns the columns of a row into samples as the benchmark's configuration defines."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import Formatter
from typing import Any

import pyarrow as pa

from parcelray.benchmarks.readers.base import DatasetFingerprint, Problem, RowSamples, ids_digest
from parcelray.benchmarks.tables.cells import (
    CHOICE_FORMS,
    box_of,
    candidates,
    choice_index,
    choices_of,
    expected_answers,
    is_empty,
    mask_of,
    numbers_of,
    option_text,
    without_nan,
)
from parcelray.benchmarks.tables.images import BadCell, cell_images, video_frames, with_box
from parcelray.benchmarks.tables.rows import Row, Rows, open_rows
from parcelray.benchmarks.tables.types import arrow_type, as_declared, fits, shown
from parcelray.config.benchmark import (
    OPTION_FIELDS,
    BenchmarkConfig,
    ColumnsConfig,
    PromptFamily,
    TableSource,
    of_family,
)
from parcelray.datasets.boxes import Box, format_corners, format_locations
from parcelray.datasets.sample import Sample
from parcelray.errors import UserError


@dataclass(frozen=True)
class TableReader:
    """Reads a benchmark whose rows are in a table. See `BenchmarkReader`.

    Args:
        benchmark: configuration with a source of type table.
        family: model family, which selects the prompt template, the expected answers and the metric.
        data: file or folder of the data; None: the Hugging Face hub.
        at_random: whether rows are read in any order, see `open_rows`.
    """

    benchmark: BenchmarkConfig
    family: PromptFamily
    data: Path | None = None
    at_random: bool = False

    def __post_init__(self) -> None:
        if self.family not in self.benchmark.prompts:
            legal = ", ".join(self.benchmark.prompts) or "no family"
            raise UserError(
                f"{self.name} has no prompt for {self.family} models, only for {legal}; add one in your own"
                " benchmark file."
            )

    @property
    def name(self) -> str:
        """Name of the benchmark."""
        return self.benchmark.name

    @property
    def images_per_row(self) -> int | None:
        """Number of images of every row; None: rows can differ."""
        columns = self._columns
        if columns.video is not None:
            return columns.video.frames
        is_one = columns.join is not None or (
            len(columns.images) == 1 and not columns.types[columns.images[0]].startswith("list")
        )
        return 1 if is_one else None

    def fingerprint(self) -> DatasetFingerprint:
        """See `BenchmarkReader`.

        Raises:
            UserError: columns are missing, a cell of a filter has another type than declared, no row passes the filter,
                or two rows have the same id.
        """
        rows = self._kept
        if not rows:
            raise UserError(
                f"{self.name}: no row of the data passes the filter columns.keep {self._columns.keep}; check that these"
                " are the right files."
            )
        ids = [self._ids[row] for row in rows]
        if len(set(ids)) < len(ids):
            duplicate = next(name for name in ids if ids.count(name) > 1)
            raise UserError(
                f"{self.name}: more than one row has the id {duplicate!r}; name more columns in columns.id."
            )
        return DatasetFingerprint(" ".join(table.revision for _, table in self._tables), len(rows), ids_digest(ids))

    def order(self) -> Sequence[int]:
        """See `BenchmarkReader`."""
        if self._columns.cluster is None:
            return self._kept
        first_rows: dict[str, int] = {}
        clusters = [str(value) for value in self._all(self._columns.cluster)]
        for row in self._kept:
            first_rows.setdefault(clusters[row], row)
        return sorted(self._kept, key=lambda row: (first_rows[clusters[row]], row))

    def cluster(self, row: int) -> str:
        """See `BenchmarkReader`."""
        return str(self._all(self._columns.cluster)[row]) if self._columns.cluster is not None else self._ids[row]

    def read(self, row: int) -> RowSamples:
        """See `BenchmarkReader`. Problems of a row are returned, not raised."""
        split, table, index = self._locate(row)
        cells = {"split": split} | {column: without_nan(cell) for column, cell in table.row(index).items()}
        name = self._ids[row]
        for column, kind in self._content.items():
            if not fits(cells[column], kind):
                return RowSamples((), (Problem(name, self._other_type(column, cells[column])),))
            cells[column] = as_declared(cells[column], kind)
        for column, text in self._columns.remove.items():
            if cells[column] is not None:
                cells[column] = str(cells[column]).replace(text, "")
        cells |= {column: text for column, text in self._columns.empty.items() if is_empty(cells[column])}
        shared: tuple[bytes, ...] | None = None
        samples, problems = [], []
        for number, question in enumerate(self._questions(cells)):
            label = f"{name}#{number}" if self._columns.each else name
            try:
                # Questions of one row share their images, unless each question has its own segment of a video.
                if shared is None or (self._columns.video is not None and self._columns.video.segment is not None):
                    shared = self._images(question, table)
                samples.append(self._sample(label, row, question, shared))
            except BadCell as problem:
                problems.append(Problem(label, str(problem)))
        return RowSamples(tuple(samples), tuple(problems))

    @property
    def _columns(self) -> ColumnsConfig:
        assert self.benchmark.columns is not None, "a table has columns; checked by BenchmarkConfig"
        return self.benchmark.columns

    @cached_property
    def _content(self) -> dict[str, pa.DataType]:
        """Declared types of the columns that reach prompts, answers and metrics, and of the clusters.

        Ids and keys of a join are only compared as texts, and cells with images are checked when they are read.
        """
        columns = self._columns
        # The choices of one column may be a list, or a list in a string.
        choices = columns.choices if len(columns.choices) > 1 else ()
        named = {*_fields(self.benchmark.prompts[self.family]), *choices, *columns.each, columns.mask, columns.cluster}
        named |= {*columns.metadata.values(), *columns.remove, *columns.empty}
        named |= {config.column for config in (columns.answers, columns.box, columns.draw_box) if config is not None}
        return {name: arrow_type(text) for name, text in columns.types.items() if name in named - columns.made()}

    def _other_type(self, column: str, cell: Any) -> str:
        return f"the column {column} has {shown(cell)}, but its declared type is {self._columns.types[column]}"

    @cached_property
    def _tables(self) -> list[tuple[str, Rows]]:
        source = self.benchmark.source
        assert isinstance(source, TableSource)
        tables = [(split, open_rows(source, split, self.data, at_random=self.at_random)) for split in source.splits]
        in_prompt = {name for name in _fields(self.benchmark.prompts[self.family]) if name in self._columns.types}
        for split, table in tables:
            missing = sorted((self._columns.read() | in_prompt) - {"split"} - set(table.columns))
            if missing:
                raise UserError(
                    f"{self.name}: the data of split {split} lack the columns {', '.join(missing)}; they have"
                    f" {', '.join(table.columns) or 'no columns'}. Check that these are the right files, or name the"
                    " columns in your own benchmark file."
                )
        return tables

    @cached_property
    def _joined(self) -> tuple[Rows, dict[str, int]]:
        source, join = self.benchmark.source, self._columns.join
        assert isinstance(source, TableSource)
        assert join is not None
        table = open_rows(source, source.splits[0], self.data, config=join.config)
        missing = sorted({join.key, join.image} - set(table.columns))
        if missing:
            raise UserError(
                f"{self.name}: the image table {join.config} lacks the columns {', '.join(missing)}; it has"
                f" {', '.join(table.columns) or 'no columns'}."
            )
        return table, {str(key): row for row, key in enumerate(table.column(join.key))}

    @cached_property
    def _starts(self) -> list[int]:
        starts = [0]
        for _, table in self._tables:
            starts.append(starts[-1] + len(table))
        return starts

    def _locate(self, row: int) -> tuple[str, Rows, int]:
        for number, (split, table) in enumerate(self._tables):
            if row < self._starts[number + 1]:
                return split, table, row - self._starts[number]
        raise IndexError(f"row {row} is out of range for {self.name} with {self._starts[-1]} rows")

    def _all(self, column: str) -> list[Any]:
        """Returns a column over all splits."""
        cache: dict[str, list[Any]] = self.__dict__.setdefault("_light", {})
        if column not in cache:
            cache[column] = [
                value
                for split, table in self._tables
                for value in (table.column(column) if column in table.columns else [split] * len(table))
            ]
        return cache[column]

    @cached_property
    def _ids(self) -> list[str]:
        if not self._columns.id:
            return [f"{split}-{index}" for split, table in self._tables for index in range(len(table))]
        return [
            "/".join(str(part) for part in parts)
            for parts in zip(*(self._all(column) for column in self._columns.id), strict=True)
        ]

    @cached_property
    def _kept(self) -> list[int]:
        """Row indices that pass `keep`, in data order. Filters on columns that `each` creates are applied in `read`."""
        filters = {column: legal for column, legal in self._columns.keep.items() if column not in self._columns.made()}
        values = {column: self._filtered(column) for column in filters}
        return [
            row
            for row in range(self._starts[-1])
            if all(values[column][row] in legal for column, legal in filters.items())
        ]

    def _filtered(self, column: str) -> list[Any]:
        """Returns a column of a filter, in its declared type."""
        cells = [without_nan(cell) for cell in self._all(column)]
        if column not in self._columns.types:
            return cells
        kind = arrow_type(self._columns.types[column])
        for row, cell in enumerate(cells):
            if not fits(cell, kind):
                raise UserError(
                    f"{self.name}: in row {self._ids[row]}, {self._other_type(column, cell)}; the filter columns.keep"
                    " needs this column, so correct the cell or the type."
                )
        return [as_declared(cell, kind) for cell in cells]

    def _questions(self, cells: Row) -> list[Row]:
        """Returns one copy of the row for each entry of the columns in `each`."""
        if not self._columns.each:
            return [cells]
        lists = [cells[column] or [] for column in self._columns.each]
        questions = []
        for entries in zip(*lists, strict=False):
            # An entry may be empty.
            question = dict.fromkeys(self._columns.made()) | cells
            for column, entry in zip(self._columns.each, entries, strict=True):
                question |= entry if isinstance(entry, dict) else {column: entry}
            if all(question.get(column) in legal for column, legal in self._columns.keep.items()):
                questions.append(question)
        return questions

    def _images(self, cells: Row, table: Rows) -> tuple[bytes, ...]:
        columns = self._columns
        if columns.video is not None:
            segment = numbers_of([cells[name] for name in columns.video.segment]) if columns.video.segment else None
            folder = self.data if self.data is not None and self.data.is_dir() else table.folder
            return video_frames(folder, columns.video.path.format_map(cells), columns.video, segment)  # type: ignore[arg-type]
        if columns.join is not None:
            images, row_of_key = self._joined
            key = str(cells[columns.join.column])
            if key not in row_of_key:
                raise BadCell(f"no image {shown(key)} in {columns.join.config}")
            encoded = cell_images(images.row(row_of_key[key])[columns.join.image], images.folder)
        else:
            encoded = [image for name in columns.images for image in cell_images(cells[name], table.folder)]
        if not encoded:
            raise BadCell("no image")
        if columns.draw_box is not None:
            box = box_of(columns.draw_box, cells, encoded[0])
            encoded[0] = with_box(encoded[0], box)
        return tuple(encoded)

    def _sample(self, label: str, row: int, cells: Row, images: tuple[bytes, ...]) -> Sample:
        columns = self._columns
        choices = choices_of(columns.choices, cells)
        metadata: dict[str, Any] = {name: cells[column] for name, column in columns.metadata.items()}
        if columns.choices:
            metadata["choices"] = choices
            named = candidates(columns.answers, self.family, choices) if columns.answers is not None else choices
            if named != choices:
                metadata["candidates"] = named
        answers: tuple[str, ...] = ()
        if columns.answers is not None:
            answers = expected_answers(columns.answers, self.family, cells[columns.answers.column], choices)
            form = of_family(columns.answers.form, self.family)
            if form in CHOICE_FORMS:
                # The text of the choice may be the letter of another one.
                metadata["target_index"] = choice_index(form, cells[columns.answers.column], choices)
            if not answers and self.benchmark.unscorable is None:
                raise BadCell("no answer")
        if columns.box is not None:
            metadata["box"] = list(box_of(columns.box, cells, images[0]))
            write = format_corners if of_family(columns.box.answer, self.family) == "corners" else format_locations
            answers = answers or (write(Box(*metadata["box"])),)
        if columns.mask is not None:
            metadata["mask"] = mask_of(cells[columns.mask], images[0])
        return Sample(
            id=label,
            benchmark=self.name,
            family=self.benchmark.family,
            task=self.name,
            images=images,
            prompt=self._prompt(cells, choices),
            answers=answers,
            metric=self.benchmark.metric_of(self.family) or "",
            scene=self.cluster(row),
            metadata=metadata,
        )

    def _prompt(self, cells: Row, choices: Sequence[str]) -> str:
        templates = (
            self.benchmark.prompts
            if choices or self.family not in self.benchmark.open_prompts
            else self.benchmark.open_prompts
        )
        template = templates[self.family]
        fields = _fields(template)
        for name in fields:
            if name not in OPTION_FIELDS and cells.get(name) is None:
                raise BadCell(f"the column {name}, which the prompt uses, is empty")
        texts = {
            name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in cells.items()
        }
        of_options = {name: option_text(name, choices) for name in OPTION_FIELDS if name in fields}
        return template.format_map(texts | of_options).strip()

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def _fields(template: str) -> list[str]:
    return [name for _, name, _, _ in Formatter().parse(template) if name]
