"""Speed of a training: tokens per second between two metric points."""

import time


class TokenClock:
    """Measures tokens per second since the last metric point, without the time of validations and checkpoints."""

    def __init__(self) -> None:
        self._started, self._tokens = time.perf_counter(), 0

    def add(self, tokens: int) -> None:
        """Counts the tokens of a step."""
        self._tokens += tokens

    def rate(self) -> float:
        """Tokens per second since the last restart."""
        return self._tokens / (time.perf_counter() - self._started)

    def restart_if(self, due: bool) -> None:
        """Starts a new measurement after a metric point, a validation or a checkpoint."""
        if due:
            self._started, self._tokens = time.perf_counter(), 0
