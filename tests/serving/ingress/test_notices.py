"""Tests of the records that a full disk loses, with a device that is always full."""

import logging
import logging.handlers
from pathlib import Path

import pytest

from parcelray.serving.ingress.metrics import EndpointMetrics
from parcelray.serving.ingress.notices import LostRecords, Notices

FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full, which Linux has")
def test_lost_records_are_counted_and_reported_twice(tmp_path: Path) -> None:
    """Once when the disk is full, and once, with their number, when it is not."""
    logger = logging.getLogger("parcelray.notices")
    file = logging.FileHandler(FULL)
    # Serve's handler buffers one record.
    handler = logging.handlers.MemoryHandler(1, target=file)
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
        with (tmp_path / "log").open("w") as stream:
            file.setStream(stream)
            sentence = "3 records of the log were lost (No space left on device); it is written again."
            assert [lost.report() for _ in range(2)] == [sentence, None]
        assert (tmp_path / "log").read_text().splitlines() == [sentence]
        assert metrics.registry.get_sample_value("parcel:log_records_dropped_total", {"model_name": "m"}) == 3
    finally:
        logger.removeHandler(handler)


def test_notices_are_taken_once_and_bounded() -> None:
    notices = Notices()
    for number in range(200):
        notices.add(str(number))
    assert notices.take() == [str(number) for number in range(100, 200)]
    assert notices.take() == []
