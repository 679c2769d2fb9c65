"""The prediction store: keys, crashes, and damaged shards."""

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from parcelray.datasets.sample import Sample
from parcelray.errors import SystemFailure
from parcelray.evaluation.passes.store import Prediction, PredictionStore, prediction_key
from parcelray.evaluation.predict.generation import GenerationSettings

SETTINGS = GenerationSettings(max_new_tokens=8)
SAMPLE = Sample(id="1", benchmark="b", family="f", task="t", images=(b"one", b"two"), prompt="how many", answers=("2",))


def _prediction(name: str, model: str = "m", text: str = "2", benchmark: str = "b") -> Prediction:
    return Prediction(name, benchmark, name, model, 16, SETTINGS.to_json(), text, 2, False)


@pytest.fixture(params=["folder", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PredictionStore:
    monkeypatch.setattr("parcelray.files._LISTING_WAIT_S", 0.0)
    roots = {"folder": str(tmp_path), "memory": f"memory://{tmp_path}"}
    root = roots.get(request.param) or request.getfixturevalue("s3")
    return PredictionStore(f"{root}/answers")


def _key(sample: Sample = SAMPLE, **changes: Any) -> str:
    arguments: dict[str, Any] = {"model": "m", "num_visual_tokens": 16, "settings": SETTINGS} | changes
    return prediction_key(sample, **arguments)


@pytest.mark.parametrize(
    "other",
    [
        {"model": "n"},
        {"num_visual_tokens": 17},
        {"settings": GenerationSettings(max_new_tokens=9)},
        {"settings": GenerationSettings(max_new_tokens=8, dtype="bfloat16")},
        {"settings": GenerationSettings(max_new_tokens=8, decoding="beam", num_beams=2)},
        {"sample": dataclasses.replace(SAMPLE, prompt="how  many")},
        {"sample": dataclasses.replace(SAMPLE, id="2")},
        {"sample": dataclasses.replace(SAMPLE, benchmark="c")},
        {"sample": dataclasses.replace(SAMPLE, images=(b"two", b"one"))},
        {"sample": dataclasses.replace(SAMPLE, images=(b"onetwo",))},
    ],
)
def test_everything_that_can_change_a_prediction_changes_its_key(other: dict[str, Any]) -> None:
    assert _key(**other) != _key()


def test_fields_that_only_affect_scoring_do_not_change_the_key() -> None:
    assert (
        _key(
            dataclasses.replace(
                SAMPLE, answers=("3",), metric="anls", family="g", task="u", scene="s", metadata={"a": 1}
            )
        )
        == _key()
    )


def test_choices_change_the_key_only_with_likelihood_decoding() -> None:
    choosing = GenerationSettings(decoding="likelihood")
    first, second = (dataclasses.replace(SAMPLE, metadata={"choices": choices}) for choices in (["a", "b"], ["a", "c"]))
    assert _key(first) == _key(second)
    assert _key(first, settings=choosing) != _key(second, settings=choosing)
    letters = dataclasses.replace(SAMPLE, metadata={"choices": ["a", "b"], "candidates": ["A", "B"]})
    assert _key(letters) == _key(first)
    assert _key(letters, settings=choosing) != _key(first, settings=choosing)


def test_stored_predictions_are_read_back(store: PredictionStore) -> None:
    assert store.keys("b", "m") == frozenset()
    assert store.read("b", "m", ["a"]) == {}
    store.write([])
    store.write([_prediction("a"), _prediction("b", text="zwei, 2 \n"), _prediction("d", benchmark="c")])
    store.write([_prediction("c", model="n")])
    assert store.keys("b", "m") == {"a", "b"}
    assert store.keys("c", "m") == {"d"}
    assert store.keys("b", "n") == {"c"}
    assert store.read("b", "m", ["b", "c", "e"]) == {"b": _prediction("b", text="zwei, 2 \n")}


def test_a_shard_that_a_listing_shows_late_is_waited_for(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PredictionStore(s3)
    store.write([_prediction("a")])
    store.write([_prediction("b")])
    list_all, listings = store._filesystem.ls, []

    def list_late(path: str, detail: bool) -> Any:
        listings.append(path)
        return list_all(path, detail=detail)[: len(listings) - 1]

    monkeypatch.setattr(store._filesystem, "ls", list_late)
    monkeypatch.setattr("parcelray.evaluation.passes.store._POLL_S", 0.01)
    assert store.read("b", "m", ["a", "b"]).keys() == {"a", "b"}
    assert len(listings) == 3


def test_the_oldest_predictions_are_deleted_beyond_a_limit(
    store: PredictionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in ("old", "used", "new"):
        store.write([_prediction(model, model=model)])
    size = sum(store._filesystem.du(path) for path in store._shards("b", "old"))
    assert store.limit(1, []) == 0, "another evaluation may use shards of the last hour"
    monkeypatch.setattr("parcelray.evaluation.passes.store._IN_USE_S", -60.0)
    assert store.limit(4 * size, []) == 0
    assert store.limit(round(1.5 * size), [("b", "used")]) == 2
    assert [store.keys("b", model) for model in ("old", "used", "new")] == [set(), {"used"}, set()]


def test_a_shard_that_is_written_again_replaces_itself(tmp_path: Path) -> None:
    first, second = PredictionStore(str(tmp_path)), PredictionStore(str(tmp_path))
    first.write([_prediction("a"), _prediction("b")])
    second.write([_prediction("b"), _prediction("a")])
    assert len(list(tmp_path.rglob("*.parquet"))) == 1
    # Another shard with a prediction in common: the prediction is still returned once.
    second.write([_prediction("b"), _prediction("c")])
    assert sorted(first.read("b", "m", ["a", "b", "c"])) == ["a", "b", "c"]


def test_confidence_is_read_back_and_a_shard_without_it_is_ignored(tmp_path: Path) -> None:
    store = PredictionStore(str(tmp_path))
    store.write([_prediction("old")])
    (shard,) = tmp_path.rglob("*.parquet")
    pq.write_table(pq.read_table(shard).drop_columns(["mean_log_prob", "entropy"]), shard)
    sure = dataclasses.replace(_prediction("a"), mean_log_prob=-0.25, entropy=1.5)
    store.write([sure])
    assert store.read("b", "m", ["a"]) == {"a": sure}
    with pytest.raises(SystemFailure, match="remove it, and its predictions are computed again"):
        store.read("b", "m", ["old"])


def test_a_crash_during_a_write_leaves_earlier_shards_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PredictionStore(str(tmp_path))
    store.write([_prediction("a")])
    with monkeypatch.context() as crash:
        crash.setattr(Path, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.write([_prediction("b")])
    assert store.keys("b", "m") == {"a"}
    store.write([_prediction("b")])
    assert store.keys("b", "m") == {"a", "b"}
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2


def test_the_error_names_a_file_that_is_not_a_shard(tmp_path: Path) -> None:
    store = PredictionStore(str(tmp_path))
    store.write([_prediction("a")])
    (tmp_path / "b" / "m" / "other.parquet").write_bytes(b"nothing")
    with pytest.raises(SystemFailure, match=r"other\.parquet is not a shard of predictions"):
        store.keys("b", "m")
