"""Pinned models on a host: one download per content, verified, locked, and limited in size."""

import os
import pickle
import subprocess
import sys

import fsspec
import pytest
import torch
from safetensors.torch import save_file

from parcelray.errors import SystemFailure, UserError
from parcelray.models import host_cache
from parcelray.models.checkpoint import ModelPin, open_pin, open_settings, resolve_checkpoint
from parcelray.models.host_cache import cache_root
from parcelray.models.manifest import write_manifest

SIZE = 40_000


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "parcelray" / "models"
    release()


def release():
    """Ends the use of all entries by this process."""
    for lock in host_cache._held.values():
        os.close(lock)
    host_cache._held.clear()


@pytest.fixture(autouse=True)
def bucket():
    """Object storage in this process."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    return filesystem


def model_folder(path, value):
    """Writes a model of about 40 kB with a manifest."""
    (path / "extra").mkdir(parents=True)
    save_file({"weight": torch.full((SIZE // 4,), float(value))}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    (path / "extra" / "chat.jinja").write_text("hello")
    write_manifest(path, config={}, git_commit=None, data={}, seed=0)
    return path


def stored_model(bucket, tmp_path, value):
    """Stores a model at a URI."""
    bucket.put(f"{model_folder(tmp_path / f'made-{value}', value)}/", f"/bucket/{value}/model/", recursive=True)
    return f"memory://bucket/{value}/model"


def test_a_uri_is_downloaded_once_and_its_pin_is_opened_from_the_cache(bucket, tmp_path, cache):
    uri = stored_model(bucket, tmp_path, 1)
    resolved = resolve_checkpoint(uri)
    assert resolved.path == cache / resolved.pin.digest.replace(":", "-")
    assert resolved.pin.reference == uri
    assert resolved.pinned == resolve_checkpoint(tmp_path / "made-1").pinned
    pin = pickle.loads(pickle.dumps(resolved.pin))
    bucket.store.clear()
    assert open_pin(pin) == resolved.path


def test_a_damaged_entry_is_downloaded_again(bucket, tmp_path):
    resolved = resolve_checkpoint(stored_model(bucket, tmp_path, 1))
    weights = resolved.path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert open_pin(resolved.pin) == resolved.path
    assert weights.read_bytes() == (tmp_path / "made-1" / "model.safetensors").read_bytes()


def test_files_that_differ_from_their_manifest_are_refused_and_not_kept(bucket, tmp_path, cache):
    uri = stored_model(bucket, tmp_path, 1)
    bucket.pipe_file("/bucket/1/model/config.json", b"[]")
    with pytest.raises(UserError, match=r"config\.json in .* has SHA-256"):
        resolve_checkpoint(uri)
    assert not [path for path in cache.glob("sha256-*") if path.is_dir()]


def test_a_model_that_changed_after_it_was_pinned_is_refused(bucket, tmp_path):
    uri = stored_model(bucket, tmp_path, 1)
    pin = ModelPin(reference=uri, digest="sha256:" + "0" * 64)
    with pytest.raises(UserError, match=f"{uri} has the digest sha256:.*, but the driver resolved sha256:000"):
        open_pin(pin)


def test_the_settings_of_a_model_are_opened_without_its_weights(bucket, tmp_path):
    uri = stored_model(bucket, tmp_path, 1)
    pin = resolve_checkpoint(tmp_path / "made-1").pin.model_copy(update={"reference": uri})
    bucket.rm_file("/bucket/1/model/model.safetensors")
    folder = open_settings(pin)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert names == ["config.json", "extra/chat.jinja", "manifest.json"]
    bucket.store.clear()
    assert open_settings(pin) == folder, "they are downloaded once"


def test_settings_that_changed_are_refused(bucket, tmp_path):
    uri = stored_model(bucket, tmp_path, 1)
    pin = resolve_checkpoint(tmp_path / "made-1").pin.model_copy(update={"reference": uri})
    with pytest.raises(UserError, match="but the driver resolved sha256:000"):
        open_settings(pin.model_copy(update={"digest": "sha256:" + "0" * 64}))
    bucket.pipe_file("/bucket/1/model/config.json", b"[]")
    with pytest.raises(UserError, match=f"config.json of {uri} differs from its manifest"):
        open_settings(pin)


def test_a_host_with_the_whole_model_opens_its_settings_there(bucket, tmp_path):
    resolved = resolve_checkpoint(stored_model(bucket, tmp_path, 1))
    assert open_settings(resolved.pin) == resolved.path
    folder = resolve_checkpoint(model_folder(tmp_path / "model", 2))
    assert open_settings(folder.pin) == folder.path


def test_a_folder_must_have_the_pinned_content_on_each_host(tmp_path):
    folder = model_folder(tmp_path / "model", 1)
    pin = resolve_checkpoint(folder).pin
    assert pin == ModelPin(reference=str(folder), digest=pin.digest)
    assert open_pin(pin) == folder
    other = resolve_checkpoint(model_folder(tmp_path / "other", 2)).pin
    with pytest.raises(UserError, match="give every host the same files"):
        open_pin(pin.model_copy(update={"digest": other.digest}))
    with pytest.raises(UserError, match=f"nowhere does not exist on the host {os.uname().nodename}; copy it to"):
        open_pin(pin.model_copy(update={"reference": "/nowhere"}))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("memory://bucket/none/model", r"has no manifest\.json"),
        ("nosuch://bucket/model", "nosuch://bucket/model is not storage"),
        ("file:///nowhere/model", "neither an existing folder nor"),
    ],
)
def test_a_uri_without_a_model_is_refused(uri, message):
    with pytest.raises(UserError, match=message):
        resolve_checkpoint(uri)


def test_a_manifest_cannot_write_outside_its_folder(bucket, tmp_path):
    uri = stored_model(bucket, tmp_path, 1)
    path = "/bucket/1/model/manifest.json"
    bucket.pipe_file(path, bucket.cat_file(path).replace(b'"config.json"', b'"../config.json"'))
    with pytest.raises(UserError, match=r"lists \.\./config\.json, which is outside"):
        resolve_checkpoint(uri)


def test_the_cache_removes_the_longest_unused_entries_but_none_in_use(bucket, tmp_path, cache, monkeypatch):
    monkeypatch.setenv(host_cache.LIMIT_VARIABLE, str(2.5 * SIZE / 1e9))
    first, second = (resolve_checkpoint(stored_model(bucket, tmp_path, value)) for value in (1, 2))
    release()
    os.utime(first.path.with_suffix(".lock"), (1, 1))
    third = resolve_checkpoint(stored_model(bucket, tmp_path, 3))
    assert (first.path.exists(), second.path.exists(), third.path.exists()) == (False, True, True)
    assert open_pin(second.pin) == second.path
    resolve_checkpoint(stored_model(bucket, tmp_path, 4))
    assert (second.path.exists(), third.path.exists()) == (True, True)


@pytest.mark.parametrize(
    ("limit", "message"),
    [("0.00001", "is limited to .*; set PARCELRAY_MODEL_CACHE_GB"), ("much", "PARCELRAY_MODEL_CACHE_GB is 'much'")],
)
def test_a_model_larger_than_the_cache_and_an_illegal_limit_are_refused(bucket, tmp_path, monkeypatch, limit, message):
    monkeypatch.setenv(host_cache.LIMIT_VARIABLE, limit)
    with pytest.raises(UserError, match=message):
        resolve_checkpoint(stored_model(bucket, tmp_path, 1))


def test_a_full_disk_is_one_sentence(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(SystemFailure, match=r"needs 0\.0 GB, but the disk of"):
        resolve_checkpoint(stored_model(bucket, tmp_path, 1))


def test_other_processes_wait_for_a_download_and_report_it(bucket, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(host_cache, "_REPORT_S", 0.0)
    uri = stored_model(bucket, tmp_path, 1)
    entry = cache / resolve_checkpoint(tmp_path / "made-1").pin.digest.replace(":", "-")
    entry.parent.mkdir(parents=True, exist_ok=True)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX);"
            " print('held', flush=True); sys.stdin.read()",
            str(entry.with_suffix(".lock")),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    stdin, stdout = holder.stdin, holder.stdout
    assert stdin is not None
    assert stdout is not None
    assert stdout.readline() == "held\n"
    states = []

    def on_progress(state):
        states.append(state)
        stdin.close()

    resolved = resolve_checkpoint(uri, on_progress=on_progress)
    holder.wait()
    stdout.close()
    assert resolved.path == entry
    assert states[0] == f"downloading {uri} to {os.uname().nodename}: 0.00 of 0.00 GB"


def test_an_unchanged_folder_is_read_once(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "model", 1)
    monkeypatch.setattr(host_cache, "_SETTLED_NS", -1)
    first = resolve_checkpoint(folder)
    with monkeypatch.context() as patch:
        patch.setattr("parcelray.models.manifest._sha256", lambda path: pytest.fail("the files were read again"))
        assert resolve_checkpoint(folder) == first
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json in .* has SHA-256"):
        resolve_checkpoint(folder)


def test_a_young_file_is_always_read_again(tmp_path):
    folder = model_folder(tmp_path / "model", 1)
    resolve_checkpoint(folder)
    assert not (cache_root() / "digests").exists()
