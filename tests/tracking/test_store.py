import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, PERMISSION_DENIED, RESOURCE_DOES_NOT_EXIST, UNAUTHENTICATED

from parcelray.errors import SystemFailure, UserError
from parcelray.tracking.store import (
    BATCH_BYTES,
    MAX_PARAM,
    MAX_TAG,
    REDACTED,
    artifact_location,
    batches,
    check_tracking_uri,
    clean_key,
    clean_params,
    clean_tags,
    ensure_store,
    explained_store_failures,
    hide_credentials,
    is_secret_key,
)

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload``:DeprecationWarning")


@pytest.mark.parametrize(
    ("uri", "num_nodes"),
    [
        ("sqlite:///runs/mlflow.db", 1),
        ("sqlite:////srv/mlflow.db", 1),
        ("http://127.0.0.1:5000", 8),
        ("https://mlflow.example", 1),
        ("postgresql+psycopg2://u:p@db/mlflow", 4),
    ],
)
def test_legal_tracking_uris_pass(uri, num_nodes):
    check_tracking_uri(uri, num_nodes)


@pytest.mark.parametrize(
    ("uri", "num_nodes", "says"),
    [
        ("file:///srv/mlruns", 1, "sqlite:///runs/mlflow.db"),
        ("./mlruns", 1, "migrate-filestore"),
        ("", 1, "file store"),
        ("sqlite:///runs/mlflow.db", 2, "2 nodes"),
        ("sqlite://", 1, "no database file"),
        ("sqlite:///:memory:", 1, "no database file"),
        ("redis://u:hunter2@db", 1, "unknown scheme 'redis'"),
    ],
)
def test_tracking_uris_that_are_not_legal_are_refused_with_a_remedy(uri, num_nodes, says):
    with pytest.raises(UserError, match=says.replace("///", "/+")) as caught:
        check_tracking_uri(uri, num_nodes)
    assert "hunter2" not in str(caught.value)


def test_the_store_is_created_and_its_uri_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uri = ensure_store("sqlite:///runs/mlflow.db")
    assert uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert (tmp_path / "runs" / "mlflow.db").stat().st_size > 0
    monkeypatch.chdir("/")
    assert ensure_store(uri) == uri
    assert sorted(os.listdir(tmp_path)) == ["runs"], "nothing is written outside the folder of the store"


def test_artifacts_of_a_database_are_next_to_it_and_a_server_decides_itself(tmp_path):
    assert (
        artifact_location(f"sqlite:///{tmp_path}/mlflow.db", "paper 224/a")
        == f"file://{tmp_path}/artifacts/paper_224_a"
    )
    assert artifact_location("http://127.0.0.1:5000", "paper") is None


def test_credentials_in_urls_are_masked():
    assert hide_credentials("postgresql://me:hunter2@db:5432/x") == "postgresql://***@db:5432/x"
    assert hide_credentials("sqlite:///runs/mlflow.db") == "sqlite:///runs/mlflow.db"


@pytest.mark.parametrize(
    "key", ["hf_token", "HF_TOKEN", "serving.api_key", "apiKey", "aws_secret_access_key", "db/password", "credentials"]
)
def test_keys_of_secrets_are_recognised(key):
    assert is_secret_key(key)


@pytest.mark.parametrize(
    "key", ["num_visual_tokens", "connector.keys", "tokenizer", "monkey", "max_new_tokens", "keystone"]
)
def test_parcelrays_own_parameters_are_not_secrets(key):
    assert not is_secret_key(key)


def test_secrets_and_credentials_in_urls_are_masked_and_numbers_are_kept():
    assert clean_params(
        {"hf_token": "abc", "image_token": 7, "uri": "https://me:pw@host/x", "lr": 0.1, "seed": None, "amp": True}
    ) == {
        "hf_token": REDACTED,
        "image_token": "7",
        "uri": "https://***@host/x",
        "lr": "0.1",
        "seed": "None",
        "amp": "True",
    }


def test_values_are_cut_to_mlflows_limits():
    assert len(clean_params({"a": "x" * 9000})["a"]) == MAX_PARAM == 6000
    assert len(clean_tags({"a": "x" * 9000})["a"]) == MAX_TAG == 8000


def test_characters_that_mlflow_refuses_are_replaced_in_keys():
    assert clean_key("val/nlvr/accuracy@64") == "val/nlvr/accuracy:64"
    assert clean_key("loss(mean)") == "loss_mean_"
    assert len(clean_key("k" * 400)) == 250


def test_batches_are_within_the_limits_of_count_and_bytes():
    entries = [(f"k{i}", "v") for i in range(250)]
    cut = list(batches(entries, 100))
    assert [len(batch) for batch in cut] == [100, 100, 50]
    assert [entry for batch in cut for entry in batch] == entries
    # 6,000 characters outside ASCII are 36,000 bytes of JSON.
    assert [len(batch) for batch in batches([(str(i), "\u00e9" * 6000) for i in range(30)], 100)] == [
        BATCH_BYTES // 36_000 - 1,
        6,
    ]
    assert list(batches([], 100)) == []


class _Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_a_server_that_starts_a_little_later_is_waited_for(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Health, bind_and_activate=False)
    server.server_bind()
    uri = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)

    def start(seconds):
        if not thread.is_alive():
            server.server_activate()
            thread.start()

    monkeypatch.setattr("parcelray.tracking.store.time.sleep", start)
    assert ensure_store(uri) == uri
    server.shutdown()
    server.server_close()

    monkeypatch.setattr("parcelray.tracking.store.SERVER_LIMIT_S", -1.0)
    assert ensure_store(uri) == uri, "a process waits only once; MLflow's client retries its requests"
    with pytest.raises(SystemFailure, match=r"has not answered .*; check tracking\.uri"):
        ensure_store(f"{uri}/other")


@pytest.mark.parametrize(
    ("code", "raised", "words"),
    [
        (INTERNAL_ERROR, SystemFailure, "does not answer"),
        (UNAUTHENTICATED, UserError, "rejects this user .401.; set MLFLOW_TRACKING_USERNAME"),
        (PERMISSION_DENIED, UserError, "rejects this user .403."),
        (RESOURCE_DOES_NOT_EXIST, MlflowException, "^gone$"),
    ],
)
def test_failures_of_a_server_are_explained(code, raised, words):
    with pytest.raises(raised, match=words), explained_store_failures("https://mlflow.example"):
        raise MlflowException("gone", code)
