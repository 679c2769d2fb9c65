"""Identities of jobs: what changes them, and the differences between two configurations."""

from pathlib import Path

import pytest
import yaml

from parcelray.config.evaluate import EvaluateJob
from parcelray.config.identity import decisive, differing_keys, identity
from parcelray.config.loader import load_job
from parcelray.config.train import TrainJob

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


def test_limits_of_what_is_accepted_are_not_in_the_identity(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        "kind: evaluate\nname: x\nmodel: {type: checkpoint, reference: m}\nbenchmarks: [mini]\n", encoding="utf-8"
    )
    first = identity(load_job(path))
    # Of a job from when the limit was in the identity; its default still counts.
    assert first == "evaluate-x-d794623c"
    assert identity(load_job(path, ["max_unscored=0.5"])) == first


def test_differing_keys_are_listed_as_key_paths() -> None:
    assert differing_keys({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == ["a.c: 2 -> 3", "d: None -> 4"]


@pytest.mark.parametrize(
    ("connector", "former_hash"),
    [
        ({"type": "parcel", "start": "random", "positions": "contiguous"}, "5a59f566"),
        ({"type": "mqt", "start": "random", "positions": "contiguous"}, "98f8d05e"),
        ({"type": "m3", "positions": "contiguous"}, "08d1e0f6"),
        ({"type": "identity"}, "28f2b3a8"),
    ],
)
def test_a_job_that_states_the_former_values_has_the_identity_from_before_the_keys(
    connector: dict[str, str], former_hash: str
) -> None:
    """The hashes are those of the same jobs without the keys, by the code of commit 38b07a7."""
    job = TrainJob.model_validate(JOB | {"connector": connector})
    assert identity(job) == f"train-x-{former_hash}"
    defaults = TrainJob.model_validate(JOB | {"connector": {"type": connector["type"]}})
    assert (identity(defaults) == identity(job)) == (connector["type"] == "identity")


def test_a_key_that_an_old_job_lacks_differs_by_its_former_value() -> None:
    old, new = ({"connector": {"type": "parcel"} | keys} for keys in ({}, {"start": "local", "positions": "image"}))
    assert differing_keys(decisive(old), decisive(new)) == [
        "connector.positions: 'contiguous' -> 'image'",
        "connector.start: 'random' -> 'local'",
    ]


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


@pytest.mark.parametrize(
    ("freeze", "former_hash"),
    [([], "28f2b3a8"), (["tower"], None), (["decoder"], None), (["connector", "tower"], None)],
)
def test_frozen_parts_keep_the_identity_of_the_former_switch(freeze: list[str], former_hash: str | None) -> None:
    job = TrainJob.model_validate(JOB | {"connector": {"type": "identity"}, "training": {"steps": 5, "freeze": freeze}})
    former = decisive(job.model_dump(mode="json", exclude_none=True))
    assert former["training"]["freeze_vision"] == ("tower" in freeze)
    assert former["training"].get("freeze", []) == [part for part in freeze if part != "tower"]
    if former_hash is not None:
        assert identity(job) == f"train-x-{former_hash}"


def test_keys_that_only_change_memory_keep_the_identity(tmp_path: Path) -> None:
    path = _write(tmp_path)
    first = identity(load_job(path))
    assert identity(load_job(path, ["training.activation_checkpointing=true"])) == first
    assert identity(load_job(path, ["training.loss_mean=prompts", "training.group_by_tokens=false"])) == first
    assert identity(load_job(path, ["training.loss_mean=tokens"])) != first
    assert identity(load_job(path, ["training.lora.decoder.rank=8"])) != first
