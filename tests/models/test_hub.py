"""References to models on the hub, through HF_ENDPOINT; each process stands for a host with a cache of its own."""

import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import save_file

from .hub_server import LARGE, HubServer

HOST = """
import json, sys
from parcelray.errors import UserError
from parcelray.models.checkpoint import ModelPin, open_pin, open_settings, resolve_checkpoint

for line in sys.stdin:
    try:
        if line.startswith("settings {"):
            path, pin = open_settings(ModelPin.model_validate_json(line.removeprefix("settings "))), None
        elif line.startswith("{"):
            path, pin = open_pin(ModelPin.model_validate_json(line)), None
        else:
            path, _, pin = resolve_checkpoint(line.strip())
        files = sorted(each.name for each in path.iterdir())
        print(json.dumps({"files": files, "pin": pin and pin.model_dump_json()}), flush=True)
    except UserError as error:
        print(json.dumps({"error": str(error)}), flush=True)
"""


@pytest.fixture
def hub(tmp_path):
    """A hub with one model, whose weights are a large file, and which also has a pickle."""
    folder = tmp_path / "repository"
    folder.mkdir()
    save_file({"weight": torch.ones(LARGE)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("A model.")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    server = HubServer({"org/name": folder})
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def host(hub, tmp_path):
    """Starts a host: a function that resolves a reference or opens a pin in its process; `end` ends it by its index."""
    processes = []

    def start(name, **more):
        variables = more | {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HOME": str(tmp_path / name / "hf"),
            "XDG_CACHE_HOME": str(tmp_path / name / "cache"),
            "NO_PROXY": "127.0.0.1,localhost",
        }
        process = subprocess.Popen(
            [sys.executable, "-c", HOST],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | variables,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        processes.append((process, process.stdin, process.stdout))

        def ask(line, stdin=process.stdin, stdout=process.stdout):
            stdin.write(f"{line}\n")
            stdin.flush()
            return json.loads(stdout.readline())

        return ask

    def end(index):
        process, stdin, stdout = processes[index]
        stdin.close()
        process.wait()
        stdout.close()

    start.end = end  # type: ignore[attr-defined]
    yield start
    for index in range(len(processes)):
        end(index)


def test_hosts_get_the_commit_that_the_driver_pinned_with_one_download_each(hub, host):
    driver, worker = host("driver"), host("worker")
    resolved = driver("hf:org/name@main")
    commit = hub.commit("org/name")
    assert json.loads(resolved["pin"])["reference"] == f"hf:org/name@{commit}"
    assert resolved["files"] == ["config.json", "model.safetensors"], "neither pickles nor the model card"

    assert worker(resolved["pin"])["files"] == resolved["files"]
    assert sum(each.startswith("GET cdn/") for each in hub.requests) == 2, "one download of the weights on each host"
    hub.requests.clear()
    hub.limited = True
    assert worker(resolved["pin"])["files"] == resolved["files"]
    assert hub.requests == [], "a host asks the hub once"

    # The branch moves on; a host without the pinned commit must not load the new one.
    hub.limited = False
    (hub.repositories["org/name"] / "config.json").write_text('{"new": 1}')
    assert f"no revision '{commit}'" in host("late")(resolved["pin"])["error"]
    changed = resolved["pin"].replace(commit, hub.commit("org/name"))
    assert "but the driver resolved sha256:" in worker(changed)["error"]


def test_the_settings_of_a_model_are_downloaded_without_its_weights(hub, host):
    pin = host("driver")("hf:org/name")["pin"]
    hub.requests.clear()
    ingress = host("ingress")
    assert ingress(f"settings {pin}")["files"] == ["config.json"]
    assert not [each for each in hub.requests if each.startswith("GET cdn/")]
    assert ingress(pin)["files"] == ["config.json", "model.safetensors"], "a replica on this host gets the weights"


def test_models_that_parcelray_downloaded_are_limited_and_others_are_kept(hub, host, tmp_path):
    names = ["org/name", "org/second", "org/third"]
    for name in names[1:]:
        hub.repositories[name] = tmp_path / name
        shutil.copytree(hub.repositories["org/name"], tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps({"name": name}))
    cache = tmp_path / "host" / "hf" / "hub"
    own = cache / "models--own--model" / "snapshots" / ("0" * 40)
    own.mkdir(parents=True)
    (own / "model.safetensors").write_bytes(bytes(10 * LARGE))
    # Each model has 4 bytes for each of its `LARGE` numbers.
    limited = {"PARCELRAY_MODEL_CACHE_GB": str(9 * LARGE / 1e9)}
    host("host", **limited)(f"hf:{names[0]}")
    user = host("host", **limited)
    user(f"hf:{names[1]}")
    host.end(0)
    user(f"hf:{names[2]}")
    present = {path.name for path in cache.glob("models--*")}
    assert present == {"models--own--model", "models--org--second", "models--org--third"}, "the oldest unused one went"


def test_refusals_of_the_hub_are_one_sentence(hub, host):
    ask = host("host")
    assert "neither a local folder nor an accessible Hugging Face model" in ask("hf:org/none")["error"]
    assert "has no revision 'v2'" in ask("org/name@v2")["error"]
    hub.gated.add("org/name")
    assert "is gated: accept its licence" in ask("org/name")["error"]
