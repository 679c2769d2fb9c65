"""Checks of `--security`: each failure is provoked, and each has a remedy."""

from pathlib import Path

import pytest

from parcelray.doctor import security
from parcelray.serving.http.auth import add_key

from .test_machine import _is

_HEADER = "  sl  local_address rem_address   st tx_queue rx_queue\n"


def _tables(folder: Path, *tcp: str, tcp6: str = "") -> Path:
    (folder / "tcp").write_text(_HEADER + "".join(f"   0: {line} 00000000:0000 0A 0:0 00\n" for line in tcp))
    if tcp6:
        (folder / "tcp6").write_text(f"{_HEADER}   0: {tcp6} {'0' * 32}:0000 0A 0:0 00\n")
    return folder


@pytest.mark.parametrize(
    ("tables", "status", "words"),
    [
        # 127.0.0.1:8265, and an unknown port on all addresses.
        ({"tcp": ["0100007F:2049", "00000000:1234"]}, "pass", []),
        ({"tcp": ["00000000:2049"]}, "fail", ["the Ray dashboard on 0.0.0.0:8265", "SSH tunnel"]),
        ({"tcp": ["0B00070A:1388"]}, "fail", ["MLflow on 10.7.0.11:5000"]),
        ({"tcp": ["00000000:1F40"]}, "warn", ["an endpoint on 0.0.0.0:8000", "http.keys_file"]),
        ({"tcp": [], "tcp6": f"{'0' * 32}:2711"}, "fail", ["the Ray client server on :::10001"]),
        ({"tcp": [], "tcp6": f"{'0' * 24}01000000:2711"}, "pass", []),
    ],
)
def test_programs_that_other_machines_can_reach(
    tmp_path: Path, tables: dict[str, list[str] | str], status: str, words: list[str]
) -> None:
    net = _tables(tmp_path, *tables["tcp"], tcp6=str(tables.get("tcp6", "")))
    _is(security.check_binds((8000,), net), status, *words)


def test_files_that_other_users_can_read_or_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN_PATH", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    runs, keys, token = tmp_path / "runs", tmp_path / "keys.txt", tmp_path / ".ray" / "auth_token"
    for folder in (runs, token.parent):
        folder.mkdir(mode=0o755)
    for file in (keys, token):
        file.touch()
    keys.chmod(0o644)
    token.chmod(0o600)
    _is(security.check_modes(keys, str(runs)), "pass")
    _is(security.check_modes(keys, "s3://bucket/runs"), "pass")
    for path, mode, command in ((token, 0o644, "go="), (keys, 0o664, "go-w"), (runs, 0o777, "go-w")):
        before = path.stat().st_mode
        path.chmod(mode)
        _is(security.check_modes(keys, str(runs)), "fail", str(path), f"chmod {command} {path}")
        path.chmod(before)


def test_the_file_of_api_keys(tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    _is(security.check_keys(keys), "skip")
    add_key(keys, "alice")
    _is(security.check_keys(keys), "pass", "keys.txt: 1, as hashes")
    keys.write_text("my plain key\n")
    _is(security.check_keys(keys), "fail", "line 1", "parcelray keys add")


@pytest.mark.parametrize(
    "text", ["token: hf_" + "a1B2" * 9, "tracking: {uri: 'https://user:password@mlflow.example.com'}"]
)
def test_secrets_in_job_files(tmp_path: Path, text: str) -> None:
    safe, unsafe = tmp_path / "safe.yaml", tmp_path / "unsafe.yaml"
    safe.write_text("tracking: {uri: 'https://mlflow.example.com:5000'}")
    unsafe.write_text(text)
    _is(security.check_secrets([safe, tmp_path / "none.yaml"]), "pass", "none in 1 job files")
    _is(security.check_secrets([safe, unsafe]), "fail", "unsafe.yaml", "environment variable")


def test_authentication_that_is_switched_off() -> None:
    _is(security.check_token_mode({}), "pass")
    _is(security.check_token_mode({"RAY_AUTH_MODE": "disabled"}), "fail", "unset RAY_AUTH_MODE")


def test_versions_with_known_vulnerabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    _is(security.check_vulnerabilities(), "pass")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.9.1")
    _is(security.check_vulnerabilities(), "fail", "ray 2.9.1 is older than 2.54", "requirements.lock")
