"""The bound on what one ingress has in flight, and when it makes sense for the refused to come back."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from parcelray.serving.http.api_errors import too_many

_WINDOW_S = 10.0
_LONGEST_S = 30


class Admission:
    """Counts requests in flight.

    Args:
        capacity: at most; more are refused.
        clock: seconds, monotonic.
    """

    def __init__(self, capacity: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = capacity
        self._clock = clock
        self._answers: deque[float] = deque(maxlen=1024)
        self.in_flight = 0

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Holds a place for one request.

        Raises:
            ApiError: 429 where all places are taken.
        """
        if self.in_flight >= self._capacity:
            message = f"{self.in_flight} requests are in flight and no more are queued; send the request again later."
            raise too_many(message, code="queue_full", retry_after_s=self.retry_after_s())
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def answered(self) -> None:
        """A request was answered: what is refused or fails ends at once, and says nothing about when others will."""
        self._answers.append(self._clock())

    def retry_after_s(self) -> int:
        """Seconds in which about half of what is in flight will have been answered, 1 to 30."""
        now = self._clock()
        recent = sum(at >= now - _WINDOW_S for at in self._answers)
        rate = recent / _WINDOW_S
        return max(1, min(_LONGEST_S, math.ceil(self.in_flight / 2 / rate))) if rate else 1
