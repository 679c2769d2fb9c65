import os

import pytest

from parcelray.errors import UserError
from parcelray.tracking.store import artifact_location, check_tracking_uri, ensure_store, hide_credentials

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
def test_illegal_tracking_uris_are_refused_with_a_remedy(uri, num_nodes, says):
    with pytest.raises(UserError, match=says.replace("///", "/+")) as caught:
        check_tracking_uri(uri, num_nodes)
    assert "hunter2" not in str(caught.value)


def test_the_store_is_created_once_and_its_uri_does_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uri = ensure_store("sqlite:///runs/mlflow.db")
    assert uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert (tmp_path / "runs" / "mlflow.db").stat().st_size > 0
    monkeypatch.chdir("/")
    assert ensure_store(uri) == uri
    assert sorted(os.listdir(tmp_path)) == ["runs"], "nothing is written beside the store"


def test_artifacts_lie_beside_a_database_and_a_server_decides_for_itself(tmp_path):
    assert (
        artifact_location(f"sqlite:///{tmp_path}/mlflow.db", "paper 224/a")
        == f"file://{tmp_path}/artifacts/paper_224_a"
    )
    assert artifact_location("http://127.0.0.1:5000", "paper") is None


def test_credentials_in_urls_are_masked():
    assert hide_credentials("postgresql://me:hunter2@db:5432/x") == "postgresql://***@db:5432/x"
    assert hide_credentials("sqlite:///runs/mlflow.db") == "sqlite:///runs/mlflow.db"
