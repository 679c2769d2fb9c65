"""Reports to the operator: sentences for the console of `parcelray serve`, and records that the log could not take."""

import logging
import sys
from collections import deque
from collections.abc import Callable, Iterable

logger = logging.getLogger("parcelray.notices")
_CAPACITY = 100


class Notices:
    """Sentences for the operator until they are taken. Nobody takes those of a detached endpoint, so the oldest go."""

    def __init__(self) -> None:
        self._sentences: deque[str] = deque(maxlen=_CAPACITY)

    def add(self, sentence: str) -> None:
        """Keeps a sentence."""
        self._sentences.append(sentence)

    def take(self) -> list[str]:
        """Returns the sentences since the last call."""
        sentences = list(self._sentences)
        self._sentences.clear()
        return sentences


class LostRecords:
    """Counts the log records that cannot be written, for example because the disk is full.

    Python's handlers only print a traceback, which Serve redirects to the same log.

    Args:
        handlers: handlers of the log.
        counted: called with the number of new lost records.
    """

    def __init__(self, handlers: Iterable[logging.Handler], counted: Callable[[int], None]) -> None:
        self._counted = counted
        self._lost = 0
        self._reason = ""
        self._sentence = ""
        self._announced = False
        for handler in handlers:
            # Serve's handler buffers records for the one that writes the file.
            writer = getattr(handler, "target", None) or handler
            writer.handleError = self._failed  # type: ignore[method-assign]

    def report(self) -> str | None:
        """Returns a sentence when the first record was lost, and one when records can be written again; to be polled.

        The second has the number of lost records, and is also in the log.
        """
        if not self._lost:
            return None
        if not self._announced:
            self._announced = True
            return f"The log cannot be written ({self._reason}); requests are answered all the same."
        self._sentence = f"{self._lost} records of the log were lost ({self._reason}); it is written again."
        logger.warning(self._sentence)
        # `_failed` has emptied it if this record was lost, too.
        if not self._sentence:
            return None
        self._lost, self._announced = 0, False
        return self._sentence

    def _failed(self, record: logging.LogRecord) -> None:
        if record.msg == self._sentence:
            # The log still cannot be written.
            self._sentence = ""
            return
        error = sys.exception()
        self._reason = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
        self._lost += 1
        self._counted(1)
