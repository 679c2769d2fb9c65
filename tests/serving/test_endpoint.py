"""Tests of the whole endpoint on Ray Serve: dying replicas, rollovers, disconnecting clients and overload."""

import asyncio
import copy
import http.client
import json
import os
import re
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
import ray
import torch
from mlflow import MlflowClient
from mlflow.artifacts import load_dict
from openai import APIStatusError, AsyncOpenAI, OpenAI, RateLimitError
from ray import serve

from parcelray.config.connector import M3ConnectorConfig
from parcelray.datasets.sample import Sample
from parcelray.errors import UserError
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.mini import save_checkpoint
from parcelray.serving.deployments import deploy
from parcelray.serving.plan import PinnedEndpoint, pin
from parcelray.serving.run import endpoint
from tests.serving.http.test_api import message
from tests.serving.local import PATIENCE_S, PATIENT, job_of, wait_until

pytestmark = [pytest.mark.serving, pytest.mark.ray, pytest.mark.slow]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# A free port: two Serve proxies on one port would share it, and each would get half of the other's requests.
PORT = _free_port()
STORE = TemporaryDirectory()


def job(**changes: Any) -> PinnedEndpoint:
    base = {
        "http": {"port": PORT},
        "replicas": {"min": 2, "max": 2, "cpus": 0.5, "threads": 1},
        "engine": {"max_running": 8, "max_waiting": 24, "kv_tokens": 4096},
        "limits": PATIENT,
        "tracking": {"uri": f"sqlite:///{STORE.name}/mlflow.db", "experiment": "served"},
        "samples": {"ratio": 1.0},
    }
    return pin(job_of(**{**base, **changes}))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with endpoint(job()) as url:
        yield url


class Load:
    """Closed-loop clients, each with its own samples, that run until the end of the context."""

    def __init__(self, url: str, samples: list[Sample], clients: int, pause_s: float = 0.05, **fields: Any) -> None:
        self.outcomes: Counter[str] = Counter()
        self.versions: Counter[str] = Counter()
        self._pause_s = pause_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(url, samples, clients, fields)))

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def wait_for(self, answers: int) -> None:
        wanted = self.outcomes["ok"] + answers
        wait_until(lambda: self.outcomes["ok"] >= wanted, self.outcomes)

    async def _run(self, url: str, samples: list[Sample], clients: int, fields: dict[str, Any]) -> None:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
            await asyncio.gather(*(self._ask(client, samples[index::clients], fields) for index in range(clients)))

    async def _ask(self, client: AsyncOpenAI, samples: list[Sample], fields: dict[str, Any]) -> None:
        while not self._stop.is_set():
            for sample in samples:
                await asyncio.sleep(self._pause_s)
                try:
                    raw = await client.chat.completions.with_raw_response.create(
                        model="mini", messages=message(sample), **fields
                    )
                    self.outcomes["ok"] += 1
                    self.versions[raw.headers["x-model-version"]] += 1
                except APIStatusError as error:
                    self.outcomes[str(error.status_code)] += 1
                    await asyncio.sleep(0.1)


def replica_pids() -> list[int]:
    actors = [actor for actor in ray.util.list_named_actors(all_namespaces=True) if "#Model#" in actor["name"]]
    handles = [ray.get_actor(actor["name"], namespace=actor["namespace"]) for actor in actors]
    pids: list[int] = ray.get([handle.__ray_call__.remote(lambda _: os.getpid()) for handle in handles])
    return pids


def get(url: str, path: str) -> Any:
    with urlopen(Request(f"{url}{path}"), timeout=PATIENCE_S) as response:
        return json.loads(response.read())


def test_streamed_and_whole_answers_are_equal_at_each_budget(url: str, samples: list[Sample]) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    for budget in (16, 256):
        arguments: dict[str, Any] = {
            "model": "mini",
            "messages": message(samples[0]),
            "max_tokens": 8,
            "extra_body": {"visual_tokens": budget},
        }
        raw_answer = client.chat.completions.with_raw_response.create(**arguments)
        assert raw_answer.headers["x-visual-tokens"] == str(budget)
        text = raw_answer.parse().choices[0].message.content
        assert text
        assert (
            "".join(
                chunk.choices[0].delta.content or ""
                for chunk in client.chat.completions.create(**arguments, stream=True)
            )
            == text
        )
    assert get(url, "/ready") == {"status": "ready"}


def raw(
    url: str, path: str, headers: bytes = b"", body: bytes = b"", method: str = "POST"
) -> tuple[int, dict[str, str], Any]:
    """Sends a request with headers that no client library would send; returns status, headers and JSON."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE_S) as connection:
        head = (
            f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\ncontent-type:"
            f" application/json\r\ncontent-length: {len(body)}\r\n"
        )
        connection.sendall(head.encode() + headers + b"\r\n" + body)
        response = http.client.HTTPResponse(connection)
        response.begin()
        return (
            response.status,
            {name.lower(): value for name, value in response.getheaders()},
            json.loads(response.read() or b"{}"),
        )


def slow_client(url: str, length: int) -> socket.socket:
    """Returns a connection that announces `length` bytes and has sent one."""
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE_S)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length:"
        f" {length}\r\n\r\n{{"
    )
    connection.sendall(head.encode())
    return connection


def log_records(component: str) -> list[dict[str, Any]]:
    node: Any = ray._private.worker._global_node
    folder = Path(node.get_logs_dir_path()) / "serve"
    lines = [line for file in folder.glob(f"{component}*.log") for line in file.read_text().splitlines()]
    return [json.loads(line) for line in lines]


QUESTION = json.dumps(
    {"model": "mini", "messages": [{"role": "user", "content": "how many"}], "max_tokens": 2}
).encode()
CONTROL_HEADERS = [
    b"x-request-id: \xff",
    b"x-request-id: mine",
    b"x-session-id: \xff",
    b"x_session_id: \xff",
    b"x-request-timeout-seconds: \xff",
    b"x-request-timeout-seconds: 0.000001",
    b"x-request-disconnect-disabled: \xff",
    b"serve_multiplexed_model_id: \xff",
    b"serve-multiplexed-model-id: other",
    b"traceparent: \xff",
    b"x-other: \xff",
]


@pytest.mark.parametrize("header", CONTROL_HEADERS)
def test_headers_that_control_serve_are_ignored(url: str, header: bytes) -> None:
    status, headers, data = raw(url, "/v1/chat/completions", header + b"\r\n", QUESTION)
    assert (status, headers["x-request-id"]) == (200, data["id"])
    assert data["id"].startswith("chatcmpl-")


def test_the_proxy_reveals_nothing_and_uses_the_same_error_format(url: str) -> None:
    for path in ("/-/routes", "/%2d/routes", "/none", "/v1"):
        status, headers, data = raw(url, path, method="GET")
        assert (status, data["error"]["code"], data["error"]["message"]) == (
            404,
            "not_found",
            "There is nothing at this path.",
        )
        assert headers["x-request-id"].startswith("chatcmpl-")


def test_a_request_is_logged_as_one_json_line_with_one_id(url: str) -> None:
    _, headers, data = raw(url, "/v1/chat/completions", body=QUESTION)
    _, refused, _ = raw(url, "/v1/chat/completions", body=b"{")
    ids = {headers["x-request-id"]: "answered", refused["x-request-id"]: "refused"}
    assert headers["x-request-id"] == data["id"]

    def records() -> dict[str, Any]:
        return {
            record["request"]["id"]: record for record in log_records("replica_mini_Ingress") if "request" in record
        }

    wait_until(lambda: ids.keys() <= records().keys())
    found = records()
    assert {name: found[name]["request"]["event"] for name in ids} == ids
    # Records of Serve about the same request have the same id.
    assert all(found[name]["request_id"] == name for name in ids)
    assert found[data["id"]]["request"]["visual_tokens"] == 0
    assert not [
        record
        for component in ("replica", "proxy")
        for record in log_records(component)
        if "POST /v1" in record["message"]
    ]


def test_slow_clients_do_not_count_as_in_flight(url: str) -> None:
    """Opens more connections with incomplete bodies than the ingress admits."""
    slow = [slow_client(url, 1000) for _ in range(300)]
    try:
        assert raw(url, "/v1/chat/completions", body=QUESTION)[0] == 200
        # None of them has been closed.
        for connection in slow:
            connection.setblocking(False)
            with pytest.raises(BlockingIOError):
                connection.recv(1)
    finally:
        for connection in slow:
            connection.close()


def test_a_port_other_than_that_of_the_running_serve_is_refused(url: str) -> None:
    with (
        pytest.raises(UserError, match=f"listens on 127.0.0.1:{PORT}, not on 127.0.0.1:{PORT + 1}"),
        endpoint(job(http={"port": PORT + 1})),
    ):
        pass
    assert get(url, "/ready") == {"status": "ready"}


def test_hostile_bodies_get_a_client_error(url: str) -> None:
    base = {
        "model": "mini",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        "max_tokens": 2,
        "visual_tokens": 16,
    }
    bodies = [b"", b"{", b"[" * 100_000, b"\xff", json.dumps([base]).encode()]
    wrong: tuple[Any, ...] = (None, -1, 2**70, "\ud800", [[]], {"a": 1})
    for key in base:
        bodies += [json.dumps({**base, key: value}).encode() for value in wrong]
    statuses = [
        raw(url, path, body=body)[0] for body in bodies for path in ("/v1/chat/completions", "/playground/inspect")
    ]
    assert all(status in (200, 400, 404, 413, 415, 422) for status in statuses)
    with slow_client(url, 99_999_999_999) as connection:
        assert connection.recv(200).startswith(b"HTTP/1.1 413")
    assert get(url, "/ready") == {"status": "ready"}


def test_no_request_fails_when_a_replica_dies_under_load(url: str, samples: list[Sample]) -> None:
    with Load(url, samples, clients=6, max_tokens=8) as load:
        load.wait_for(20)
        os.kill(replica_pids()[0], signal.SIGKILL)
        load.wait_for(100)
    assert set(load.outcomes) == {"ok"}, load.outcomes


def test_idle_replicas_are_reported_and_samples_reach_mlflow(url: str, samples: list[Sample]) -> None:
    def engines() -> set[str]:
        with urlopen(f"{url}/metrics", timeout=PATIENCE_S) as response:
            return set(re.findall(r'parcel:model_load_seconds\{engine="(\d+)"', response.read().decode()))

    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    request_id = client.chat.completions.create(
        model="mini", messages=message(samples[0]), max_tokens=1, extra_body={"visual_tokens": 64}
    ).id
    store = MlflowClient(f"sqlite:///{STORE.name}/mlflow.db")
    found: dict[str, list[Any]] = {}

    def reached() -> bool:
        experiment = store.get_experiment_by_name("served")
        for run in store.search_runs([experiment.experiment_id]) if experiment is not None else []:
            for file in store.list_artifacts(run.info.run_id, "samples"):
                table = load_dict(f"{run.info.artifact_uri}/{file.path}")
                found.update(
                    {
                        row[table["columns"].index("request_id")]: [
                            row[table["columns"].index(name)] for name in ("visual_tokens", "new_tokens")
                        ]
                        for row in table["data"]
                    }
                )
        return request_id in found and len(engines()) >= 2

    wait_until(reached, found)
    assert found[request_id] == [64, 1]


@pytest.fixture(scope="module")
def endless(model: ElasticVLM, processor: ElasticProcessor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Returns changes of the job: another version, whose answers have their maximum length, on one replica."""
    folder = tmp_path_factory.mktemp("endless")
    changed = copy.deepcopy(model)
    with torch.no_grad():
        # The end token is never the most likely one.
        changed.get_input_embeddings().get_parameter("weight")[processor.tokenizer.eos_token_id] = 0
    save_checkpoint(changed, processor, folder)
    # One replica: of two, the less busy one would answer the short requests that query the load.
    replicas = {"min": 1, "max": 1, "cpus": 0.5, "threads": 1}
    return {"model": {"reference": str(folder), "connector": M3ConnectorConfig().model_dump()}, "replicas": replicas}


def test_a_new_version_takes_over_without_a_failed_request(
    url: str, samples: list[Sample], endless: dict[str, Any]
) -> None:
    new = job(**endless)
    before = get(url, "/version")["models"][0]["version"]
    assert new.champion.pinned != before
    # With long pauses, because fully used cores would delay the start of the new version.
    with Load(url, samples, clients=4, pause_s=0.5, max_tokens=8) as load:
        load.wait_for(10)
        deploy(new)
        load.wait_for(10)
    assert set(load.outcomes) == {"ok"}, load.outcomes
    assert set(load.versions) == {before, new.champion.pinned}
    assert get(url, "/version")["models"][0]["version"] == new.champion.pinned
    assert len(serve.status().applications) == 2, "the old version is gone"


class Busy:
    """Returns the load of the only replica, as reported with the answer to a short request."""

    def __init__(self, url: str, sample: Sample) -> None:
        self._url = url
        self._sample = sample
        self._client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)

    def running_and_decoded(self) -> tuple[float, float]:
        self._client.chat.completions.create(model="mini", messages=message(self._sample), max_tokens=1, extra_body=FEW)
        with urlopen(f"{self._url}/metrics", timeout=PATIENCE_S) as response:
            lines = response.read().decode().splitlines()

        def total(name: str) -> float:
            return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"parcel:{name}{{"))

        return total("num_requests_running"), total("decode_rows_total")

    def idle(self) -> bool:
        try:
            return self.running_and_decoded()[0] == 0
        except RateLimitError:
            return False


# Few tokens, so that four long answers and a short one fit in the KV pool together, and none waits for another.
FEW = {"visual_tokens": 16}
LONG: dict[str, Any] = {"model": "mini", "max_tokens": 900, "extra_body": FEW}


def test_a_client_that_disconnects_frees_its_slot(url: str, samples: list[Sample], endless: dict[str, Any]) -> None:
    deploy(job(**endless))
    busy = Busy(url, samples[0])

    async def hang_up() -> float:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:

            async def begin() -> Any:
                stream = await client.chat.completions.create(**LONG, messages=message(samples[0]), stream=True)
                pieces = aiter(stream)
                for _ in range(4):
                    assert (await anext(pieces)).choices[0].finish_reason is None
                return stream

            streams = await asyncio.gather(*(begin() for _ in range(4)))
            running, _ = await asyncio.to_thread(busy.running_and_decoded)
            for stream in streams:
                await stream.close()
            return running

    _, before = busy.running_and_decoded()
    assert asyncio.run(hang_up()) >= 4
    wait_until(busy.idle)
    decoded = busy.running_and_decoded()[1] - before
    assert 0 < decoded < 4 * 900 / 2, "they were begun, and not answered to their ends"


def test_excess_requests_get_a_retry_time_and_the_others_are_answered(
    url: str, samples: list[Sample], endless: dict[str, Any]
) -> None:
    deploy(job(**endless))

    async def flood() -> list[BaseException]:
        """Returns the errors once there is an error and an answer; the other clients then disconnect."""
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
            # The endpoint admits 32.
            arguments = {**LONG, "messages": message(samples[0]), "max_tokens": 300}
            left = {asyncio.create_task(client.chat.completions.create(**arguments)) for _ in range(100)}
            answers = 0
            errors: list[BaseException] = []
            while not answers or not errors:
                ended, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                errors += [error for each in ended if (error := each.exception()) is not None]
                answers += sum(each.exception() is None for each in ended)
            for each in left:
                each.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            return errors

    for error in asyncio.run(flood()):
        assert isinstance(error, RateLimitError)
        assert int(error.response.headers["retry-after"]) >= 1
    wait_until(Busy(url, samples[0]).idle)


@pytest.mark.nightly
def test_a_challenger_gets_its_share_and_is_rolled_back_when_slow(
    url: str, samples: list[Sample], endless: dict[str, Any]
) -> None:
    # A ratio far below 1 makes any challenger too slow, so no slower model is needed.
    canary = {"model": {"connector": {"type": "m3"}}, "share": 0.5, "min_requests": 20, "max_latency_ratio": 1e-6}
    deploy(job(**endless, canary=canary))
    with Load(url, samples, clients=4, max_tokens=8) as load:
        wait_until(lambda: get(url, "/version")["rolled_back"] is not None)
        assert "median latency" in get(url, "/version")["rolled_back"]
    assert set(load.outcomes) == {"ok"}
    assert get(url, "/version")["models"][1]["share"] == 0.0
