"""Tests of the sentences for the operator, and of the records that a full disk loses."""

import errno
import io
import logging
import logging.handlers
import os

from parcelray.serving.ingress.metrics import EndpointMetrics
from parcelray.serving.ingress.notices import LostRecords, Notices


class File(io.StringIO):
    """A file on a disk that may be full."""

    full = True

    def write(self, text: str) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(text)


def test_lost_records_are_counted_and_reported_twice() -> None:
    """Once when the disk is full, and once, with their number, when it is not."""
    logger = logging.getLogger("parcelray.notices")
    file = File()
    # Serve's handler buffers one record.
    handler = logging.handlers.MemoryHandler(1, target=logging.StreamHandler(file))
    metrics = EndpointMetrics("m")
    lost = LostRecords([handler], metrics.log_records_dropped)
    logger.addHandler(handler)
    try:
        assert lost.report() is None
        for _ in range(3):
            logger.warning("a request")
        announced, *later = [lost.report() for _ in range(3)]
        assert announced == "The log cannot be written (No space left on device); requests are answered all the same."
        assert later == [None, None], "nothing is repeated while the disk is full"
        file.full = False
        sentence = "3 records of the log were lost (No space left on device); it is written again."
        assert [lost.report() for _ in range(2)] == [sentence, None]
        assert file.getvalue().splitlines() == [sentence]
        assert metrics.registry.get_sample_value("parcel:log_records_dropped_total", {"model_name": "m"}) == 3
    finally:
        logger.removeHandler(handler)


def test_notices_are_taken_once_and_bounded() -> None:
    notices = Notices()
    for number in range(200):
        notices.add(str(number))
    assert notices.take() == [str(number) for number in range(100, 200)]
    assert notices.take() == []
