import functools

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import save_file

from parcelray.errors import UserError
from parcelray.evaluation.predict import PYFUNC_FILE
from parcelray.models.checkpoint import resolve_checkpoint
from parcelray.models.manifest import write_manifest
from parcelray.tracking.mlflow_tracker import end_run, start_run
from parcelray.tracking.registry import SIGNATURE, promote, register_model, resolve_registry, rollback

from ..stores import new_store

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload``:DeprecationWarning")


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return new_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def client(uri):
    return MlflowClient(tracking_uri=uri)


@pytest.fixture(scope="module")
def run_id(uri):
    run = start_run(uri, "registry", "train-a-00000000", params={})
    end_run(uri, run, "FINISHED")
    return run


def checkpoint_folder(path, value):
    path.mkdir()
    save_file({"weight": torch.full((4,), float(value))}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    write_manifest(path, config={}, git_commit="abc123", data={}, seed=0)
    return path


@pytest.fixture(scope="module")
def versions(uri, run_id, tmp_path_factory):
    """Three versions of the model `parcel`, with weights of 1, 2 and 3."""
    root = tmp_path_factory.mktemp("checkpoints")
    return [
        register_model(
            uri,
            checkpoint_folder(root / str(i), i),
            "parcel",
            run_id,
            pyfunc_file=PYFUNC_FILE,
            tags={"score": f"0.{i}"},
        )
        for i in (1, 2, 3)
    ]


def test_versions_have_tags_of_their_origin_and_the_run_stays_finished(client, run_id, versions):
    assert versions == [1, 2, 3]
    version = client.get_model_version("parcel", "2")
    assert version.run_id == run_id
    assert version.tags["score"] == "0.2"
    assert version.tags["parcel.git_commit"] == "abc123"
    assert version.tags["parcel.content"].startswith("sha256:")
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert len(run.outputs.model_outputs) == 3


def test_a_version_is_a_model_from_code_without_pickles_or_local_paths(uri, versions, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "False")
    folder, _ = resolve_registry("models:/parcel/1", uri)
    root = folder.parent.parent
    assert not [path for path in root.rglob("*") if path.suffix in (".pkl", ".pt", ".bin")]
    assert "parcelray/tracking" not in (root / "MLmodel").read_text()
    import mlflow.pyfunc

    model = mlflow.pyfunc.load_model(str(root))
    assert model.metadata.signature == SIGNATURE
    assert model.input_example["num_visual_tokens"].tolist() == [64]


def test_the_same_content_from_the_same_run_is_registered_once(uri, run_id, versions, tmp_path):
    assert register_model(uri, checkpoint_folder(tmp_path / "again", 2), "parcel", run_id, pyfunc_file=PYFUNC_FILE) == 2


def test_promotion_keeps_the_former_champion_as_previous_and_rollback_swaps_them(uri, client, versions):
    def aliases():
        # A database returns numbers, a tracking server returns strings.
        return {alias: int(version) for alias, version in client.get_registered_model("parcel").aliases.items()}

    with pytest.raises(UserError, match="no previous champion"):
        rollback(uri, "parcel")
    promote(uri, "parcel", 1)
    assert aliases() == {"champion": 1}
    promote(uri, "parcel", 2)
    promote(uri, "parcel", 2)
    promote(uri, "parcel", 3, alias="challenger")
    assert aliases() == {"champion": 2, "previous": 1, "challenger": 3}
    assert rollback(uri, "parcel") == 1
    assert aliases() == {"champion": 1, "previous": 2, "challenger": 3}


def test_promotion_is_refused_if_the_champion_is_not_the_expected_one(uri, client, versions):
    promote(uri, "parcel", 1)
    with pytest.raises(
        UserError,
        match=r"champion of model 'parcel' pointed to version 3 when .* was made, and points to version 1 now",
    ):
        promote(uri, "parcel", 2, expected=3)
    with pytest.raises(UserError, match=r"pointed to no version when .* was made, and points to version 1 now"):
        promote(uri, "parcel", 2, expected=None)
    assert int(client.get_registered_model("parcel").aliases["champion"]) == 1
    promote(uri, "parcel", 2, expected=1)
    assert int(client.get_registered_model("parcel").aliases["champion"]) == 2
    promote(uri, "parcel", 2, expected=1)


def test_a_crash_between_two_alias_moves_leaves_a_valid_champion(uri, client, versions, monkeypatch):
    def aliases():
        return {
            alias: int(version)
            for alias, version in client.get_registered_model("parcel").aliases.items()
            if alias in ("champion", "previous")
        }

    real = MlflowClient.set_registered_model_alias

    def crash_at(alias):
        def move(self, name, moved, version):
            if moved == alias:
                raise KeyboardInterrupt
            real(self, name, moved, version)

        monkeypatch.setattr(MlflowClient, "set_registered_model_alias", move)

    promote(uri, "parcel", 1)
    promote(uri, "parcel", 2)
    crash_at("champion")
    with pytest.raises(KeyboardInterrupt):
        promote(uri, "parcel", 3)
    assert aliases() == {"champion": 2, "previous": 2}, "the champion alias has not moved yet"
    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", real)
    with pytest.raises(UserError, match="no previous champion"):
        rollback(uri, "parcel")
    promote(uri, "parcel", 3)
    assert aliases() == {"champion": 3, "previous": 2}
    crash_at("previous")
    with pytest.raises(KeyboardInterrupt):
        rollback(uri, "parcel")
    assert aliases()["champion"] == 2, "the restored version is the champion before `previous` moves"


@pytest.mark.parametrize("alias", ["latest", "Latest", "v3", "V12", "previous", "", "a b"])
def test_reserved_aliases_are_refused(uri, versions, alias):
    with pytest.raises(UserError, match="cannot be set"):
        promote(uri, "parcel", 1, alias=alias)


def test_an_alias_resolves_to_a_pinned_version_with_verified_files(uri, versions):
    resolver = functools.partial(resolve_registry, tracking_uri=uri)
    promote(uri, "parcel", 3, alias="candidate")
    resolved = resolve_checkpoint("models:/parcel@candidate", registry_resolver=resolver)
    assert resolved.pinned == "models:/parcel/3"
    assert resolve_checkpoint(resolved.pinned, registry_resolver=resolver).path == resolved.path
    weights = resolved.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match=r"model\.safetensors .* SHA-256"):
        resolve_checkpoint("models:/parcel@candidate", registry_resolver=resolver)


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("models:/parcel@nope", "no alias 'nope'; its aliases are: .*Promote"),
        ("models:/parcel/9", "no version 9; its versions are: 1, 2, 3"),
        ("models:/nobody@champion", "no registered model 'nobody'; the registered models are: parcel"),
        ("models:/parcel/latest", "malformed"),
        ("models:/parcel", "malformed"),
    ],
)
def test_unknown_references_are_refused_with_the_known_ones(uri, versions, reference, says):
    with pytest.raises(UserError, match=says):
        resolve_registry(reference, uri)


def test_promoting_an_unknown_version_is_refused(uri, versions):
    with pytest.raises(UserError, match="no version 7"):
        promote(uri, "parcel", 7)


def test_a_checkpoint_without_manifest_or_with_pickles_is_not_registered(uri, run_id, tmp_path):
    folder = checkpoint_folder(tmp_path / "model", 1)
    (folder / "training_args.bin").write_bytes(b"")
    with pytest.raises(UserError, match="can run code"):
        register_model(uri, folder, "parcel", run_id, pyfunc_file=PYFUNC_FILE)
    (folder / "training_args.bin").unlink()
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="write_manifest"):
        register_model(uri, folder, "parcel", run_id, pyfunc_file=PYFUNC_FILE)
    with pytest.raises(UserError, match="is not legal"):
        register_model(uri, folder, "org/parcel", run_id, pyfunc_file=PYFUNC_FILE)
