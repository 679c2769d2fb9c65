"""Tests of the bound on requests in flight and of the advertised retry time."""

from contextlib import ExitStack

import pytest

from parcelray.serving.http.api_errors import ApiError
from parcelray.serving.ingress.chat import Admission


def test_slots_are_released_after_failures() -> None:
    now = [0.0]
    admission = Admission(2, clock=lambda: now[0])

    def fail() -> None:
        with admission.slot():
            raise RuntimeError

    with admission.slot(), admission.slot():
        with pytest.raises(ApiError) as refused, admission.slot():
            pass
        assert refused.value.status == 429
    for _ in range(20):
        with pytest.raises(RuntimeError):
            fail()
    assert admission.in_flight == 0


def test_the_retry_time_depends_on_answers_only() -> None:
    now = [0.0]
    admission = Admission(40, clock=lambda: now[0])
    with ExitStack() as visits:
        for _ in range(40):
            visits.enter_context(admission.slot())
        assert admission.retry_after_s() == 1
        for _ in range(10):
            admission.answered()
        for _ in range(500):
            with pytest.raises(ApiError), admission.slot():
                pass
        # At one answer per second, half of 40 requests take 20 seconds, however many requests are refused.
        assert admission.retry_after_s() == 20
