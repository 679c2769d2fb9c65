"""Checkpoints of a training whose ranks share the weights: each rank writes and holds its own part."""

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.multiprocessing.spawn import spawn

from parcelray.config.train import StorageLimits, TrainJob
from parcelray.errors import SystemFailure
from parcelray.training import train_loop
from parcelray.training.batches.schedule import in_process_batches
from parcelray.training.checkpointing import SHARDS, TrainState, is_complete, load_shards, newest, read_state, save
from parcelray.training.ray_worker import train_worker
from parcelray.training.run import run_training
from parcelray.training.start import build_trained
from parcelray.training.step import build_optimizer
from parcelray.training.train_loop import LoopInputs, fit_in_process, train

from .conftest import few_tokenizer_texts, tiny_job
from .sharding import join_ranks, shard_on_cpus
from .test_in_process import Recorder

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")

STEPS = {"steps": 4, "strategy": "fsdp", "log_every_steps": 1, "images_per_step": 8}


def _job(folder: Path) -> TrainJob:
    # An odd width, which no number of ranks divides.
    return tiny_job(
        folder,
        model={"text_mlp_width": 33},
        training=STEPS,
        checkpointing={"every_steps": 2},
        validation={"samples": 1, "budgets": [16]},
    )


@pytest.mark.usefixtures("one_rank")
def test_a_changed_index_runs_no_code(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, training=STEPS | {"steps": 1}, validation={"samples": 1, "budgets": [16]})
    checkpoint, _ = fit_in_process(job, tmp_path, checkpoint=None, logger=Recorder())
    assert not list((checkpoint / "model").glob("*.safetensors")), "the weights are in the shards only"
    model, _ = build_trained(job, checkpoint, None)
    (checkpoint / SHARDS / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(SystemFailure, match=r"names os\.system, so it was changed"):
        load_shards(checkpoint, model)


def _resident(key: str) -> int:
    return int(re.search(key + r":\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def _growth(work: Callable[[], object]) -> int:
    """Returns by how much the peak of the resident memory exceeds that before some work, bytes."""
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return _resident("VmHWM") - before


def _merge(folder: Path, metrics: dict[str, float], source: Path | None, validate: bool) -> None:
    """Copies the parts of all ranks into one folder, as Ray Train does."""
    assert source is not None, "every rank has a part"
    rank = distributed.get_rank()
    shards = {path.name for path in (source / SHARDS).iterdir()}
    assert shards == {f"__{rank}_0.distcp"} | ({".metadata"} if rank == 0 else set())
    shutil.copytree(source, folder / f"checkpoint_{int(metrics['step']):08d}", dirs_exist_ok=True)
    distributed.barrier()


def _save_whole(folder: Path, loop: Any) -> None:
    """Writes the whole state, gathered by torch, on rank 0."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(loop.model, options=options)
    moments = get_optimizer_state_dict(loop.model, loop.optimizer.optimizer, options=options)
    if distributed.get_rank() == 0:
        save_file({name: value.clone() for name, value in weights.items()}, folder / "weights.safetensors")
        torch.save(moments["state"], folder / "moments.pt")


def _measure_save(folder: Path) -> int:
    """Returns by how much a save of a larger model raises the memory of this rank, bytes."""
    job = tiny_job(
        folder, model={"text_width": 128, "text_mlp_width": 40_000}, training=STEPS, validation={"samples": 1}
    )
    loop: Any = train_loop._Loop(job, LoopInputs(None, None, in_process_batches, lambda *report: None))
    for parameter in loop.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    loop.optimizer.step()
    loop.optimizer.zero_grad(set_to_none=True)
    target = folder / f"large-{distributed.get_rank()}"
    state = TrainState(1, "", {}, 2, {})
    parts = {"accelerator": loop.accelerator, "model": loop.model, "optimizer": loop.optimizer}
    return _growth(lambda: save(target, processor=loop.processor, state=state, **parts))


def _run_rank(rank: int, world_size: int, folder: Path) -> None:
    """What each of several processes does: train, resume, and measure."""
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    few_tokenizer_texts(patch)
    join_ranks(folder / "store", rank, world_size, patch)
    shard_on_cpus(patch)
    loops: list[Any] = []

    def remembered(kind: type, *inputs: Any) -> Any:
        loops.append(object.__new__(kind))
        return loops[-1]

    patch.setattr(train_loop._Loop, "__new__", remembered)
    job = _job(folder)
    for name, first in (("whole", None), ("resumed", folder / "whole" / "checkpoint_00000002")):
        metrics = train(job, LoopInputs(None, first, in_process_batches, partial(_merge, folder / name)))
        if rank == 0:
            (folder / name / "metrics.json").write_text(json.dumps(metrics))
    _save_whole(folder, loops[0])
    if sys.platform.startswith("linux"):
        (folder / f"growth-{rank}").write_text(str(_measure_save(folder)))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a training of two ranks (whole), of one resumed from its step 2, and of measurements."""
    folder = tmp_path_factory.mktemp("two-ranks")
    spawn(_run_rank, (2, folder), nprocs=2)
    return folder


def _tensors(job: TrainJob, checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """Weights and moments of a checkpoint by name, loaded in one process."""
    model, _ = build_trained(job, checkpoint, None)
    optimizer = build_optimizer(model, job.optimizer)
    load_shards(checkpoint, model, optimizer)
    moments = {name: optimizer.state[each] for name, each in model.named_parameters() if each in optimizer.state}
    return model.state_dict(), moments


@pytest.mark.nightly
def test_one_process_reads_exactly_what_two_ranks_have_written(two_ranks: Path) -> None:
    weights, moments = _tensors(_job(two_ranks), two_ranks / "whole" / "checkpoint_00000004")
    expected = load_file(two_ranks / "weights.safetensors")
    assert expected.keys() == weights.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    states = torch.load(two_ranks / "moments.pt", weights_only=True)
    assert states.keys() == moments.keys()
    assert all(torch.equal(moments[name][key], each) for name, state in states.items() for key, each in state.items())


@pytest.mark.nightly
def test_two_ranks_resume_to_the_same_bits(two_ranks: Path) -> None:
    ends = [two_ranks / name / "checkpoint_00000004" for name in ("whole", "resumed")]
    (one, one_moments), (two, two_moments) = (_tensors(_job(two_ranks), end) for end in ends)
    assert all(torch.equal(two[name], value) for name, value in one.items())
    assert one_moments.keys() == two_moments.keys()
    assert all(torch.equal(two_moments[name]["exp_avg"], state["exp_avg"]) for name, state in one_moments.items())
    assert read_state(ends[0]).world_size == 2


@pytest.mark.nightly
@pytest.mark.usefixtures("one_rank")
def test_another_number_of_ranks_resumes_to_equal_values(two_ranks: Path, tmp_path: Path) -> None:
    checkpoint = two_ranks / "whole" / "checkpoint_00000002"
    found = train(_job(two_ranks), LoopInputs(None, checkpoint, in_process_batches, partial(_merge, tmp_path)))
    expected = json.loads((two_ranks / "whole" / "metrics.json").read_text())
    for name in ("train/loss", "train/grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3)


@pytest.mark.nightly
def test_a_checkpoint_without_the_part_of_a_rank_is_not_used(two_ranks: Path, tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    shutil.copytree(two_ranks / "whole", folder)
    last, before = folder / "checkpoint_00000004", folder / "checkpoint_00000002"
    assert newest(folder) == last
    shard = last / SHARDS / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert newest(folder) == before
    (before / SHARDS / "__0_0.distcp").unlink()
    assert not is_complete(before)


@pytest.mark.nightly
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_rank_holds_the_whole_state_for_a_save(two_ranks: Path) -> None:
    files = [path for rank in range(2) for path in (two_ranks / f"large-{rank}" / SHARDS).glob("*.distcp")]
    state_bytes = sum(path.stat().st_size for path in files)
    assert state_bytes > 150 * 2**20
    for rank in range(2):
        assert int((two_ranks / f"growth-{rank}").read_text()) < state_bytes / 4


@pytest.mark.nightly
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_export_holds_one_copy_of_the_model(two_ranks: Path, tmp_path: Path) -> None:
    job = tiny_job(two_ranks, model={"text_width": 128, "text_mlp_width": 40_000}, training=STEPS)
    checkpoint = tmp_path / "checkpoint"
    for rank in range(2):
        shutil.copytree(two_ranks / f"large-{rank}", checkpoint, dirs_exist_ok=True)
    model_bytes = 0

    def export() -> None:
        nonlocal model_bytes
        model, _ = build_trained(job, checkpoint, None)
        model_bytes = sum(each.nbytes for each in model.parameters())
        model.save_pretrained(tmp_path / "model")

    growth = _growth(export)
    assert model_bytes > 50 * 2**20
    assert growth < 1.5 * model_bytes


def _train_sharded(config: dict[str, Any]) -> None:
    """Runs a worker of Ray Train that shards on CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        shard_on_cpus(patch)
        train_worker(config)


@pytest.mark.ray
@pytest.mark.nightly
@pytest.mark.usefixtures("ray_session")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_ray_train_stores_the_parts_of_all_workers_on_object_storage(
    s3: str, tmp_path: Path, tiny_start: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Workers cannot import the tests.
    for name in (__name__, shard_on_cpus.__module__):
        ray.cloudpickle.register_pickle_by_value(sys.modules[name])
    monkeypatch.setattr("parcelray.training.trainer.train_worker", _train_sharded)
    job = tiny_job(
        tmp_path,
        model=tiny_start,
        training=STEPS,
        checkpointing={"every_steps": 2},
        validation={"samples": 1, "budgets": [16]},
        scaling={"num_workers": 2},
    ).model_copy(update={"storage": s3, "storage_limits": StorageLimits(finished_checkpoints=2)})
    console = Console(file=io.StringIO())
    first = run_training(job, console)
    folder = first.folder
    before, last = (name for name in folder.names(folder.identity) if name.startswith("checkpoint_2"))
    for name in (before, last):
        shards = folder.filesystem.ls(f"{folder.path}/{folder.identity}/{name}/{SHARDS}", detail=False)
        assert {path.rpartition("/")[2] for path in shards} == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    weights = load_file(first.model_folder / "model.safetensors")
    # The second worker's part of the newest checkpoint is cut off.
    path = f"{folder.path}/{folder.identity}/{last}/{SHARDS}/__1_0.distcp"
    folder.filesystem.pipe_file(path, folder.filesystem.cat_file(path)[:-100])
    folder.filesystem.rm_file(f"{folder.path}/result.json")
    again = run_training(job, console)
    assert not again.was_done
    found = load_file(again.model_folder / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in weights.items())
