"""What `parcelray serve` means, its plan, and the file that it writes for `serve deploy`."""

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
from parcelray.serving import run as serving_run
from parcelray.serving.http.auth import add_key
from parcelray.serving.plan import serve_job, serving_plan
from parcelray.serving.run import endpoint, pin

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.serving


def test_a_reference_stands_for_an_endpoint_at_its_own_budgets() -> None:
    job = serve_job("mini_base", [], port=9000)
    assert (job.name, job.budgets.offered, job.http.host, job.http.port) == ("mini_base", (256,), "127.0.0.1", 9000)
    with pytest.raises(UnsupportedBudgetError):
        pin(serve_job("mini_base", ["budgets.offered=[16]"]))


def test_another_address_needs_keys(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="keys_file is not set"):
        serve_job("mini_base", [], host="0.0.0.0")
    with pytest.raises(UserError, match="cannot be read"):
        pin(serve_job("mini_base", [f"http.keys_file={tmp_path / 'none'}"], host="0.0.0.0"))


def test_a_taken_port_is_said_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        pinned = pin(serve_job("mini_base", [], port=taken.getsockname()[1]))
        with pytest.raises(UserError, match="choose another one with --port"), endpoint(pinned):
            pass


def test_the_plan_says_what_fits() -> None:
    plan = serving_plan(
        serve_job(str(ROOT / "jobs" / "serve" / "mini.yaml"), ["engine.kv_tokens=1024", "engine.max_running=1000"])
    )
    # 3 layers, keys and values, 1 head of 32, 4 bytes each.
    assert plan.kv_bytes == 1024 * 3 * 2 * 1 * 32 * 4
    assert plan.requests_in_kv == {16: 9, 64: 6, 256: 2}
    assert plan.flops[16] < plan.flops[64] < plan.flops[256]


def test_the_file_for_serve_deploy_is_the_whole_endpoint() -> None:
    from ray.serve.schema import ServeDeploySchema

    pinned = pin(serve_job(str(ROOT / "jobs" / "serve" / "mini.yaml"), []))
    text = pinned.to_yaml()
    written = yaml.safe_load(text)
    schema: Any = ServeDeploySchema.model_validate(written)
    model, ingress = schema.applications
    assert str(schema.http_options.host) == "127.0.0.1"
    assert (model.route_prefix, ingress.route_prefix, ingress.name) == (None, "/", "mini")
    assert written["applications"][1]["deployments"][0]["user_config"]["champion"]["app"] == model.name
    # The alias is not in it, but what it stood for.
    assert written["applications"][0]["args"]["settings"]["version"].startswith("sha256:")
    # What stands before the proxy is started with it; nothing of this machine but the checkpoint's folder, which the
    # head names.
    variables = schema.controller_options.runtime_env["env_vars"]
    assert variables["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] == "parcelray.serving.http.proxy_guard:middlewares"
    assert 3 * float(variables["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"]) >= 300, (
        "a busy machine's proxy has time to start"
    )
    assert schema.logging_config.encoding == "JSON"
    assert "PYTHONPATH" not in text
    assert f"# Every node needs the folder {pinned.champion.path}." in text.splitlines()


def test_the_file_names_the_keys_that_each_node_needs(tmp_path: Path) -> None:
    add_key(tmp_path / "keys.txt", "ann")
    pinned = pin(serve_job("mini_base", [f"http.keys_file={tmp_path / 'keys.txt'}"], host="0.0.0.0"))
    assert f"# Every node needs the file {tmp_path / 'keys.txt'}." in pinned.to_yaml().splitlines()
    before = pinned.config()["applications"][-1]
    add_key(tmp_path / "keys.txt", "bob")
    after = pin(pinned.job).config()["applications"][-1]
    # The ingress stays, and is told to read the file again.
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


def test_a_serve_that_listens_elsewhere_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    running = SimpleNamespace(http_config=SimpleNamespace(host="0.0.0.0", port=8000))
    monkeypatch.setattr(serving_run, "_get_global_client", lambda **_: running)
    monkeypatch.setattr(serving_run, "_proxy_will_start_here", lambda address: False)
    monkeypatch.setattr(serving_run, "ray_session", lambda *_, **__: nullcontext(SimpleNamespace(owned=False)))
    monkeypatch.setattr(serve, "start", lambda **_: pytest.fail("it was joined"))
    elsewhere: tuple[dict[str, Any], ...] = ({}, {"port": 8001})
    for changes in elsewhere:
        with (
            pytest.raises(UserError, match=r"listens on 0\.0\.0\.0:8000, not on 127\.0\.0\.1"),
            endpoint(pin(serve_job("mini_base", [], **changes))),
        ):
            pass


def _start_with(monkeypatch: pytest.MonkeyPatch, error: Exception, *statuses: ProxyStatus) -> Iterator[ProxyStatus]:
    """Makes `serve.start` fail, and Serve's proxy report these statuses, one a second by the clock of the product code."""
    now, left = [0.0], iter(statuses)

    def start(**_: Any) -> None:
        raise error

    def status() -> Any:
        found = next(left, None)
        return SimpleNamespace(proxies={} if found is None else {"node": found})

    def sleep(_: float) -> None:
        now[0] += 1

    monkeypatch.setattr(serving_run, "_get_global_client", lambda **_: SimpleNamespace())
    monkeypatch.setattr(serving_run, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(serve, "start", start)
    monkeypatch.setattr(serve, "status", status)
    return left


def test_a_proxy_that_needs_more_than_serves_minute_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = [ProxyStatus.STARTING] * 100
    left = _start_with(monkeypatch, TimeoutError(), *statuses, ProxyStatus.HEALTHY)
    serving_run._start(serve_job("mini_base", []))
    assert next(left, None) is None, "it has waited for the last status"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (GetTimeoutError("Get timed out: some object(s) not ready."), "proxy was not ready after 300 s"),
        (RayActorError(), "proxy ended at its start"),
    ],
)
def test_a_proxy_that_does_not_start_is_reported_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    _start_with(monkeypatch, error)
    with pytest.raises(SystemFailure, match=says):
        serving_run._start(serve_job("mini_base", []))


def test_what_a_process_knows_of_serve_goes_with_its_own_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first job of every new Ray has the same number, by which Serve would take this client for one of the next
    # session.
    for owned in (False, True):
        known: Any = SimpleNamespace(http_config=SimpleNamespace(host="127.0.0.1", port=1))
        monkeypatch.setattr(serve_context, "_global_client", known)
        monkeypatch.setattr(serving_run, "_get_global_client", lambda known=known, **_: known)
        monkeypatch.setattr(serving_run, "_proxy_will_start_here", lambda address: False)
        monkeypatch.setattr(
            serving_run, "ray_session", lambda *_, owned=owned, **__: nullcontext(SimpleNamespace(owned=owned))
        )
        with (
            pytest.raises(UserError, match="Serve runs on this cluster already"),
            endpoint(pin(serve_job("mini_base", []))),
        ):
            pass
        assert serve_context._global_client is (None if owned else known)
