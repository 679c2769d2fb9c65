"""The rows that a training skips because their images cannot be read, over all ranks, and their largest number."""

import json
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

from accelerate.utils import gather_object

from parcelray.datasets.collator import Batch
from parcelray.datasets.source import BadRowsError


class SkippedRows:
    """Collects the skipped rows of the batches that this rank reads.

    Args:
        rows: reasons of the rows that were skipped before, by row id.
    """

    def __init__(self, rows: Mapping[str, str] = MappingProxyType({})) -> None:
        self._rows = dict(rows)
        self._limit = 0

    def watched(self, batches: Iterable[Batch], limit: int) -> Iterator[Batch]:
        """Yields the batches.

        Args:
            batches: of the reader of this rank.
            limit: largest number of skipped rows of the run.

        Raises:
            BadRowsError: more rows are skipped than `limit` permits.
        """
        self._limit = limit
        for batch in batches:
            if "skipped" in batch:
                self._rows |= json.loads(batch["skipped"].tobytes())
                self._check()
            yield batch

    def gathered(self) -> dict[str, str]:
        """The skipped rows of all ranks, which all must call this; raises as `watched` does."""
        if self._limit:
            self._rows = dict(sorted(item for rows in gather_object([self._rows]) for item in rows.items()))
            self._check()
        return self._rows

    def metrics(self) -> dict[str, float]:
        """The number of skipped rows as a metric; without skipped rows, none. See `gathered`."""
        return {"data/skipped_rows": float(len(rows))} if (rows := self.gathered()) else {}

    def _check(self) -> None:
        if len(self._rows) > self._limit:
            raise BadRowsError(self._rows, self._limit)
