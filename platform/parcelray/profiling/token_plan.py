"""What a job will process and need, before it starts: tokens of its rows at each budget, and predicted peak memory."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from parcelray.datasets.sample import Sample
from parcelray.models.backbones.processor_base import ElasticProcessor, Turn
from parcelray.models.token_counts import TokenCounts, count_tokens
from parcelray.profiling.simulated_memory import MemoryEstimate

if TYPE_CHECKING:
    from rich.console import RenderableType

_BINS = 8
_LONGEST = 5
"""Number of longest rows that are named."""
_SHOWN_BUDGETS = 5
LIBRARY_BYTES = 430 * 2**20
"""Resident bytes of Python with torch and transformers before a model is loaded (measured with torch 2.13)."""


@dataclass(frozen=True)
class RowTokens:
    """The tokens of one row of the data at every budget."""

    id: str
    num_images: int
    num_prompt_tokens: int
    """Text tokens of the prompt with images."""
    num_blind_tokens: int
    """Text tokens of the prompt without images."""
    num_answer_tokens: int
    """Tokens of the training target, or the largest number of tokens that may be generated."""
    num_sequences: int = 1
    """Training prompts of the row, which share its images; the other fields describe the longest of them."""

    def at(self, budget: int) -> TokenCounts:
        """Counts the tokens at a budget; 0: blind."""
        prompt = self.num_prompt_tokens if budget else self.num_blind_tokens
        return count_tokens(prompt, self.num_images, budget, self.num_answer_tokens)


def row_tokens(processor: ElasticProcessor, sample: Sample, num_answer_tokens: int | None = None) -> RowTokens:
    """Counts the tokens of a sample.

    Args:
        processor: processor of the model.
        sample: the sample.
        num_answer_tokens: largest number of tokens of a generated answer; None: those of the sample's first answer.
    """
    images = len(sample.images)
    if num_answer_tokens is not None:
        shown = processor.count_tokens(sample.prompt, images, 1)
        blind = processor.count_tokens(sample.prompt, images, 0)
        return RowTokens(sample.id, images, shown.prompt, blind.prompt, num_answer_tokens)
    turns = [Turn(sample.prompt, sample.answers[0]), *(Turn(*turn) for turn in sample.later_turns)]
    sequences = processor.encode_turns(turns, with_image=images > 0)
    longest = max(sequences, key=lambda sequence: sum(len(segment.ids) for segment in sequence))
    number = sequences.index(longest)
    prompt, blind_prompt = (
        sum(len(segment.ids) for segment in sequence if not segment.is_answer)
        for sequence in (longest, processor.encode_turns(turns, with_image=False)[number])
    )
    answer = sum(len(segment.ids) for segment in longest if segment.is_answer)
    return RowTokens(sample.id, images, prompt, blind_prompt, answer, len(sequences))


class Bin(NamedTuple):
    """A bin of a histogram: the number of rows with `low` to `high` tokens."""

    low: int
    high: int
    rows: int


def histogram(values: Sequence[int]) -> tuple[Bin, ...]:
    """Returns at most 8 bins of equal width that cover all values."""
    low, high = min(values), max(values)
    edges = sorted({low + (high + 1 - low) * index // _BINS for index in range(_BINS + 1)})
    return tuple(Bin(start, end - 1, sum(start <= value < end for value in values)) for start, end in pairwise(edges))


@dataclass(frozen=True)
class BudgetTokens:
    """The tokens of the rows at one budget."""

    budget: int
    visual: tuple[Bin, ...]
    text: tuple[Bin, ...]
    total: tuple[Bin, ...]
    mean: float
    """Mean number of tokens of a row."""
    longest: int
    """Number of tokens of the longest row."""
    beyond: tuple[str, ...]
    """Ids of the rows that are longer than the model's positions."""


@dataclass(frozen=True)
class DataTokens:
    """The tokens of the rows of a data set or benchmark."""

    name: str
    rows_read: int
    rows_in_all: int | None
    """None: endless (procedural)."""
    budgets: tuple[BudgetTokens, ...]
    longest: tuple[RowTokens, ...]
    """The longest rows at the largest budget, longest first."""


def data_tokens(
    name: str, rows: Sequence[RowTokens], rows_in_all: int | None, budgets: Iterable[int], num_positions: int
) -> DataTokens:
    """Summarises the tokens of rows at some budgets.

    Args:
        name: name of the data.
        rows: the rows that were read, at least one.
        rows_in_all: number of rows of the data; None: endless.
        budgets: visual tokens per image; 0: blind.
        num_positions: largest length that the model was built for, in tokens.
    """
    budgets = sorted(budgets)
    found = []
    for budget in budgets:
        counts = [row.at(budget) for row in rows]
        totals = [each.total for each in counts]
        found.append(
            BudgetTokens(
                budget,
                histogram([each.visual for each in counts]),
                histogram([each.text for each in counts]),
                histogram(totals),
                sum(totals) / len(totals),
                max(totals),
                tuple(row.id for row, total in zip(rows, totals, strict=True) if total > num_positions),
            )
        )
    longest = sorted(rows, key=lambda row: row.at(budgets[-1]).total, reverse=True)[:_LONGEST]
    return DataTokens(name, len(rows), rows_in_all, tuple(found), tuple(longest))


@dataclass(frozen=True)
class BudgetMemory:
    """Predicted peak memory of one worker at one budget."""

    budget: int
    weights_bytes: int
    above_bytes: int
    """Bytes above those of the loaded process."""
    fits: int
    """The largest batch within the limit, in the unit of the plan."""


def budget_memory(budget: int, memory: MemoryEstimate, fits: int) -> BudgetMemory:
    """Returns the memory at a budget with the largest batch that fits."""
    return BudgetMemory(budget, memory.weights, memory.above, fits)


@dataclass(frozen=True)
class TokenPlan:
    """The tokens and the memory of a job."""

    identity: str
    data: tuple[DataTokens, ...]
    memory: tuple[BudgetMemory, ...]
    batch: str
    """What a batch is, with the job's own size, for example `32 images per step`."""
    unit: str
    """Unit of `BudgetMemory.fits`."""
    limit_bytes: int
    """Memory that one worker may use, without Python and libraries."""
    largest_budget: int | None
    """Largest of the job's budgets whose batch fits; None: no budget fits."""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON-serialisable values."""
        return asdict(self)

    def to_rich(self) -> "RenderableType":
        """Returns the plan as tables for the console."""
        from rich.console import Group
        from rich.table import Table

        tables: list[RenderableType] = []
        for data in self.data:
            of = "" if data.rows_in_all in (None, data.rows_read) else f" of {data.rows_in_all:,}"
            title = f"{data.name}: tokens of {data.rows_read:,} rows{of}"
            table = Table("budget", "mean", "longest", "visual", "text", "total", "beyond the positions", title=title)
            for each in data.budgets:
                table.add_row(
                    str(each.budget or "blind"),
                    f"{each.mean:.0f}",
                    str(each.longest),
                    *(_bars(bins) for bins in (each.visual, each.text, each.total)),
                    f"{len(each.beyond)} {', '.join(each.beyond[:_LONGEST])}" if each.beyond else "none",
                )
            rows = Table("longest rows", "images", "prompt tokens", "answer tokens")
            for row in data.longest:
                rows.add_row(row.id, str(row.num_images), str(row.num_prompt_tokens), str(row.num_answer_tokens))
            tables += [table, rows]
        memory = Table(
            "budget", "weights", "above them", "peak", f"largest batch, {self.unit}", title=f"memory: {self.batch}"
        )
        for predicted in self.memory:
            sizes = (
                predicted.weights_bytes,
                predicted.above_bytes,
                predicted.weights_bytes + predicted.above_bytes,
            )
            memory.add_row(
                str(predicted.budget), *(f"{size / 2**20:,.0f} MiB" for size in sizes), f"{predicted.fits:,}"
            )
        largest = (
            "no budget fits" if self.largest_budget is None else f"largest budget that fits: {self.largest_budget}"
        )
        limit = f"Limit: {self.limit_bytes / 2**20:,.0f} MiB per worker; {largest}."
        return Group(*tables, memory, limit, *self.notes)


def _bars(bins: Sequence[Bin]) -> str:
    largest = max(each.rows for each in bins)
    return "\n".join(
        f"{each.low}{f'-{each.high}' if each.high > each.low else ''}: {each.rows}"
        f" {'#' * round(8 * each.rows / largest)}"
        for each in bins
        if each.rows
    )


def shown_budgets(budgets: Sequence[int]) -> tuple[int, ...]:
    """Returns at most 5 of the budgets, with the smallest and the largest."""
    ordered = sorted(budgets)
    if len(ordered) <= _SHOWN_BUDGETS:
        return tuple(ordered)
    last = _SHOWN_BUDGETS - 1
    return tuple(ordered[(len(ordered) - 1) * index // last] for index in range(_SHOWN_BUDGETS))


def machine_limit(num_workers: int) -> int:
    """Returns the memory of this machine for each of its workers, in bytes, without Python and libraries."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(0, total // max(1, num_workers) - LIBRARY_BYTES)
