"""The evaluation pass on Ray: every prediction is stored exactly once, even if processes or nodes die."""

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from parcelray.benchmarks.readers.base import Problem
from parcelray.benchmarks.readers.samples import MiniReader
from parcelray.config.evaluate import BLIND, PassConfig
from parcelray.errors import SystemFailure, UnsupportedBudgetError
from parcelray.evaluation.passes.ray_pass import run_on_ray
from parcelray.evaluation.passes.shards import EvaluatedModel, PassResult
from parcelray.evaluation.passes.store import Prediction, PredictionStore
from parcelray.evaluation.passes.worker import ModelWorker, run_in_process
from parcelray.evaluation.predict.generation import GenerationSettings
from parcelray.models.checkpoint import resolve_checkpoint
from parcelray.training.start import build_start

from ...processes import LIMIT_S, end_session, wait_until
from ...training.conftest import tiny_job
from .readers import READER, Hangs, KillsItsReader, Waits, disturbed, mini_benchmark

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

BUDGETS = (BLIND, 16, 64)
GENERATION = GenerationSettings(max_new_tokens=6)
SMALL = PassConfig(rows_per_shard=6, cpus_per_actor=0.5, threads_per_actor=1)
ANSWERS = 24 * len(BUDGETS)
Answers = dict[tuple[str, int], Prediction]
"""Stored predictions, by sample and budget."""


MARGIN = 1e-3
"""Smallest difference of the two largest logits of a position.

Logits have a standard deviation of 1, and other batches, threads
and kernels change them by about 1e-6, so none of these can change an answer. The margin of this model is 6e-3."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    # Of the seeds from 0 to 22, this one has a large margin (see MARGIN) and many different answers.
    model, processor = build_start(tiny_job(folder, seed=21), None)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _model(checkpoint: Path, store: Path, budgets: tuple[int, ...] = BUDGETS) -> EvaluatedModel:
    return EvaluatedModel(checkpoint, resolve_checkpoint(checkpoint).pin, budgets, str(store))


def _pass(
    checkpoint: Path, store: Path, reader: MiniReader = READER, settings: PassConfig = SMALL, **changes
) -> PassResult:
    rows = changes.pop("rows", reader.order())
    budgets = changes.pop("budgets", BUDGETS)
    benchmark = dataclasses.replace(mini_benchmark(reader, GENERATION), rows=rows)
    return run_on_ray([benchmark], _model(checkpoint, store, budgets), settings, **changes)


def _answers(store: Path) -> Answers:
    """Returns all stored predictions by sample and budget."""
    (model,) = (store / "mini").iterdir()
    keys = PredictionStore(str(store)).keys("mini", model.name)
    found = PredictionStore(str(store)).read("mini", model.name, keys).values()
    assert all(prediction.mean_log_prob is not None for prediction in found)
    # The last digits of a confidence depend on the batch, which a disturbed pass changes; texts do not, see MARGIN.
    texts = (dataclasses.replace(prediction, mean_log_prob=None, entropy=None) for prediction in found)
    answers = {(prediction.sample_id, prediction.num_visual_tokens): prediction for prediction in texts}
    assert len(answers) == len(keys)
    return answers


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Predictions of a pass in this process, in other batches than those of the passes on Ray."""
    store = tmp_path_factory.mktemp("undisturbed")
    model = _model(checkpoint, store)
    worker = ModelWorker(model, SMALL, GENERATION.dtype)
    margins: list[float] = []

    def note(module: torch.nn.Module, inputs: tuple[torch.Tensor], logits_BSV: torch.Tensor) -> None:
        first_B2 = logits_BSV[:, -1].topk(2).values
        margins.extend((first_B2[:, 0] - first_B2[:, 1]).tolist())

    worker.predictor(GENERATION)._model.lm_head.register_forward_hook(note)
    benchmark = mini_benchmark(READER, GENERATION)
    result = run_in_process([benchmark], model, worker, SMALL, lambda name, rows, total: None)
    assert (result.computed, result.present) == (ANSWERS, 0)
    assert len(margins) >= ANSWERS
    assert min(margins) > MARGIN, "choose weights with clearer decisions"
    answers = _answers(store)
    assert len({prediction.text for prediction in answers.values()}) > 10, "the answers tell samples and budgets apart"
    return answers


@pytest.mark.nightly
def test_an_illegal_budget_is_the_users_error(ray_session: None, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedBudgetError, match="does not support 8 visual tokens"):
        _pass(checkpoint, tmp_path, budgets=(8,), rows=range(1))


@pytest.mark.nightly
def test_a_killed_reader_loses_nothing_and_damaged_rows_are_listed(
    ray_session: None, undisturbed: Answers, checkpoint: Path, tmp_path: Path
) -> None:
    reader = disturbed(KillsItsReader, tmp_path / "died")
    result = _pass(checkpoint, tmp_path / "store", reader)
    assert (tmp_path / "died").exists()
    undecodable = READER.read(7).samples[0].id
    assert result.benchmarks[0].problems[0] == Problem("row 3", "no answer")
    assert result.benchmarks[0].problems[1].row == undecodable
    assert "cannot be decoded" in result.benchmarks[0].problems[1].reason
    assert len(result.benchmarks[0].problems) == 2
    assert len(result.benchmarks[0].records) == 22
    assert (result.computed, result.present) == (22 * len(BUDGETS), 0)
    lost = (undecodable, READER.read(3).samples[0].id)
    assert _answers(tmp_path / "store") == {
        key: prediction for key, prediction in undisturbed.items() if key[0] not in lost
    }


def _actor_processes() -> list[int]:
    """Returns the actors that evaluate, among the processes of the Ray that the driver of this test started."""
    children = subprocess.run(
        ["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    rows = {int(line.split()[0]): (int(line.split()[1]), line) for line in children}

    def ours(process: int) -> bool:
        return process == os.getpid() or (process in rows and ours(rows[process][0]))

    return [
        process
        for process, (_, line) in rows.items()
        if "ray::MapWorker(MapBatches(_Evaluate" in line and ours(process)
    ]


def test_a_pass_whose_actor_is_killed_predicts_the_same_as_one_in_this_process(
    ray_session: None, undisturbed: Answers, checkpoint: Path, tmp_path: Path
) -> None:
    # Rows are left to be read until the actor is killed, so it cannot have ended by itself.
    went_on = tmp_path / "killed"
    killed: list[int] = []
    progress: list[int] = []

    def kill(name: str, rows: int, total: int) -> None:
        progress.append(rows)
        if not killed:
            killed.extend(_actor_processes())
            for process in killed:
                os.kill(process, signal.SIGKILL)
            went_on.touch()

    settings = SMALL.model_copy(update={"rows_per_shard": 2})
    notices: list[str] = []
    reader = disturbed(Waits, went_on)
    result = _pass(checkpoint, tmp_path / "store", reader, settings=settings, on_progress=kill, say=notices.append)
    assert killed
    assert [line for line in notices if "A worker of the evaluation died" in line]
    # A shard that was stored before its actor died is computed once more and overwrites its own answers.
    assert (result.computed, result.present) == (ANSWERS, 0)
    assert _answers(tmp_path / "store") == undisturbed
    assert progress == sorted(progress)
    assert progress[-1] == 24
    records = result.benchmarks[0].records
    assert [record.sample.id for record in records] == [READER.read(row).samples[0].id for row in READER.order()]
    assert {record.keys[16] for record in records} == {
        prediction.key for (_, budget), prediction in undisturbed.items() if budget == 16
    }


class _Clock:
    """A clock that does not advance until a condition is met; then 5 s pass between two readings."""

    def __init__(self, condition: Callable[[], bool]) -> None:
        self._condition = condition
        self._now = 0.0

    def __call__(self) -> float:
        if self._condition():
            self._now += 5.0
        return self._now


@pytest.mark.nightly
def test_a_stall_is_reported_with_its_stage_and_a_rerun_computes_only_what_is_missing(
    ray_session: None, undisturbed: Answers, checkpoint: Path, tmp_path: Path
) -> None:
    store, marker = tmp_path / "store", tmp_path / "hangs"
    # The reader hangs, and all that it has read before is answered.
    digest = resolve_checkpoint(checkpoint).pin.digest
    clock = _Clock(lambda: marker.exists() and len(PredictionStore(str(store)).keys("mini", digest)) == 18)
    # Ray Data hands over a shard once the next one is there, so the last of the three may not be counted.
    message = (
        r"No shard was finished for 15 s \([23] of 4 are finished\); running stages: .*reading rows 18 to 23 of mini"
    )
    with pytest.raises(SystemFailure, match=message):
        _pass(
            checkpoint,
            store,
            disturbed(Hangs, marker),
            SMALL.model_copy(update={"stall_s": 15}),
            budgets=(16,),
            clock=clock,
        )
    assert len(_answers(store)) == 18
    # The session is as usable as before; other shards and more actors find the same answers again.
    second = _pass(checkpoint, store, settings=SMALL.model_copy(update={"rows_per_shard": 16, "actors": 2}))
    assert (second.computed, second.present) == (ANSWERS - 18, 18)
    assert _answers(store) == undisturbed
    third = _pass(checkpoint, store)
    assert (third.computed, third.present) == (0, ANSWERS)


DRIVER = """
import sys
from collections.abc import Callable
from pathlib import Path

root, checkpoint, store, never = sys.argv[1:]
sys.path.insert(0, root)

from parcelray.cluster.session import ray_session
from parcelray.config.evaluate import PassConfig
from parcelray.evaluation.passes.shards import EvaluatedModel
from parcelray.evaluation.passes.ray_pass import run_on_ray
from parcelray.evaluation.predict.generation import GenerationSettings
from parcelray.models.checkpoint import resolve_checkpoint
from tests.evaluation.passes.readers import Waits, disturbed, mini_benchmark

if __name__ == "__main__":
    reader = disturbed(Waits, Path(never))
    benchmark = mini_benchmark(reader, GenerationSettings(max_new_tokens=6))
    with ray_session("local"):
        model = EvaluatedModel(Path(checkpoint), resolve_checkpoint(checkpoint).pin, (0, 16, 64), store)
        run_on_ray([benchmark], model, PassConfig(rows_per_shard=2))
"""


@pytest.mark.nightly
def test_a_killed_driver_loses_nothing(
    ray_session: None, undisturbed: Answers, checkpoint: Path, repo_root: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    command = [sys.executable, "-c", DRIVER, str(repo_root), str(checkpoint), str(store), str(tmp_path / "never")]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_until(lambda: len(list(store.rglob("*.parquet"))) >= 3, "three files of answers are stored", driver)
    driver.kill()
    driver.wait()
    # Ray's processes outlive the driver, so its actors may store a last shard. The test started this session and ends
    # it.
    end_session(driver.pid)
    kept = len(_answers(store))
    assert 0 < kept < ANSWERS
    result = _pass(checkpoint, store)
    assert (result.computed, result.present) == (ANSWERS - kept, kept)
    assert _answers(store) == undisturbed


CLUSTER = """
import sys
from collections.abc import Callable
from pathlib import Path

root, checkpoint, store, removed = sys.argv[1:]
sys.path.insert(0, root)

import ray
from ray.cluster_utils import Cluster
from parcelray.config.evaluate import PassConfig
from parcelray.evaluation.passes.shards import EvaluatedModel
from parcelray.evaluation.passes.ray_pass import run_on_ray
from parcelray.evaluation.predict.generation import GenerationSettings
from parcelray.models.checkpoint import resolve_checkpoint
from tests.evaluation.passes.readers import Waits, disturbed, mini_benchmark

if __name__ == "__main__":
    health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    head = {"num_cpus": 2, "_system_config": health, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    second = cluster.add_node(num_cpus=2)
    ray.init(cluster.address, log_to_driver=False)
    # Rows are left to be read until the node has stopped.
    reader = disturbed(Waits, Path(removed))
    benchmark = mini_benchmark(reader, GenerationSettings(max_new_tokens=6))

    def remove(name, rows, total):
        if not Path(removed).exists():
            cluster.remove_node(second, allow_graceful=False)
            Path(removed).touch()

    settings = PassConfig(rows_per_shard=2, actors=2, readers=2, cpus_per_actor=0.4)
    model = EvaluatedModel(Path(checkpoint), resolve_checkpoint(checkpoint).pin, (0, 16, 64), store)
    result = run_on_ray([benchmark], model, settings, on_progress=remove)
    print("RESULT", result.computed, result.present, len(result.benchmarks[0].records))
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.mark.nightly
def test_a_killed_node_loses_nothing(undisturbed: Answers, checkpoint: Path, repo_root: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "disabled"
    }
    removed = tmp_path / "removed"
    command = [sys.executable, "-c", CLUSTER, str(repo_root), str(checkpoint), str(tmp_path / "store"), str(removed)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LIMIT_S, check=False)
    assert f"RESULT {ANSWERS} 0 24" in done.stdout, done.stderr[-3000:]
    assert removed.exists()
    assert _answers(tmp_path / "store") == undisturbed
