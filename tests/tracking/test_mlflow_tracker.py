import signal
import subprocess
import sys
import textwrap

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

from parcelray.errors import SystemFailure, UserError
from parcelray.tracking.mlflow_tracker import MlflowRunLogger, end_run, start_run, tracked_run

from ..stores import new_store

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload``:DeprecationWarning")

# A driver that records five steps, starts a child run, prints `ready`, and waits until it is killed or stdin closes.
DRIVER = textwrap.dedent("""
    import sys
    from parcelray.tracking.mlflow_tracker import MlflowRunLogger, start_run, tracked_run
    uri, identity = sys.argv[1:]
    with tracked_run(uri, identity, identity, params={"lr": 0.1}) as run_id:
        start_run(uri, identity, "trial-0", params={}, parent_run_id=run_id)
        tracker = MlflowRunLogger(uri, run_id)
        for step in range(5):
            tracker.log_metrics({"train/loss": 1.0 / (step + 1)}, step)
        tracker.flush()
        tracker.log_metrics({"train/loss": 0.0}, 5)
        print("ready", flush=True)
        sys.stdin.read()
""")


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return new_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def client(uri):
    return MlflowClient(tracking_uri=uri)


def statuses(client, experiment):
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return {run.info.run_name: run.info.status for run in runs}


def steps(client, run_id, key="train/loss"):
    return [metric.step for metric in client.get_metric_history(run_id, key)]


def test_a_run_has_its_params_tags_and_parent_and_ends_finished(uri, client):
    params = {f"p{i}": i for i in range(230)} | {"note": "x" * 7000, "api_key": "hunter2"}
    with (
        tracked_run(uri, "basic", "tune-a-00000000", params={}) as parent,
        tracked_run(
            uri,
            "basic",
            "train-a-11111111",
            params=params,
            tags={"parcel.config_hash": "11111111"},
            parent_run_id=parent,
        ) as run_id,
    ):
        assert client.get_run(run_id).info.status == "RUNNING"
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert len(run.data.params) == 232
    assert run.data.params["p229"] == "229"
    assert len(run.data.params["note"]) == 6000
    assert run.data.params["api_key"] == "<redacted>"
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.tags["parcel.attempt"] == "1"
    assert run.data.tags["parcel.config_hash"] == "11111111"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("x"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(143), "KILLED"),
        (SystemExit(1), "FAILED"),
        (SystemExit(0), "FINISHED"),
    ],
)
def test_a_run_ends_with_the_status_of_its_exception(uri, client, error, status):
    with pytest.raises(type(error)), tracked_run(uri, "ends", f"run-{error!r}".replace("'", ""), params={}) as run_id:
        raise error
    assert client.get_run(run_id).info.status == status


@pytest.mark.parametrize("replaced", [SystemExit(1), SystemExit(0), RuntimeError("interrupted")])
def test_sigterm_kills_the_run_even_if_the_interrupted_call_replaces_the_exception(uri, client, replaced):
    def interrupted():
        try:
            signal.raise_signal(signal.SIGTERM)
        except SystemExit:
            # As `ray.get` does.
            raise replaced from None

    name = f"sigterm-{type(replaced).__name__}-{replaced}"
    with pytest.raises(SystemExit) as stop, tracked_run(uri, "ends", name, params={}) as run_id:
        interrupted()
    assert stop.value.code == 143
    assert client.get_run(run_id).info.status == "KILLED"


def test_the_signal_handler_is_restored(uri):
    before = signal.getsignal(signal.SIGTERM)
    with tracked_run(uri, "ends", "handler", params={}):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_same_identity_resumes_the_same_run_and_keeps_its_first_params(uri, client):
    first = start_run(uri, "resume", "train-b-22222222", params={"lr": 0.1, "steps": 10})
    end_run(uri, first, "FAILED")
    second = start_run(uri, "resume", "train-b-22222222", params={"lr": 0.2, "steps": 10, "new": "x"})
    run = client.get_run(second)
    assert second == first
    assert run.info.status == "RUNNING"
    assert run.data.params == {"lr": "0.1", "steps": "10", "new": "x"}
    assert {key: value for key, value in run.data.tags.items() if key.startswith("resume.")} == {"resume.1.lr": "0.2"}
    assert run.data.tags["parcel.attempt"] == "2"
    end_run(uri, second, "FINISHED")


def test_the_same_name_under_another_parent_is_another_run(uri):
    parents = [start_run(uri, "nested", f"tune-{i}", params={}) for i in range(2)]
    children = {start_run(uri, "nested", "trial-0", params={}, parent_run_id=parent) for parent in parents}
    assert len(children) == 2


def test_ending_a_run_closes_its_children(uri, client):
    parent = start_run(uri, "family", "tune-c", params={})
    child = start_run(uri, "family", "trial-0", params={}, parent_run_id=parent)
    start_run(uri, "family", "evaluate-0", params={}, parent_run_id=child)
    end_run(uri, parent, "FINISHED")
    assert statuses(client, "family") == {"tune-c": "FINISHED", "trial-0": "KILLED", "evaluate-0": "KILLED"}


def test_metrics_are_buffered_and_never_recorded_twice(uri, client):
    run_id = start_run(uri, "metrics", "train-d", params={})
    tracker = MlflowRunLogger(uri, run_id, flush_every=3, flush_seconds=1000)
    tracker.log_metrics({"train/loss": 1.0}, 0)
    tracker.log_metrics({"train/loss": 0.9, "val/nlvr/accuracy@64": 0.5}, 1)
    assert steps(client, run_id) == []
    tracker.log_metrics({"train/loss": 0.8}, 2)
    assert steps(client, run_id) == [0, 1, 2]
    tracker.log_metrics({"train/loss": 0.7}, 3)
    tracker.close()
    assert steps(client, run_id) == [0, 1, 2, 3]
    assert steps(client, run_id, "val/nlvr/accuracy:64") == [1]

    resumed = MlflowRunLogger(uri, run_id)
    for step in range(2, 6):
        resumed.log_metrics({"train/loss": 0.5, "train/lr": 0.1}, step)
    resumed.flush()
    assert steps(client, run_id) == [0, 1, 2, 3, 4, 5]
    assert steps(client, run_id, "train/lr") == [2, 3, 4, 5]
    end_run(uri, run_id, "FINISHED")


def test_metrics_of_several_batches_are_sent(uri, client):
    run_id = start_run(uri, "metrics", "train-e", params={})
    tracker = MlflowRunLogger(uri, run_id)
    tracker.log_metrics({f"m{i}": float(i) for i in range(2500)}, 0)
    tracker.flush()
    assert len(client.get_run(run_id).data.metrics) == 2500


def unreachable(tracker, client, error):
    """Replaces the client of a tracker by one that fails with the error."""
    tracker._client = store = _UnreachableStore(client, error)
    return store


class _UnreachableStore:
    """A client of a store that fails with an error until `error` is None, like that of a server that restarts."""

    def __init__(self, client, error):
        self._client, self.error, self.attempts = client, error, 0

    def __getattr__(self, name):
        self.attempts += 1
        if self.error is not None:
            raise self.error
        return getattr(self._client, name)


def away():
    return MlflowException("API request to http://127.0.0.1:5000 failed with exception: connection refused")


def test_metrics_of_an_outage_are_kept_also_at_checkpoints_and_sent_later(uri, client):
    run_id = start_run(uri, "outage", "train-outage", params={})
    tracker = MlflowRunLogger(uri, run_id, flush_every=1)
    store = unreachable(tracker, client, away())
    tracker.log_metrics({"train/loss": 0.5}, 1)
    tracker.log_metrics({"train/loss": 0.4}, 2)
    assert [(key, value, step) for key, value, _, step in tracker.flush()] == [
        ("train/loss", 0.5, 1),
        ("train/loss", 0.4, 2),
    ]
    assert store.attempts == 1, "a training does not wait at every step for a store that does not answer"

    unsent = tracker.flush()
    resumed = MlflowRunLogger(uri, run_id, flush_every=1)
    resumed.restore(unsent)
    resumed.log_metrics({"train/loss": 0.3}, 3)
    assert steps(client, run_id) == [1, 2, 3]

    # The first process was alive after all, and its server answers again.
    store.error = None
    tracker.log_metrics({"train/loss": 0.3}, 3)
    tracker.close()
    assert steps(client, run_id) == [1, 2, 3]


def test_the_end_of_a_run_waits_for_the_store(uri, client, monkeypatch):
    run_id = start_run(uri, "outage", "train-wait", params={})
    tracker = MlflowRunLogger(uri, run_id)
    store = unreachable(tracker, client, away())
    tracker.log_metrics({"train/loss": 0.5}, 1)

    def sleep(seconds):
        if store.attempts == 3:
            store.error = None

    monkeypatch.setattr("parcelray.tracking.mlflow_tracker.time.sleep", sleep)
    tracker.close()
    assert steps(client, run_id) == [1]

    store.error = away()
    tracker.log_metrics({"train/loss": 0.4}, 2)
    monkeypatch.setattr("parcelray.tracking.mlflow_tracker.CLOSE_LIMIT_S", -1.0)
    with pytest.raises(SystemFailure, match="does not have 1 metrics of run"):
        tracker.close()


def test_a_store_that_rejects_the_metrics_is_reported_at_once(uri, client):
    run_id = start_run(uri, "outage", "train-rejected", params={})
    tracker = MlflowRunLogger(uri, run_id)
    unreachable(tracker, client, MlflowException("no permission", PERMISSION_DENIED))
    tracker.log_metrics({"train/loss": 0.5}, 1)
    with pytest.raises(SystemFailure, match="rejects the metrics"):
        tracker.flush()


def test_artifacts_and_figures_are_uploaded(uri, client, tmp_path):
    run_id = start_run(uri, "files", "train-f", params={})
    tracker = MlflowRunLogger(uri, run_id)
    (tmp_path / "frontier.png").write_bytes(b"png")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "index.html").write_text("<p>")
    tracker.log_figure_file(tmp_path / "frontier.png")
    tracker.log_artifact(tmp_path / "report")
    assert [item.path for item in client.list_artifacts(run_id, "figures")] == ["figures/frontier.png"]
    assert [item.path for item in client.list_artifacts(run_id, "report")] == ["report/index.html"]
    with pytest.raises(UserError, match="no such file"):
        tracker.log_artifact(tmp_path / "missing")


def test_run_names_with_quotes_are_refused(uri):
    with pytest.raises(UserError, match="quotes"):
        start_run(uri, "names", "it's", params={})


@pytest.mark.slow
def test_after_killed_drivers_no_run_stays_running_and_no_metric_is_recorded_twice(uri, client):
    names = ("killed", "terminated")
    drivers = [
        subprocess.Popen(
            [sys.executable, "-c", DRIVER, uri, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in names
    ]
    for driver in drivers:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "ready\n"
    with pytest.raises(UserError, match="in progress, driven by the process"):
        start_run(uri, "killed", "killed", params={})
    drivers[0].kill()
    drivers[1].terminate()
    assert [driver.wait(120) for driver in drivers] == [-signal.SIGKILL, 143]
    for driver in drivers:
        driver.communicate()
    assert statuses(client, "killed") == {"killed": "RUNNING", "trial-0": "RUNNING"}
    assert statuses(client, "terminated") == {"terminated": "KILLED", "trial-0": "KILLED"}

    with tracked_run(uri, "killed", "killed", params={"lr": 0.1}) as run_id:
        assert statuses(client, "killed") == {"killed": "RUNNING", "trial-0": "KILLED"}
        tracker = MlflowRunLogger(uri, run_id)
        for step in range(3, 8):
            tracker.log_metrics({"train/loss": 0.0}, step)
        tracker.close()
    assert statuses(client, "killed") == {"killed": "FINISHED", "trial-0": "KILLED"}
    assert steps(client, run_id) == list(range(8))
    assert client.get_run(run_id).data.tags["parcel.attempt"] == "2"
