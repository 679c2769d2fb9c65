"""The load generator: it counts responses, keeps its rate, and only sends to this machine."""

import json
import random

import pytest

from parcelray.bench.load_generator import closed_loop, open_loop
from parcelray.datasets.sample import Sample
from parcelray.errors import UserError
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from tests.serving.http.test_api import message
from tests.serving.local import endpoint, wait_until

pytestmark = pytest.mark.serving
_CHAT = "/v1/chat/completions"


def _bodies(samples: list[Sample], count: int, **more: object) -> list[bytes]:
    budgets = (16, 64, 256)
    return [
        json.dumps(
            {
                "model": "mini",
                "messages": message(samples[index % len(samples)]),
                "visual_tokens": budgets[index % 3],
                "max_tokens": 4,
            }
            | more
        ).encode()
        for index in range(count)
    ]


def test_both_loops_count_every_response(model: ElasticVLM, processor: ElasticProcessor, samples: list[Sample]) -> None:
    with endpoint(model, processor) as (url, service, engine):
        # The engine starts once the requests of all eight clients are in flight.
        engine._commands.put(lambda: wait_until(lambda: service.admission.in_flight == 8))
        closed_result = closed_loop(url + _CHAT, _bodies(samples, 30), clients=8)
        steps = engine.stats()
        open_result = open_loop(
            url + _CHAT, _bodies(samples, 30, stream=True, stream_options={"include_usage": True}), rate=60
        )
    for found in (closed_result, open_result):
        assert found.statuses == {200: 30}
        assert found.budgets == {"16": 10, "64": 10, "256": 10}
        assert len(found.latencies_s) == 30
        assert 0 < found.quantile(0.5) <= found.quantile(0.99)
        assert 30 <= found.new_tokens <= 120
    assert closed_result.first_tokens_s == []
    assert len(open_result.first_tokens_s) == 30
    assert 0 < open_result.first_token_quantile(0.5) <= open_result.quantile(0.5)
    assert steps.decoded_rows > steps.steps, "decoding steps are shared by the eight clients"
    # The run takes at least as long as the arrival of its requests.
    rng = random.Random(0)
    assert open_result.seconds >= sum(rng.expovariate(60) for _ in range(30))


def test_refused_requests_are_counted_by_status(
    model: ElasticVLM, processor: ElasticProcessor, samples: list[Sample]
) -> None:
    with endpoint(model, processor, capacity=0) as (url, _, _):
        found = closed_loop(url + _CHAT, _bodies(samples, 5), clients=2)
    assert found.statuses == {429: 5}
    assert found.failed == 5
    unreachable = closed_loop("http://127.0.0.1:9" + _CHAT, [b"{}"], clients=1)
    assert unreachable.statuses == {0: 1}


def test_only_this_machine_is_a_legal_target() -> None:
    with pytest.raises(UserError, match="only sends to the loopback"):
        closed_loop("http://example.com/", [b"{}"], clients=1)
