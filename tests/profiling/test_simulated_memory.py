"""The simulated peak is that of torch's allocator, and the predicted memory that of the process."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.profiler import ProfilerActivity, profile

from parcelray.config.connector import ConnectorConfig
from parcelray.models.vlm import config_of, empty_vlm, load_vlm, use_sdpa_where_exact
from parcelray.profiling.backbone_shapes import MINI_CONFIG
from parcelray.profiling.simulated_memory import MemoryMeter
from parcelray.training.memory import StepLoad, largest_batch, run_step, training_memory
from parcelray.training.start import prepare_model

from ..training.conftest import tiny_job

ASSETS = MINI_CONFIG.parents[1]


def _allocated_peak(work: Callable[[], object]) -> int:
    """Returns the peak of torch's allocator on the CPU above the start, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    live = peak = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


LORA = {"freeze": ["tower"], "lora": {"decoder": {"rank": 16}}}
CHECKPOINTING = {"activation_checkpointing": True}


@pytest.mark.parametrize(
    ("asset", "connector", "budget", "training"),
    [
        ("mini_base", "parcel", 40, {}),
        ("mini_llava", "mqt", 64, {}),
        ("mini_llava", "m3", 16, {}),
        pytest.param("mini_base", "parcel", 40, LORA, marks=pytest.mark.nightly),
        pytest.param("mini_base", "parcel", 40, CHECKPOINTING, marks=pytest.mark.nightly),
        pytest.param("mini_llava", "mqt", 64, LORA | CHECKPOINTING, marks=pytest.mark.nightly),
    ],
)
def test_the_simulated_peak_is_that_of_the_allocator(
    tmp_path: Path, asset: str, connector: str, budget: int, training: dict[str, Any]
) -> None:
    job, load = tiny_job(tmp_path, training=training), StepLoad(2, 2, 20, 3, budget)
    config = config_of(ASSETS / asset)
    config.connector = {"type": connector}
    model = load_vlm(ASSETS / asset, connector=TypeAdapter(ConnectorConfig).validate_python(config.connector))
    use_sdpa_where_exact(model)
    prepare_model(model.train(), job)
    measured = _allocated_peak(lambda: run_step(job, model, load, 1))

    meter = MemoryMeter()
    with meter.simulated():
        empty = empty_vlm(config)
        use_sdpa_where_exact(empty)
        with unset_fake_temporarily():
            prepare_model(empty.train(), job)
        weights = meter.live_bytes
        run_step(job, empty, load, 1)
    assert weights == pytest.approx(sum(each.nbytes for each in model.parameters()), rel=0.05)
    assert meter.peak_bytes - weights == pytest.approx(measured, rel=0.05)


def test_freed_tensors_and_views_are_not_counted() -> None:
    meter = MemoryMeter()
    with meter.simulated():
        first = torch.empty(1000)
        view = first.view(10, 100)
        assert meter.live_bytes == 4000
        second = view + 1
        del first
        assert meter.live_bytes == 8000
        del view, second
        assert meter.live_bytes == 0
        mask = torch.arange(5) > 2
        assert int(mask.sum()) == 2, "integers and booleans are real"
        assert torch.empty(5, 3)[mask].shape == (2, 3)
    assert meter.peak_bytes == 8000


@pytest.mark.nightly
def test_memory_grows_with_budget_and_batch_and_falls_with_frozen_weights(tmp_path: Path) -> None:
    job, config = tiny_job(tmp_path), config_of(ASSETS / "mini_base")
    config.connector = {"type": "parcel"}
    load = StepLoad(4, 1, 20, 3, 16)

    def above(**changes: object) -> int:
        return training_memory(tiny_job(tmp_path, **changes), config, load, 0, validate=False).above

    small = above()
    assert above(training={"freeze": ["tower"]}) < small < above(training={"gradient_accumulation_steps": 2})
    assert above(training={"freeze": ["tower", "decoder"]}) < above(training={"freeze": ["tower"]})
    assert above(training={"lora": {"decoder": {"rank": 2}}}) < small
    assert above(training={"activation_checkpointing": True}) < small
    larger = StepLoad(4, 1, 20, 3, 256)
    assert training_memory(job, config, larger, 0, validate=False).above > small
    limit = training_memory(job, config, StepLoad(24, 1, 20, 3, 16), 0, validate=False).total
    assert largest_batch(job, config, load, 0, limit) == pytest.approx(24, abs=1)


_MEASURE = """
import gc, json, pathlib, re, sys
from parcelray.models.vlm import load_vlm, use_sdpa_where_exact
from parcelray.config.connector import ConnectorConfig
from parcelray.config.train import TrainJob
from parcelray.training.memory import StepLoad, run_step
from parcelray.training.start import prepare_model, set_allocator
from parcelray.training.step import build_optimizer
from pydantic import TypeAdapter

given = json.loads(sys.argv[1])
job = TrainJob.model_validate(given["job"])
set_allocator(job)
connector = TypeAdapter(ConnectorConfig).validate_python(given["connector"])
model = load_vlm(given["path"], connector=connector).train()
use_sdpa_where_exact(model)
prepare_model(model, job)
optimizer = build_optimizer(model, job.optimizer)
gc.collect()

def resident(key):
    return int(re.search(key + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024

loaded = resident("VmRSS")
pathlib.Path("/proc/self/clear_refs").write_text("5")
for _ in range(2):
    run_step(job, model, StepLoad(*given["load"]), 1)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
print(json.dumps({"above": resident("VmHWM") - loaded}))
"""


@pytest.mark.nightly
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("asset", "connector", "load", "training"),
    [
        ("mini_base", "parcel", (32, 1, 32, 4, 64), {}),
        ("mini_base", "parcel", (64, 1, 32, 4, 256), {}),
        ("mini_base", "parcel", (64, 1, 32, 4, 256), LORA),
        ("mini_base", "parcel", (32, 1, 32, 4, 64), CHECKPOINTING),
        ("mini_llava", "mqt", (32, 1, 32, 4, 64), {}),
        ("mini_llava", "mqt", (32, 1, 32, 4, 64), LORA | CHECKPOINTING),
        ("mini_base", "m3", (32, 1, 32, 4, 256), {}),
    ],
)
def test_predicted_memory_is_within_ten_percent_of_the_process(
    tmp_path: Path, asset: str, connector: str, load: tuple[int, ...], training: dict[str, Any]
) -> None:
    job, config = tiny_job(tmp_path, training=training), config_of(ASSETS / asset)
    config.connector = {"type": connector}
    predicted = training_memory(job, config, StepLoad(*load), 1, validate=False).above
    given = {
        "job": job.model_dump(mode="json"),
        "connector": config.connector,
        "path": str(ASSETS / asset),
        "load": load,
    }
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, json.dumps(given)], capture_output=True, text=True, check=True, timeout=1200
    )
    measured = json.loads(re.findall(r"\{.*\}", done.stdout)[-1])["above"]
    assert predicted == pytest.approx(measured, rel=0.1), f"{predicted / 2**20:.1f}, not {measured / 2**20:.1f} MiB"
