"""The HTTP API: the official OpenAI client works unchanged, and invalid requests get helpful errors."""

import asyncio
import base64
import http.client
import io
import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import openai
import pytest
from openai import OpenAI
from PIL import Image

from parcelray.config.reducer import FastVConfig
from parcelray.datasets.sample import Sample
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.checkpoint import MINI_BASE, resolve_checkpoint
from parcelray.models.vlm import load_processor, load_vlm
from parcelray.profiling.backbone_shapes import from_transformers_config
from parcelray.profiling.reduction_flops import reduced_cost
from parcelray.serving.engine.engine import last_event
from parcelray.serving.http import api
from parcelray.serving.http.auth import add_key, read_keys
from parcelray.serving.http.proxy_guard import BodyReader
from parcelray.serving.ingress import chat
from parcelray.serving.ingress.chat import ChatService
from tests.serving.conftest import Asker
from tests.serving.local import PATIENCE_S, VERSION, endpoint

pytestmark = pytest.mark.serving


@pytest.fixture(scope="module")
def running(model: ElasticVLM, processor: ElasticProcessor) -> Iterator[tuple[str, ChatService]]:
    with endpoint(model, processor, limits={"body_mb": 1, "image_mb": 0.5, "image_megapixels": 1, "images": 4}) as (
        url,
        service,
        _,
    ):
        yield url, service


def test_an_endpoint_with_a_reducer_reports_it_and_counts_its_tokens(samples: list[Sample]) -> None:
    folder = resolve_checkpoint(MINI_BASE).path
    vanilla, processor = load_vlm(folder).eval(), load_processor(folder)
    # The budget of a reducer inside the decoder is the mean over the layers.
    reducer = {"type": "fastv", "layer": 1, "positions": "contiguous"}
    sample = next(each for each in samples if len(each.images) == 2)
    with endpoint(vanilla, processor, reducer=reducer, budgets={"offered": [100, 256]}) as (url, _, _):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        (listed,) = json.loads(urlopen(f"{url}/v1/models").read())["data"]
        answer = client.chat.completions.create(
            model="mini", messages=message(sample), extra_body={"visual_tokens": 100}, max_tokens=4
        )
        inspected = post(
            url,
            json.dumps({"url": data_url(sample.images[0]), "visual_tokens": 100}).encode(),
            path="/playground/inspect",
        )
    assert (listed["reducer"], listed["visual_tokens"]) == (reducer, [100, 256])
    shape = from_transformers_config(vanilla.config)
    expected = reduced_cost(shape, FastVConfig(layer=1, positions="contiguous"), 100)
    assert listed["costs"]["100"] == {"flops": expected.total, "kv_cache_bytes": expected.kv_cache_bytes}
    counts = processor.count_tokens(sample.prompt, 2, 100)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == counts.total
    assert answer.usage.prompt_tokens_details.image_tokens == counts.visual == 200  # type: ignore[union-attr]
    assert (inspected[0], inspected[2]["grid"], inspected[2]["attention"]) == (200, 16, [])


@pytest.fixture
def url(running: tuple[str, ChatService]) -> str:
    return running[0]


@pytest.fixture
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def message(sample: Sample, **image_fields: Any) -> list[Any]:
    images = [{"type": "image_url", "image_url": {"url": data_url(image), **image_fields}} for image in sample.images]
    return [{"role": "user", "content": [*images, {"type": "text", "text": sample.prompt}]}]


def post(
    url: str, body: bytes, headers: dict[str, str] | None = None, path: str = "/v1/chat/completions"
) -> tuple[int, dict[str, str], dict[str, Any]]:
    address = urlsplit(url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=PATIENCE_S)
    try:
        # A server that refuses a request by its header does not read the rest of the body.
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.request("POST", path, body, {"content-type": "application/json", **(headers or {})})
        response = connection.getresponse()
        text = response.read() or b"{}"
    finally:
        connection.close()
    # A stream is not one JSON document.
    return response.status, dict(response.getheaders()), {} if text.startswith(b"data:") else json.loads(text)


def test_the_official_client_gets_the_engines_answer_at_each_budget(
    client: OpenAI, running: tuple[str, ChatService], samples: list[Sample], ask: Asker
) -> None:
    engine = running[1].routes.champion.client
    for budget in (16, 64, 256):
        for sample in samples[:6]:
            text = asyncio.run(last_event(engine.events(ask(sample, budget)))).text
            raw = client.chat.completions.with_raw_response.create(
                model="mini", messages=message(sample), max_tokens=8, extra_body={"visual_tokens": budget}
            )
            answer = raw.parse()
            assert answer.choices[0].message.content == text
            assert raw.headers["x-visual-tokens"] == str(budget)
            assert raw.headers["x-model-version"] == VERSION
            assert raw.headers["x-request-id"] == answer.id
            assert answer.usage is not None
            assert answer.usage.model_extra == {"visual_tokens": budget}
            assert answer.usage.prompt_tokens_details is not None
            assert answer.usage.prompt_tokens_details.model_dump()["image_tokens"] == budget * len(sample.images)


def test_detail_selects_the_smallest_or_largest_budget(client: OpenAI, samples: list[Sample]) -> None:
    for detail, budget in (("low", "16"), ("high", "256"), ("auto", "256")):
        raw = client.chat.completions.with_raw_response.create(
            model="mini", messages=message(samples[0], detail=detail)
        )
        assert raw.headers["x-visual-tokens"] == budget


def test_the_client_streams(client: OpenAI, samples: list[Sample]) -> None:
    whole = client.chat.completions.create(
        model="mini", messages=message(samples[0]), max_tokens=16, temperature=1.5, seed=3
    )
    stream = client.chat.completions.create(
        model="mini",
        messages=message(samples[0]),
        max_tokens=16,
        temperature=1.5,
        seed=3,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        == whole.choices[0].message.content
    )
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens  # type: ignore[union-attr]


def test_logprobs_and_stop(client: OpenAI, samples: list[Sample]) -> None:
    answer = client.chat.completions.create(model="mini", messages=message(samples[0]), logprobs=True, top_logprobs=2)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content or []
    assert "".join(each.token for each in content).strip() == answer.choices[0].message.content
    assert all(each.logprob <= 0 and len(each.top_logprobs) == 2 for each in content)
    text = str(answer.choices[0].message.content)
    stopped = client.chat.completions.create(model="mini", messages=message(samples[0]), stop=[text[2:4]])
    assert stopped.choices[0].message.content == text[:2].strip()


def test_models_are_listed(client: OpenAI) -> None:
    (card,) = client.models.list().data
    assert (card.id, card.model_extra["visual_tokens"], card.model_extra["version"]) == ("mini", [16, 64, 256], VERSION)  # type: ignore[index]
    assert client.models.retrieve("mini").id == "mini"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def _png(size: tuple[int, int] = (32, 32), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, kind)
    return buffer.getvalue()


def _with_image(url: str, **fields: Any) -> dict[str, Any]:
    image = {"type": "image_url", "image_url": {"url": url}}
    return {
        "model": "mini",
        "messages": [{"role": "user", "content": [image, {"type": "text", "text": "what"}]}],
        **fields,
    }


def _with_text(**fields: Any) -> dict[str, Any]:
    return {"model": "mini", "messages": [{"role": "user", "content": "what"}], **fields}


IMAGE = "messages.0.content.0.image_url.url"
REFUSED = {
    "not JSON": (b"{", 400, "invalid_json", None),
    "a list": (b"[]", 422, "invalid_type", None),
    "deeply nested JSON": (b"[" * 100_000, 400, "invalid_json", None),
    "NaN": (b'{"model":"mini","temperature":NaN}', 400, "invalid_json", None),
    "no model": ({"messages": [{"role": "user", "content": "a"}]}, 422, "missing_field", "model"),
    "another model": (_with_text() | {"model": "gpt"}, 404, "model_not_found", "model"),
    "unknown field": (_with_text(colour=1), 422, "unknown_field", "colour"),
    "a string for a number": (_with_text(temperature="1"), 422, "invalid_value", "temperature"),
    "a temperature above the limit": (_with_text(temperature=3), 422, "invalid_value", "temperature"),
    "a budget that is not offered": (
        _with_image(data_url(_png()), visual_tokens=17),
        422,
        "unsupported_budget",
        "visual_tokens",
    ),
    "a budget that is not offered, without an image": (
        _with_text(visual_tokens=17),
        422,
        "unsupported_budget",
        "visual_tokens",
    ),
    "a budget in words": (_with_text(visual_tokens="lots"), 422, "unsupported_budget", "visual_tokens"),
    "a huge budget": (_with_image(data_url(_png()), visual_tokens=10**30), 422, "unsupported_budget", "visual_tokens"),
    "two answers": (_with_text(n=2), 422, "invalid_value", "n"),
    "too long an answer": (_with_text(max_tokens=10**9), 422, "invalid_value", "max_tokens"),
    "too long an answer, by the newer name": (
        _with_text(max_completion_tokens=10**9),
        422,
        "invalid_value",
        "max_completion_tokens",
    ),
    "too many stops": (_with_text(stop=list("abcde")), 422, "invalid_value", "stop"),
    "an empty stop": (_with_text(stop=""), 422, "invalid_value", "stop"),
    "a penalty": (_with_text(presence_penalty=0.5), 422, "invalid_value", "presence_penalty"),
    "a logit bias": (_with_text(logit_bias={"5": 1}), 422, "invalid_value", "logit_bias"),
    "another response format": (
        _with_text(response_format={"type": "json_object"}),
        422,
        "invalid_value",
        "response_format.type",
    ),
    "a stored answer": (_with_text(store=True), 422, "invalid_value", "store"),
    "two turns": (_with_text(messages=[{"role": "user", "content": "a"}] * 2), 422, "invalid_request", None),
    "an unknown role": (
        _with_text(messages=[{"role": "tool", "content": "a"}]),
        422,
        "invalid_value",
        "messages.0",
    ),
    "an unknown content part": (
        _with_text(messages=[{"role": "user", "content": [{"type": "audio"}]}]),
        422,
        "invalid_value",
        "messages.0.content.0",
    ),
    "an unknown detail": (
        _with_text(
            messages=[
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:", "detail": "max"}}]}
            ]
        ),
        422,
        "invalid_value",
        "messages.0.content.0.image_url.detail",
    ),
    "not base64": (_with_image("data:image/png;base64,%%%"), 400, "invalid_base64", IMAGE),
    "no data URL": (_with_image("data:image/png,abc"), 400, "invalid_image_url", IMAGE),
    "a GIF": (_with_image(data_url(_png(kind="GIF"), "gif")), 415, "unsupported_image_type", IMAGE),
    "a GIF that says PNG": (_with_image(data_url(_png(kind="GIF"))), 415, "unsupported_image_type", IMAGE),
    "text as an image": (_with_image(data_url(b"hello")), 415, "unsupported_image_type", IMAGE),
    "a truncated image": (_with_image(data_url(_png((200, 200))[:-30])), 422, "broken_image", IMAGE),
    "too many pixels": (_with_image(data_url(_png((1100, 1000)))), 413, "image_too_large", IMAGE),
    "too many bytes": (_with_image(data_url(b"\x89PNG" + bytes(600_000))), 413, "image_too_large", IMAGE),
    "a file": (_with_image("file:///etc/passwd"), 403, "host", IMAGE),
    "a remote image": (_with_image("https://example.com/a.png"), 403, "host", IMAGE),
    "the metadata service": (_with_image("http://169.254.169.254/latest"), 403, "host", IMAGE),
    "too many images": (
        _with_text(
            messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(_png())}}] * 5}]
        ),
        413,
        "too_many_images",
        "messages",
    ),
    "too large a body": (b" " * (1024**2 + 1), 413, "body_too_large", None),
    "too long for the model": (
        _with_text(messages=[{"role": "user", "content": "7" * 32_000}], max_tokens=1000),
        400,
        "context_length_exceeded",
        "messages",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_invalid_request_is_refused(url: str, name: str) -> None:
    body, status, code, param = REFUSED[name]
    got, headers, data = post(url, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert (got, data["error"]["code"], data["error"]["param"]) == (status, code, param), data
    assert set(data["error"]) == {"message", "type", "param", "code"}
    assert len(data["error"]["message"]) < 500
    assert headers["x-request-id"]


def test_the_refusal_of_a_budget_lists_the_legal_ones(client: OpenAI, samples: list[Sample]) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="16, 64, 256 and auto"):
        client.chat.completions.create(model="mini", messages=message(samples[0]), extra_body={"visual_tokens": 20})


def test_the_refusal_of_a_word_as_budget_lists_the_legal_ones(url: str) -> None:
    _, _, data = post(url, json.dumps(_with_text(visual_tokens="lots")).encode())
    assert data["error"]["message"] == "visual_tokens is 'lots'; legal are 16, 64, 256 and auto."


def test_the_refusal_of_a_stop_lists_what_is_legal(url: str) -> None:
    for stop in (list("abcde"), "", [""], 3):
        assert (
            "legal is a string, or a list of at most 4 strings, of 1 to 64 characters each"
            in post(url, json.dumps(_with_text(stop=stop)).encode())[2]["error"]["message"]
        )


def test_neutral_values_of_unsupported_fields_are_accepted(url: str) -> None:
    neutral: list[dict[str, Any]] = [
        {
            "presence_penalty": 0,
            "frequency_penalty": 0.0,
            "response_format": {"type": "text"},
            "store": False,
            "logit_bias": {},
            "stop": [],
        },
        {
            "presence_penalty": None,
            "frequency_penalty": None,
            "response_format": None,
            "store": None,
            "logit_bias": None,
            "stop": None,
        },
        {"stream": True, "stream_options": {"include_obfuscation": False}},
    ]
    for fields in neutral:
        assert post(url, json.dumps(_with_text(max_tokens=1, **fields)).encode())[0] == 200


def test_the_refusal_of_a_method_lists_the_legal_ones(url: str) -> None:
    status, headers, data = post(url, b"{}", path="/v1/models")
    assert (status, data["error"]["code"]) == (405, "method_not_allowed")
    assert "POST" in data["error"]["message"]
    assert "GET" in headers["allow"]


def test_only_json_is_accepted(url: str) -> None:
    assert post(url, b"a=1", {"content-type": "application/x-www-form-urlencoded"})[0] == 415


def test_another_host_name_is_refused_without_keys(url: str) -> None:
    status, _, data = post(url, b"{}", {"host": "attacker.example:80"})
    assert (status, data["error"]["code"]) == (403, "host")


def test_keys_are_required_and_rate_limited(
    model: ElasticVLM, processor: ElasticProcessor, samples: list[Sample], tmp_path: Any
) -> None:
    key = add_key(tmp_path / "keys.txt", "ann", per_minute=2)
    keys = read_keys(tmp_path / "keys.txt")
    assert key not in (tmp_path / "keys.txt").read_text()
    with endpoint(model, processor, keys=keys, http={"keys_file": "keys.txt"}) as (url, _, _):
        with pytest.raises(openai.AuthenticationError):
            OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()
        client = OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
        assert client.chat.completions.create(model="mini", messages=message(samples[0])).choices[0].message.content
        client.models.list()
        with pytest.raises(openai.RateLimitError) as limited:
            client.models.list()
        assert int(limited.value.response.headers["retry-after"]) >= 1
        assert key not in limited.value.response.text
        assert post(url, b"{}", path="/v1/chat/completions")[0] == 401


def test_requests_above_the_capacity_get_a_retry_time(model: ElasticVLM, processor: ElasticProcessor) -> None:
    with endpoint(model, processor, capacity=0) as (url, service, _):
        status, headers, data = post(url, json.dumps(_with_text()).encode())
        assert (status, data["error"]["code"]) == (429, "queue_full")
        assert int(headers["retry-after"]) >= 1
        assert b'parcel:requests_rejected_total{model_name="mini",reason="queue_full"} 1.0' in service.metrics.text()


def test_a_deadline_is_a_503(model: ElasticVLM, processor: ElasticProcessor) -> None:
    # The deadline has passed when the request is read.
    with endpoint(model, processor, limits={"timeout_s": 1e-9}) as (url, _, _):
        status, headers, data = post(url, json.dumps(_with_text(max_tokens=1000, temperature=2.0)).encode())
        assert (status, data["error"]["code"]) == (503, "deadline_exceeded")
        assert "retry-after" in headers


def test_slow_sending_does_not_count_as_latency(
    model: ElasticVLM, processor: ElasticProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0], time=time.time)
    for module in (api, chat):
        monkeypatch.setattr(module, "time", clock)
    body_started = threading.Event()
    # Called for each piece of a body.
    monkeypatch.setattr(BodyReader, "_check", lambda *_: body_started.set())
    with endpoint(model, processor) as (url, service, _):
        body = json.dumps(_with_text(max_tokens=1)).encode()
        connection = http.client.HTTPConnection(str(urlsplit(url).hostname), urlsplit(url).port, timeout=PATIENCE_S)
        connection.putrequest("POST", "/v1/chat/completions")
        for name, value in (("content-type", "application/json"), ("content-length", str(len(body)))):
            connection.putheader(name, value)
        connection.endheaders(body[:10])
        assert body_started.wait(PATIENCE_S)
        now[0] = 20.0
        connection.send(body[10:])
        assert connection.getresponse().status == 200
        connection.close()
        labels = {"model_name": "mini", "visual_tokens": "0", "engine": "0"}
        assert service.metrics.registry.get_sample_value("parcel:e2e_request_latency_seconds_sum", labels) == 0.0


def test_metrics_have_the_budget_as_label(
    running: tuple[str, ChatService], client: OpenAI, samples: list[Sample]
) -> None:
    client.chat.completions.create(model="mini", messages=message(samples[0]), extra_body={"visual_tokens": 64})
    text = running[1].metrics.text().decode()
    for name in (
        "time_to_first_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "vision_encode_seconds",
    ):
        assert f'parcel:{name}_count{{engine="0",model_name="mini",visual_tokens="64"}}' in text
    (line,) = [line for line in text.splitlines() if line.startswith("parcel:kv_cache_usage_perc{")]
    assert math.isclose(float(line.rpartition(" ")[2]), 0.0)
