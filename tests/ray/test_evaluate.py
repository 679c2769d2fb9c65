"""The evaluation pass: every answer there once, whatever dies on the way."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from parcelray.benchmarks.mini.reader import MiniReader
from parcelray.benchmarks.reader import Problem, RowSamples
from parcelray.errors import SystemFailure, UnsupportedBudgetError
from parcelray.evaluation.bundles import BenchmarkPass, BenchmarkTask, EvaluatedModel, PassSettings
from parcelray.evaluation.evaluate import run_pass
from parcelray.evaluation.generation import GenerationSettings
from parcelray.evaluation.predictor import BLIND, Predictor
from parcelray.evaluation.store import Prediction, PredictionStore
from parcelray.models.processor import load_processor
from parcelray.models.vlm import load_vlm
from parcelray.training.start import build_start

from ..training.conftest import tiny_job

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::ResourceWarning")]

BUDGETS = (BLIND, 16, 64)
READER = MiniReader("test", ("general", "video"), samples=24)
GENERATION = GenerationSettings(max_new_tokens=6)
SMALL = PassSettings(rows_per_bundle=6, cpus_per_actor=0.5)
ANSWERS = 48 * len(BUDGETS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model, processor = build_start(tiny_job(folder), None)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _model(checkpoint: Path, store: Path, budgets: tuple[int, ...] = BUDGETS) -> EvaluatedModel:
    return EvaluatedModel(checkpoint, "tiny", "digest", budgets, str(store))


def _pass(checkpoint: Path, store: Path, reader: MiniReader = READER, settings: PassSettings = SMALL, **changes) -> BenchmarkPass:
    rows = changes.pop("rows", reader.order())
    budgets = changes.pop("budgets", BUDGETS)
    return run_pass([BenchmarkTask(reader, rows, GENERATION)], _model(checkpoint, store, budgets), settings=settings, **changes)["mini"]


def _answers(store: Path) -> dict[tuple[str, int], Prediction]:
    """By sample and budget, all that are stored."""
    keys = PredictionStore(str(store)).keys("mini", "digest")
    found = PredictionStore(str(store)).read("mini", "digest", keys).values()
    assert all(prediction.mean_log_prob is not None for prediction in found)
    # The last digits of a confidence hang on who shares a batch, which a disturbed pass changes; what was said does not.
    said = (dataclasses.replace(prediction, mean_log_prob=None, entropy=None) for prediction in found)
    answers = {(prediction.sample_id, prediction.num_visual_tokens): prediction for prediction in said}
    assert len(answers) == len(keys)
    return answers


@pytest.fixture(scope="module")
def undisturbed(ray_session: None, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Prediction]:
    store = tmp_path_factory.mktemp("undisturbed")
    progress: list[int] = []
    result = _pass(checkpoint, store, on_progress=lambda name, rows, total: progress.append(rows))
    assert (result.computed, result.present) == (ANSWERS, 0)
    assert [record.sample.id for record in result.asked.records] == [READER.read(row).samples[0].id for row in READER.order()]
    assert progress == sorted(progress)
    assert progress[-1] == 48
    answers = _answers(store)
    assert {record.keys[16] for record in result.asked.records} == {prediction.key for (_, budget), prediction in answers.items() if budget == 16}
    return answers


def test_the_pass_answers_as_a_plain_loop_does(undisturbed: dict[tuple[str, int], Prediction], checkpoint: Path) -> None:
    samples = [READER.read(row).samples[0] for row in READER.order()]
    predictor = Predictor(load_vlm(checkpoint).eval(), load_processor(checkpoint), settings=GENERATION, batch_size=1)
    expected = {
        (sample.id, budget): text for budget, texts in predictor.generate_budgets(samples, BUDGETS).items() for sample, text in zip(samples, texts, strict=True)
    }
    assert {place: prediction.text for place, prediction in undisturbed.items()} == expected


def test_only_what_is_missing_is_computed(undisturbed: dict[tuple[str, int], Prediction], checkpoint: Path, tmp_path: Path) -> None:
    first = _pass(checkpoint, tmp_path, budgets=(16,), rows=range(25))
    assert (first.computed, first.present) == (25, 0)
    second = _pass(checkpoint, tmp_path, settings=PassSettings(rows_per_bundle=16, actors=2, cpus_per_actor=0.5))
    assert (second.computed, second.present) == (ANSWERS - 25, 25)
    assert _answers(tmp_path) == undisturbed
    third = _pass(checkpoint, tmp_path)
    assert (third.computed, third.present) == (0, ANSWERS)


@dataclass(frozen=True)
class Damaged(MiniReader):
    """Two rows that cannot be asked: one that the reader finds, and one with an image that cannot be decoded."""

    def read(self, row: int) -> RowSamples:
        """Reads, with damage."""
        found = super().read(row)
        if row == 3:
            return RowSamples((), (Problem("row 3", "no answer"),))
        if row == 7:
            return RowSamples((dataclasses.replace(found.samples[0], images=(b"no image",)),))
        return found


def test_what_cannot_be_asked_is_kept_apart(undisturbed: dict[tuple[str, int], Prediction], checkpoint: Path, tmp_path: Path) -> None:
    result = _pass(checkpoint, tmp_path, Damaged(**dataclasses.asdict(READER)))
    lost = READER.read(7).samples[0].id
    assert result.asked.problems[0] == Problem("row 3", "no answer")
    assert result.asked.problems[1].row == lost
    assert "cannot be decoded" in result.asked.problems[1].reason
    assert len(result.asked.records) == 46
    assert _answers(tmp_path) == {place: prediction for place, prediction in undisturbed.items() if place[0] not in (lost, READER.read(3).samples[0].id)}


def test_an_illegal_budget_is_the_users_error(ray_session: None, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedBudgetError, match="cannot give 8 visual tokens"):
        _pass(checkpoint, tmp_path, budgets=(8,))


@dataclass(frozen=True)
class KillsItsReader(MiniReader):
    """Kills the process that reads a certain row with SIGKILL, the first time only."""

    marker: str = ""

    def read(self, row: int) -> RowSamples:
        """Reads, or dies."""
        if row == 23 and not Path(self.marker).exists():
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(row)


def test_a_killed_reader_loses_nothing(undisturbed: dict[tuple[str, int], Prediction], checkpoint: Path, tmp_path: Path) -> None:
    reader = KillsItsReader(**dataclasses.asdict(READER), marker=str(tmp_path / "died"))
    result = _pass(checkpoint, tmp_path / "store", reader)
    assert (tmp_path / "died").exists()
    assert (result.computed, result.present) == (ANSWERS, 0)
    assert _answers(tmp_path / "store") == undisturbed


def _actor_processes() -> list[int]:
    """Processes of this test's own Ray, which its driver started, that answer."""
    children = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout.splitlines()
    rows = {int(line.split()[0]): (int(line.split()[1]), line) for line in children}

    def ours(process: int) -> bool:
        return process == os.getpid() or (process in rows and ours(rows[process][0]))

    return [process for process, (_, line) in rows.items() if "ray::MapWorker(MapBatches(_Answer" in line and ours(process)]


def test_a_killed_actor_loses_nothing(undisturbed: dict[tuple[str, int], Prediction], checkpoint: Path, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(name: str, rows: int, total: int) -> None:
        if not killed:
            killed.extend(_actor_processes())
            for process in killed:
                os.kill(process, signal.SIGKILL)

    result = _pass(checkpoint, tmp_path, settings=dataclasses.replace(SMALL, rows_per_bundle=2), on_progress=kill)
    assert killed
    # A bundle that was stored before its actor died is found again by nobody: it is answered once more, and takes its own place.
    assert result.computed == ANSWERS
    assert _answers(tmp_path) == undisturbed


@dataclass(frozen=True)
class Hangs(MiniReader):
    """Never gives a certain row."""

    def read(self, row: int) -> RowSamples:
        """Reads, or hangs."""
        if row == 23:
            time.sleep(3600)
        return super().read(row)


def test_a_hang_ends_with_the_stage(undisturbed: dict[tuple[str, int], Prediction], checkpoint: Path, tmp_path: Path) -> None:
    reader = Hangs(**dataclasses.asdict(READER))
    with pytest.raises(SystemFailure, match=r"No bundle was finished for 15 s \(\d of 8 are\); what runs is: reading rows 18 to 23 of mini"):
        _pass(checkpoint, tmp_path, reader, dataclasses.replace(SMALL, stall_s=15))
    assert len(_answers(tmp_path)) == 18 * len(BUDGETS)
    # The session is as usable as before.
    result = _pass(checkpoint, tmp_path)
    assert (result.computed, result.present) == (ANSWERS - 18 * 3, 18 * 3)


DRIVER = """
import sys
from pathlib import Path
from parcelray.benchmarks.mini.reader import MiniReader
from parcelray.cluster.session import ray_session
from parcelray.evaluation.bundles import BenchmarkTask, EvaluatedModel, PassSettings
from parcelray.evaluation.evaluate import run_pass
from parcelray.evaluation.generation import GenerationSettings

if __name__ == "__main__":
    checkpoint, store = sys.argv[1:]
    reader = MiniReader("test", ("general", "video"), samples=24)
    task = BenchmarkTask(reader, reader.order(), GenerationSettings(max_new_tokens=6))
    with ray_session("local"):
        run_pass([task], EvaluatedModel(Path(checkpoint), "tiny", "digest", (0, 16, 64), store), settings=PassSettings(rows_per_bundle=2))
"""


def test_a_killed_driver_loses_nothing(undisturbed: dict[tuple[str, int], Prediction], checkpoint: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(checkpoint), str(store)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(store.rglob("*.parquet"))) < 3 and time.monotonic() < deadline and driver.poll() is None:
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    kept = len(_answers(store))
    assert 0 < kept < ANSWERS
    result = _pass(checkpoint, store)
    # Actors of the killed driver may have stored a last bundle after it died.
    assert result.present >= kept
    assert result.computed + result.present == ANSWERS
    assert _answers(store) == undisturbed


CLUSTER = """
import sys, threading
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from parcelray.benchmarks.mini.reader import MiniReader
from parcelray.evaluation.bundles import BenchmarkTask, EvaluatedModel, PassSettings
from parcelray.evaluation.evaluate import run_pass
from parcelray.evaluation.generation import GenerationSettings

if __name__ == "__main__":
    checkpoint, store = sys.argv[1:]
    health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "_system_config": health, "include_dashboard": False})
    second = cluster.add_node(num_cpus=2)
    ray.init(cluster.address, log_to_driver=False)
    reader = MiniReader("test", ("general", "video"), samples=24)
    task = BenchmarkTask(reader, reader.order(), GenerationSettings(max_new_tokens=6))
    killed = []

    def kill(name, rows, total):
        if not killed:
            killed.append(True)
            cluster.remove_node(second, allow_graceful=False)

    settings = PassSettings(rows_per_bundle=2, actors=2, readers=2, cpus_per_actor=0.4)
    result = run_pass([task], EvaluatedModel(Path(checkpoint), "tiny", "digest", (0, 16, 64), store), settings=settings, on_progress=kill)["mini"]
    print("RESULT", result.computed, result.present, len(result.asked.records), bool(killed))
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.mark.slow
def test_a_killed_node_loses_nothing(undisturbed: dict[tuple[str, int], Prediction], checkpoint: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER, str(checkpoint), str(tmp_path)], capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    assert f"RESULT {ANSWERS} 0 48 True" in done.stdout, done.stderr[-3000:]
    assert _answers(tmp_path) == undisturbed
