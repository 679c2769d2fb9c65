"""The load generator sends what it should, at the rate it should, and to this machine only."""

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


def test_both_loads_are_answered_and_counted(
    model: ElasticVLM, processor: ElasticProcessor, samples: list[Sample]
) -> None:
    with endpoint(model, processor) as (url, service, engine):
        # The engine begins once the eight clients have asked.
        engine._commands.put(lambda: wait_until(lambda: service.admission.in_flight == 8))
        closed = closed_loop(url + _CHAT, _bodies(samples, 30), clients=8)
        steps = engine.stats()
        opened = open_loop(
            url + _CHAT, _bodies(samples, 30, stream=True, stream_options={"include_usage": True}), rate=60
        )
    for found in (closed, opened):
        assert found.statuses == {200: 30}
        assert found.budgets == {"16": 10, "64": 10, "256": 10}
        assert len(found.latencies_s) == 30
        assert 0 < found.quantile(0.5) <= found.quantile(0.99)
        assert 30 <= found.new_tokens <= 120
    assert closed.first_tokens_s == []
    assert len(opened.first_tokens_s) == 30
    assert 0 < opened.first_token_quantile(0.5) <= opened.quantile(0.5)
    assert steps.decoded_rows > steps.steps, "eight clients share steps"
    # It takes at least as long as its requests take to come.
    rng = random.Random(0)
    assert opened.seconds >= sum(rng.expovariate(60) for _ in range(30))


def test_refusals_are_counted_as_such(model: ElasticVLM, processor: ElasticProcessor, samples: list[Sample]) -> None:
    with endpoint(model, processor, capacity=0) as (url, _, _):
        found = closed_loop(url + _CHAT, _bodies(samples, 5), clients=2)
    assert found.statuses == {429: 5}
    assert found.failed == 5
    nobody = closed_loop("http://127.0.0.1:9" + _CHAT, [b"{}"], clients=1)
    assert nobody.statuses == {0: 1}


def test_no_load_leaves_this_machine() -> None:
    with pytest.raises(UserError, match="loopback only"):
        closed_loop("http://example.com/", [b"{}"], clients=1)
