"""Plans of jobs whose models are on the hub and not on this host."""

from dataclasses import replace
from pathlib import Path

import pytest

from parcelray.config.loader import load_job_of
from parcelray.config.train import TrainJob
from parcelray.errors import UserError
from parcelray.profiling.backbone_shapes import from_transformers_config, hub_shape
from parcelray.training.plan import training_plan
from parcelray.training.planned_model import planned_model
from parcelray.training.start import step_reader

from ..tiny import tiny_checkpoint
from .conftest import tiny_job

LARGE = [
    f"{model}_{gpus}"
    for model in ("paligemma2_3b_224", "paligemma2_3b_448", "llava_1_5_7b")
    for gpus in ("1gpu", "8gpus")
]


@pytest.fixture(autouse=True)
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", LARGE)
def test_the_sizes_of_a_known_hub_model_are_planned_without_its_files(name: str, repo_root: Path) -> None:
    job = load_job_of(TrainJob, repo_root / "jobs" / "train" / f"{name}.yaml")
    found = planned_model(job)
    shape = hub_shape(job.model.reference)  # type: ignore[union-attr]
    assert shape is not None
    assert replace(from_transformers_config(found.model.config), name=shape.name) == shape
    assert found.processor.image_size == shape.image_size
    assert found.processor.num_patches == shape.num_patches
    assert max(found.model.supported_budgets) == job.budget.values()[-1] == shape.num_patches
    assert all(each.is_meta for each in found.model.parameters())
    assert found.note is not None
    assert "text tokens are counted with the tokenizer of" in found.note


@pytest.mark.nightly
@pytest.mark.parametrize("name", LARGE)
def test_the_dry_run_of_a_large_job_needs_no_network(
    name: str, repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("easy_vqa")
    plan = training_plan(
        load_job_of(TrainJob, repo_root / "jobs" / "train" / f"{name}.yaml"), gpu="h100", with_peak=True
    )
    assert plan.state_bytes < 80 * 2**30
    assert (plan.peak_bytes is None) == name.endswith("8gpus"), "sharded peaks are not predicted"
    if plan.peak_bytes is not None:
        assert plan.state_bytes < plan.peak_bytes < 80 * 2**30


def test_an_unknown_hub_model_needs_its_files(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, model={"type": "checkpoint", "reference": "some/model"})
    with pytest.raises(UserError, match="Hub cannot be reached"):
        planned_model(job)


def test_a_plan_has_the_words_that_the_training_adds(tmp_path: Path) -> None:
    start = {"type": "checkpoint", "reference": str(tiny_checkpoint(tmp_path, 5))}
    job = tiny_job(tmp_path, model=start, new_words=["octagonal"])
    found = planned_model(job)
    assert len(found.processor.encode_text(["octagonal"])[0]) == 1
    assert found.model.config.text_config.vocab_size >= len(found.processor.tokenizer)
    assert (
        step_reader(job, found.processor, 0, 1).read(0)["input_ids"].max() < found.model.config.text_config.vocab_size
    )
