"""Tests of the plan of an endpoint, the file for `serve deploy`, and the checks before the start."""

import socket
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray import serve
from ray.exceptions import GetTimeoutError, RayActorError
from ray.serve import context as serve_context
from ray.serve.schema import ProxyStatus

from parcelray.errors import SystemFailure, UnsupportedBudgetError, UserError
from parcelray.serving import deployments
from parcelray.serving import run as serving_run
from parcelray.serving.http.auth import add_key
from parcelray.serving.memory import serving_token_plan
from parcelray.serving.plan import pin, serve_job, serving_plan
from parcelray.serving.run import endpoint

from ..tiny import tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.serving


def test_a_model_reference_is_served_at_its_supported_budgets() -> None:
    job = serve_job("mini_base", [], port=9000)
    assert (job.name, job.budgets.offered, job.http.host, job.http.port) == ("mini_base", (256,), "127.0.0.1", 9000)
    with pytest.raises(UnsupportedBudgetError):
        pin(serve_job("mini_base", ["budgets.offered=[16]"]))


def test_a_public_address_needs_keys(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="keys_file is not set"):
        serve_job("mini_base", [], host="0.0.0.0")
    with pytest.raises(UserError, match="cannot be read"):
        pin(serve_job("mini_base", [f"http.keys_file={tmp_path / 'none'}"], host="0.0.0.0"))


def test_a_port_in_use_is_reported_before_the_start() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        pinned = pin(serve_job("mini_base", [], port=taken.getsockname()[1]))
        with pytest.raises(UserError, match="choose another port with --port"), endpoint(pinned):
            pass


def test_the_plan_computes_the_memory_and_the_requests_that_fit() -> None:
    plan = serving_plan(
        serve_job(str(ROOT / "jobs" / "serve" / "mini.yaml"), ["engine.kv_tokens=1024", "engine.max_running=1000"])
    )
    # 3 layers, keys and values, 1 head of 32, 4 bytes each.
    assert plan.kv_bytes == 1024 * 3 * 2 * 1 * 32 * 4
    assert plan.requests_in_kv == {16: 9, 64: 6, 256: 2}
    assert plan.flops[16] < plan.flops[64] < plan.flops[256]


def test_a_reducer_decides_the_budgets_and_the_plan() -> None:
    plan = serving_plan(serve_job(str(ROOT / "jobs" / "serve" / "training_free.yaml"), ["engine.kv_tokens=1024"]))
    assert plan.reducer is not None
    assert plan.reducer["type"] == "cluster_aggregate"
    assert plan.requests_in_kv == {16: 9, 64: 6, 256: 2}
    assert plan.flops[16] < plan.flops[64] < plan.flops[256]
    # The budget of a reducer inside the decoder is the mean over the layers; positions are those of all patches.
    changes = ["engine.kv_tokens=1024", "reducer={type: fastv, layer: 1}", "budgets.offered=[128, 256]"]
    inside = serving_plan(serve_job(str(ROOT / "jobs" / "serve" / "training_free.yaml"), changes))
    assert inside.requests_in_kv == {128: 4, 256: 2}
    tokens = serving_token_plan(serve_job(str(ROOT / "jobs" / "serve" / "training_free.yaml"), changes))
    assert [each.fits for each in tokens.memory] == [4, 2]
    assert "7 at 128, 3 at 256" in tokens.notes[0]
    assert "The memory of the reducer fastv itself is not predicted." in tokens.notes[1]
    # Blocks that are partly filled count: seven images of 128 tokens and 96 others are 992 tokens.
    exact = serving_token_plan(
        serve_job(str(ROOT / "jobs" / "serve" / "training_free.yaml"), [*changes, "engine.kv_tokens=992"])
    )
    assert "6 at 128, 3 at 256" in exact.notes[0]


def test_the_memory_of_a_prefill_counts_the_tokens_that_enter_the_decoder() -> None:
    """The KV cache has room for one request of 128 tokens, whose prefill has 256."""
    changes = ["engine.vision_batch=1", "reducer={type: fastv, layer: 1}", "budgets.offered=[128]"]
    small, large = (
        serving_token_plan(
            serve_job(str(ROOT / "jobs" / "serve" / "training_free.yaml"), [*changes, f"engine.kv_tokens={tokens}"])
        ).memory[0]
        for tokens in (256, 1024)
    )
    assert (small.fits, large.fits) == (1, 4)
    # Larger prefills, besides 768 tokens of KV cache: 3 layers, keys and values, 1 head of 32, 4 bytes each.
    assert large.above_bytes - small.above_bytes > 768 * 3 * 2 * 32 * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["reducer.type=average_pooling", "budgets.offered=[15]"], "average_pooling does not support 15 visual tokens"),
        (["reducer={type: fastv, layer: 1}", "budgets.offered=[16]"], "fastv does not support 16 visual tokens"),
        (["reducer={type: fastv, layer: 9}"], "fastv.layer 9 is not a layer of this decoder of 3 layers"),
        (["reducer.type=visionzip", "model.reference=mini_llava_convnext"], "convolutional tower"),
        (["model.connector={type: m3}"], "model.connector and reducer exclude each other"),
        (
            ["canary={model: {connector: {type: m3}}, reducer: {type: tome}}"],
            "canary.model.connector and canary.reducer",
        ),
    ],
)
def test_a_reducer_that_does_not_fit_is_refused_before_the_start(changes: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pin(serve_job(str(ROOT / "jobs" / "serve" / "training_free.yaml"), changes))


def test_a_reducer_of_a_model_that_already_compresses_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, 1)
    with pytest.raises(UserError, match="this one has the connector parcel; evaluate it without a reducer"):
        pin(serve_job(str(ROOT / "jobs" / "serve" / "training_free.yaml"), [f"model.reference={folder}"]))


def test_the_file_for_serve_deploy_describes_the_whole_endpoint() -> None:
    from ray.serve.schema import ServeDeploySchema

    pinned = pin(serve_job(str(ROOT / "jobs" / "serve" / "mini.yaml"), []))
    text = pinned.to_yaml()
    written = yaml.safe_load(text)
    schema: Any = ServeDeploySchema.model_validate(written)
    model, ingress = schema.applications
    assert str(schema.http_options.host) == "127.0.0.1"
    assert (model.route_prefix, ingress.route_prefix, ingress.name) == (None, "/", "mini")
    assert written["applications"][1]["deployments"][0]["user_config"]["champion"]["app"] == model.name
    # The file holds the pinned reference, not the alias.
    assert written["applications"][0]["args"]["settings"]["model"]["reference"].startswith("sha256:")
    # The proxy middleware is configured, and no path of this machine is in the file.
    variables = schema.controller_options.runtime_env["env_vars"]
    assert variables["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] == "parcelray.serving.http.proxy_guard:middlewares"
    assert 3 * float(variables["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"]) >= 300, (
        "the proxy has time to start on a busy machine"
    )
    assert schema.logging_config.encoding == "JSON"
    assert "PYTHONPATH" not in text
    assert str(pinned.champion.path) not in text
    assert f"# Every node needs access to {pinned.champion.pin.reference}." in text.splitlines()


def test_the_hashes_of_the_keys_travel_with_the_configuration(tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys.txt", "ann")
    pinned = pin(serve_job("mini_base", [f"http.keys_file={tmp_path / 'keys.txt'}"], host="0.0.0.0"))
    assert key not in pinned.to_yaml()
    before = pinned.config()["applications"][-1]
    assert [each["name"] for each in before["deployments"][0]["user_config"]["keys"]] == ["ann"]
    add_key(tmp_path / "keys.txt", "bob")
    after = pin(pinned.job).config()["applications"][-1]
    # The ingress keeps running, and gets the new keys.
    assert before["deployments"] != after["deployments"]
    assert before["args"] == after["args"]


def test_a_challenger_that_is_the_champion_is_refused() -> None:
    job = serve_job(
        str(ROOT / "jobs" / "serve" / "mini.yaml"),
        ['canary={"model": {"reference": "mini_base", "connector": {"type": "m3"}}}'],
    )
    for check in (pin, serving_plan):
        with pytest.raises(UserError, match=r"both sha256:.*canary\.model\.reference"):
            check(job)


def _serve_runs(monkeypatch: pytest.MonkeyPatch, host: str, port: int, *, owned: bool) -> Any:
    """Makes a Serve run on the cluster, which listens on an address, and returns its client."""
    client: Any = SimpleNamespace(get_serve_details=lambda: {"http_options": {"host": host, "port": port}})
    monkeypatch.setattr(serving_run, "_get_global_client", lambda **_: client)
    monkeypatch.setattr(deployments, "_get_global_client", lambda: client)
    monkeypatch.setattr(serving_run, "_ray_will_start", lambda address: False)
    monkeypatch.setattr(serving_run, "ray_session", lambda *_, **__: nullcontext(SimpleNamespace(owned=owned)))
    return client


def test_a_serve_on_another_address_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    _serve_runs(monkeypatch, "0.0.0.0", 8000, owned=False)
    monkeypatch.setattr(serve, "start", lambda **_: pytest.fail("the running Serve was used"))
    changes_of_address: tuple[dict[str, Any], ...] = ({}, {"port": 8001})
    for changes in changes_of_address:
        with (
            pytest.raises(UserError, match=r"listens on 0\.0\.0\.0:8000, not on 127\.0\.0\.1"),
            endpoint(pin(serve_job("mini_base", [], **changes))),
        ):
            pass


def _start_with(monkeypatch: pytest.MonkeyPatch, error: Exception, *statuses: ProxyStatus) -> Iterator[ProxyStatus]:
    """Makes `serve.start` fail, and Serve's proxy report these statuses, one per simulated second."""
    now, left = [0.0], iter(statuses)

    def start(**_: Any) -> None:
        raise error

    def status() -> Any:
        found = next(left, None)
        return SimpleNamespace(proxies={} if found is None else {"node": found})

    def sleep(_: float) -> None:
        now[0] += 1

    monkeypatch.setattr(deployments, "_get_global_client", lambda: SimpleNamespace())
    monkeypatch.setattr(serving_run, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(serve, "start", start)
    monkeypatch.setattr(serve, "status", status)
    return left


def test_a_proxy_that_takes_longer_than_serves_timeout_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = [ProxyStatus.STARTING] * 100
    left = _start_with(monkeypatch, TimeoutError(), *statuses, ProxyStatus.HEALTHY)
    serving_run._start(serve_job("mini_base", []))
    assert next(left, None) is None, "it waited for the last status"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GetTimeoutError("Get timed out: some object(s) not ready."), "proxy was not ready after 300 s"),
        (RayActorError(), "proxy ended at its start"),
    ],
)
def test_a_proxy_that_does_not_start_is_reported_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    _start_with(monkeypatch, error)
    with pytest.raises(SystemFailure, match=message):
        serving_run._start(serve_job("mini_base", []))


def test_the_client_of_serve_is_dropped_with_its_own_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first job of every new Ray has the same number, so Serve would reuse this client in the next session.
    for owned in (False, True):
        known = _serve_runs(monkeypatch, "127.0.0.1", 1, owned=owned)
        monkeypatch.setattr(serve_context, "_global_client", known)
        with (
            pytest.raises(UserError, match="Serve runs on this cluster already"),
            endpoint(pin(serve_job("mini_base", []))),
        ):
            pass
        assert serve_context._global_client is (None if owned else known)
