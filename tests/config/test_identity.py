"""Identities of jobs: what changes them, and the differences between two configurations."""

from pathlib import Path

import yaml

from parcelray.config.evaluate import EvaluateJob
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


def test_the_identity_depends_on_values_and_not_on_their_notation(tmp_path: Path) -> None:
    first = identity(load_job(_write(tmp_path)))
    path = tmp_path / "other.yaml"
    path.write_text(
        "training: {steps: 5.0, precision: fp32}\ndata: {type: mini, seed: 0}\nseed: 0\nname: x\nkind: train\n"
    )
    assert identity(load_job(path)) == first


def test_differing_keys_are_listed_as_key_paths() -> None:
    assert differing_keys({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == ["a.c: 2 -> 3", "d: None -> 4"]


def test_renamed_positions_of_reducers_keep_identities_and_prediction_keys() -> None:
    jobs = [
        EvaluateJob.model_validate(
            {
                "kind": "evaluate",
                "name": "x",
                "benchmarks": ["mini"],
                "reducer": {"type": "restore", "positions": positions},
            }
        )
        for positions in ("original_size_bias", "image_size_bias", "contiguous")
    ]
    former, same, other = jobs
    assert former == same
    assert identity(same) == "evaluate-x-09c74215", "the identity in version 1.16"
    assert identity(other) != identity(same)
    assert same.reducer is not None
    assert same.reducer.to_json() == (
        '{"positions":"original_size_bias","type":"restore","base":"divprune","share":0.5}'
    ), "the settings in prediction keys of version 1.16"
