"""What `parcelray serve` means, its plan, and the file that it writes for `serve deploy`."""

import socket
from pathlib import Path

import pytest
import yaml

from parcelray.cluster.serving_plan import serve_job, serving_plan
from parcelray.cluster.serving_run import endpoint, pin
from parcelray.errors import UnsupportedBudgetError, UserError

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.serving


def test_a_reference_stands_for_an_endpoint_at_its_own_budgets() -> None:
    job = serve_job("mini_base", [], port=9000)
    assert (job.name, job.budgets.offered, job.http.host, job.http.port) == ("mini_base", (256,), "127.0.0.1", 9000)
    with pytest.raises(UnsupportedBudgetError):
        pin(serve_job("mini_base", ["budgets.offered=[16]"]))


def test_another_address_needs_keys(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="keys_file is unset"):
        serve_job("mini_base", [], host="0.0.0.0")
    with pytest.raises(UserError, match="cannot be read"):
        pin(serve_job("mini_base", [f"http.keys_file={tmp_path / 'none'}"], host="0.0.0.0"))


def test_a_taken_port_is_said_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        pinned = pin(serve_job("mini_base", [], port=taken.getsockname()[1]))
        with pytest.raises(UserError, match="choose another one with --port"), endpoint(pinned):
            pass


def test_the_plan_says_what_fits() -> None:
    plan = serving_plan(serve_job(str(ROOT / "jobs" / "serve" / "mini.yaml"), ["engine.kv_tokens=1024", "engine.max_running=1000"]))
    # 3 layers, keys and values, 1 head of 32, 4 bytes each.
    assert plan.kv_bytes == 1024 * 3 * 2 * 1 * 32 * 4
    assert plan.requests_in_kv == {16: 9, 64: 6, 256: 2}
    assert plan.flops[16] < plan.flops[64] < plan.flops[256]


def test_the_file_for_serve_deploy_is_the_whole_endpoint() -> None:
    from ray.serve.schema import ServeDeploySchema

    written = yaml.safe_load(pin(serve_job(str(ROOT / "jobs" / "serve" / "mini.yaml"), [])).to_yaml())
    schema = ServeDeploySchema.model_validate(written)
    model, ingress = schema.applications
    assert str(schema.http_options.host) == "127.0.0.1"
    assert (model.route_prefix, ingress.route_prefix, ingress.name) == (None, "/", "mini")
    assert written["applications"][1]["deployments"][0]["user_config"]["champion"]["app"] == model.name
    # The alias is not in it, but what it stood for.
    assert written["applications"][0]["args"]["settings"]["version"].startswith("sha256:")
