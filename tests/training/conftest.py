"""A tiny training job that runs in seconds on one core."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from parcelray.config.train import TrainJob

from .sharding import join_ranks, shard_on_cpus

TINY: dict[str, Any] = {
    "kind": "train",
    "name": "tiny",
    "seed": 3,
    "model": {
        "type": "mini",
        "vision_width": 24,
        "vision_layers": 1,
        "vision_heads": 2,
        "vision_mlp_width": 32,
        "text_width": 24,
        "text_layers": 1,
        "text_heads": 2,
        "text_kv_heads": 1,
        "text_head_dim": 12,
        "text_mlp_width": 32,
    },
    "connector": {"type": "parcel", "num_heads": 2},
    "data": {"type": "mini"},
    "budget": {"type": "uniform", "budgets": [16, 40, 80]},
    "training": {"steps": 6, "images_per_step": 8, "log_every_steps": 1},
    "validation": {"samples": 2, "budgets": [16, 64]},
    "checkpointing": {"every_steps": 3},
    "scaling": {"num_workers": 0},
    "tracking": {"uri": None},
}


def tiny_job(storage: Path, **changes: Any) -> TrainJob:
    """The tiny job with some sections changed."""
    data = {**TINY, "storage": str(storage)}
    for key, value in changes.items():
        data[key] = {**data.get(key, {}), **value} if isinstance(value, dict) and "type" not in value else value
    return TrainJob.model_validate(data)


def few_tokenizer_texts(patch: pytest.MonkeyPatch) -> None:
    """Build tokenizers of models from scratch from a tenth of the texts: the same size, and two seconds faster."""
    patch.setattr("parcelray.training.start._TOKENIZER_TEXTS", 2_000)


@pytest.fixture(autouse=True, scope="module")
def _few_tokenizer_texts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        few_tokenizer_texts(patch)
        yield


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    """The tiny job."""
    return tiny_job(tmp_path)


@pytest.fixture
def one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group with this process as its only rank, as on a Ray worker, which shards on CPUs, too."""
    join_ranks(tmp_path / "store", 0, 1, monkeypatch)
    shard_on_cpus(monkeypatch)
    yield
    distributed.destroy_process_group()
