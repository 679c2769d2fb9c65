"""Reading of job files, error messages and identities."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from parcelray.config.evaluate import EvaluateJob
from parcelray.config.identity import config_hash, identity
from parcelray.config.loader import ConfigError, apply_override, load_job, load_job_of
from parcelray.config.train import TrainJob
from parcelray.config.tune import TuneJob

JOB = {"kind": "train", "name": "x", "data": {"type": "mini"}, "training": {"steps": 5}}


def _write(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(JOB | changes))
    return path


def test_a_minimal_job_gets_all_defaults(tmp_path: Path) -> None:
    job = load_job_of(TrainJob, _write(tmp_path))
    assert job.budget.values() == tuple(range(16, 257, 2))
    assert identity(job) == f"train-x-{config_hash(job)}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"connector": {"type": "parcle"}},
            r"connector.type is 'parcle'; legal: identity, parcel, .* \(did you mean parcel\?\)",
        ),
        (
            {"data": {"type": "mini", "sed": 1}},
            r"data.sed is not a known key; legal here: dense_fraction, families, seed, type \(did you mean seed\?\)",
        ),
        (
            {"kind": "evaluate", "compute": {"rows_per_bundle": 8}},
            r"compute.rows_per_bundle is now called rows_per_shard; rename the key",
        ),
        ({"training": {"steps": 0}}, r"training.steps is 0: input should be greater than or equal to 1"),
        ({"training": {"steps": "many"}}, r"training.steps is 'many': input should be a valid integer"),
        ({"training": {}}, r"training.steps is missing; add it"),
        ({"training": {"steps": 1, "precision": "fp64"}}, r"training.precision is 'fp64'; legal: fp32, bf16, fp16"),
        (
            {"connector": {"type": "parcel", "routing": [{"min_budget": 3, "max_budget": 2, "anchor_grid": 1}]}},
            r"connector.routing.0: max_budget 2 is below min_budget 3",
        ),
        ({"budget": {"type": "uniform", "budgets": {"start": 9, "stop": 3}}}, r"stop 3 is below start 9"),
        ({"scaling": {"num_workers": [3, 1]}}, r"is not a worker count"),
        ({"budget": {"budgets": [16]}}, r"budget.type is missing"),
        (
            {"budget": {"type": "uniform", "budgets": [16]}, "distillation": {}},
            r"distillation needs a smaller budget than the largest, but the only budget is 16",
        ),
        ({"kind": "trian"}, r"kind is 'trian'; legal: train, evaluate, tune, promote, serve \(did you mean train\?\)"),
        ({"kind": ["train"]}, r"kind is \['train'\]; legal: train"),
        ({"name": "No Good"}, r"name is 'No Good'"),
    ],
)
def test_an_error_names_file_key_value_and_legal_values(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = _write(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        load_job(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"data": {"type": "mini", "sed": 1}}, "data.sed"),
        ({"data": {"type": "mini", "mini": 1}}, "data.mini"),
        ({"data": {"type": "nlvr"}}, "data.path"),
        ({"data": {"type": "mini", "families": ["generl"]}}, "data.families.0"),
        ({"connector": {"type": "parcel", "num_heads": 0}}, "connector.num_heads"),
        (
            {
                "connector": {
                    "type": "parcel",
                    "routing": [{"min_budget": 9, "max_budget": 9, "anchor_grid": 1, "grid": 2}],
                }
            },
            "connector.routing.0.grid",
        ),
        (
            {"connector": {"type": "parcel", "routing": [{"min_budget": "few", "max_budget": 9, "anchor_grid": 1}]}},
            "connector.routing.0.min_budget",
        ),
        ({"budget": {"type": "uniform", "budgets": {"start": 16}}}, "budget.budgets.stop"),
        ({"budget": {"type": "sandwich", "budgets": {"start": 16, "stop": 64, "stp": 2}}}, "budget.budgets.stp"),
        ({"budget": {"type": "uniform", "budgets": [16, "x"]}}, "budget.budgets.1"),
        ({"optimizer": {"type": "adamw", "beta1": 2}}, "optimizer.beta1"),
        ({"optimizer": {"type": "sgd", "beta1": 0.9}}, "optimizer.beta1"),
        ({"model": {"type": "checkpoint", "referense": "x"}}, "model.referense"),
    ],
)
def test_an_error_is_one_line_with_the_key_path_of_the_file(
    tmp_path: Path, changes: dict[str, object], path: str
) -> None:
    job = _write(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        load_job(job)
    assert re.fullmatch(rf"{re.escape(f'{job}: {path} is ')}.+", str(caught.value))


def test_every_error_has_its_own_line(tmp_path: Path) -> None:
    path = _write(tmp_path, sed=1, name="No Good", scaling={"num_workers": "two"})
    with pytest.raises(ConfigError) as caught:
        load_job(path)
    keys = [line.removeprefix(f"{path}: ").split(" is ")[0] for line in str(caught.value).splitlines()]
    assert keys == ["name", "scaling.num_workers", "sed"]
    assert "scaling.num_workers is 'two': input should be a valid integer or tuple." in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not YAML"), ("- 1", "contains a list, not a mapping")])
def test_a_file_without_a_mapping_is_rejected(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_job(path)


def test_a_binary_file_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"job\.yaml: is not UTF-8 text"):
        load_job(path)


def test_a_missing_file_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: cannot be read"):
        load_job(tmp_path / "nothing.yaml")


def test_set_changes_nested_values_and_creates_mappings(tmp_path: Path) -> None:
    job = load_job_of(
        TrainJob,
        _write(tmp_path),
        ["training.steps=7", "budget.type=uniform", "budget.budgets=[16, 64]", "tracking.uri=null"],
    )
    assert (job.training.steps, job.budget.values(), job.tracking.uri) == (7, (16, 64), None)


@pytest.mark.parametrize("override", ["steps", "=3", "a..b=1", "name.x=1", "name=[", ".=1"])
def test_a_malformed_override_is_rejected(override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        apply_override(dict(JOB), override)


def test_a_job_cannot_be_changed(tmp_path: Path) -> None:
    job = load_job_of(TrainJob, _write(tmp_path))
    with pytest.raises(ValidationError):
        job.seed = 3  # type: ignore[misc]


def test_a_job_of_another_kind_is_rejected_with_the_right_command(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="kind is train, but this command runs evaluate jobs; run it with `parcelray train"
    ):
        load_job_of(EvaluateJob, _write(tmp_path))


def test_the_old_name_of_a_key_of_searches_is_refused(repo_root: Path) -> None:
    with pytest.raises(ConfigError, match="rivals is now called baselines; rename the key"):
        load_job_of(TuneJob, repo_root / "jobs" / "tune" / "anchor_query_split.yaml", ["rivals.M3=x"])
