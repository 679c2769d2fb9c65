"""Identities of jobs: what changes them, and the differences between two configurations."""

from pathlib import Path

import yaml

from parcelray.config.identity import differing_keys, identity
from parcelray.config.loader import load_job

JOB = {"kind": "train", "name": "x", "data": {"type": "mini"}, "training": {"steps": 5}}


def _write(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(JOB))
    return path


def test_the_identity_ignores_storage_tracking_and_number_of_workers(tmp_path: Path) -> None:
    path = _write(tmp_path)
    first = identity(load_job(path))
    assert identity(load_job(path, ["storage=elsewhere", "tracking.uri=null", "scaling.num_workers=2"])) == first
    assert identity(load_job(path, ["seed=1"])) != first


def test_a_job_without_distillation_keeps_its_identity(tmp_path: Path) -> None:
    path = _write(tmp_path)
    first = identity(load_job(path))
    assert identity(load_job(path, ["distillation=null"])) == first
    assert identity(load_job(path, ["distillation.weight=0.5"])) != first


def test_the_identity_depends_on_values_and_not_on_their_notation(tmp_path: Path) -> None:
    first = identity(load_job(_write(tmp_path)))
    path = tmp_path / "other.yaml"
    path.write_text(
        "training: {steps: 5.0, precision: fp32}\ndata: {type: mini, seed: 0}\nseed: 0\nname: x\nkind: train\n"
    )
    assert identity(load_job(path)) == first


def test_differing_keys_are_listed_as_key_paths() -> None:
    assert differing_keys({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == ["a.c: 2 -> 3", "d: None -> 4"]
