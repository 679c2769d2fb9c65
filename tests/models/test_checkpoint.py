"""Resolving model references, and writing and verifying manifests."""

import json

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

import parcelray
from parcelray.errors import UserError
from parcelray.models.checkpoint import resolve_checkpoint
from parcelray.models.manifest import read_manifest, refuse_pickles, verify_manifest, write_manifest


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    save_file({"weight": torch.arange(4.0)}, path / "model.safetensors")
    (path / "config.json").write_text('{"model_type": "x"}')
    (path / "extra").mkdir()
    (path / "extra" / "chat.jinja").write_text("hello")
    return path


def written(folder):
    return write_manifest(
        folder, config={"lr": 0.1}, git_commit="abc", data={"name": "mini"}, seed=7, extra={"score": 0.5}
    )


def test_a_manifest_records_provenance_and_checksums(folder):
    path = written(folder)
    manifest = verify_manifest(folder)
    assert path.name == "manifest.json"
    assert sorted(manifest.files) == ["config.json", "extra/chat.jinja", "model.safetensors"]
    assert manifest.files["extra/chat.jinja"].bytes == 5
    assert (
        manifest.files["extra/chat.jinja"].sha256 == "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    )
    assert (manifest.git_commit, manifest.seed, manifest.config, manifest.data, manifest.extra) == (
        "abc",
        7,
        {"lr": 0.1},
        {"name": "mini"},
        {"score": 0.5},
    )


def test_a_changed_file_is_named(folder):
    written(folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"model\.safetensors in .* has SHA-256"):
        verify_manifest(folder)


def test_a_file_of_another_size_is_named(folder):
    written(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json in .* has 2 bytes, but its manifest lists 19"):
        verify_manifest(folder)


def test_a_missing_and_an_unlisted_file_are_named(folder):
    written(folder)
    (folder / "added.json").write_text("{}")
    with pytest.raises(UserError, match=r"contains added\.json, which its manifest does not list"):
        verify_manifest(folder)
    (folder / "added.json").rename(folder / "config.json")
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"lacks config\.json"):
        verify_manifest(folder)


def test_a_manifest_cannot_reach_outside_its_folder(folder):
    path = written(folder)
    content = json.loads(path.read_text())
    content["files"]["../model/config.json"] = content["files"].pop("config.json")
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"lacks \.\./model/config\.json"):
        verify_manifest(folder)


@pytest.mark.parametrize("content", ["{}", "not json", '{"format": 2}'])
def test_an_invalid_manifest_is_refused(folder, content):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="is not a manifest of format 1"):
        read_manifest(folder)


def test_a_folder_without_a_manifest_is_refused(folder):
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        verify_manifest(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "extra/data.PKL", "last.ckpt"])
def test_pickles_are_refused_by_name(folder, name):
    refuse_pickles(folder)
    (folder / name).write_bytes(b"")
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        refuse_pickles(folder)
    with pytest.raises(UserError, match="can run code"):
        resolve_checkpoint(folder)


def test_a_folder_is_pinned_by_its_content(folder):
    before = resolve_checkpoint(folder)
    assert before.path == folder
    assert before.pinned.startswith("sha256:")
    written(folder)
    assert resolve_checkpoint(str(folder)).pinned == before.pinned
    (folder / "manifest.json").unlink()
    (folder / "config.json").write_text("{}")
    assert resolve_checkpoint(folder).pinned != before.pinned


def test_a_folder_that_differs_from_its_manifest_is_refused(folder):
    written(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json"):
        resolve_checkpoint(folder)


def test_a_folder_without_safetensors_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        resolve_checkpoint(folder)


def test_registry_references_are_resolved_once(folder):
    references = []

    def resolver(reference):
        references.append(reference)
        return folder, "models:/parcel/3"

    resolved = resolve_checkpoint("models:/parcel@champion", registry_resolver=resolver)
    assert resolved[:2] == (folder, "models:/parcel@champion")
    assert resolved.pinned == "models:/parcel/3"
    assert references == ["models:/parcel@champion"]
    with pytest.raises(UserError, match="needs a model registry"):
        resolve_checkpoint("models:/parcel@champion")


@pytest.mark.parametrize("reference", ["nowhere", "./nowhere/model", "/nowhere/model", "~/nowhere/model", "a/b/c", ""])
def test_an_invalid_reference_is_refused_with_the_legal_forms(reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="models:/NAME@ALIAS"):
        resolve_checkpoint(reference)


def test_the_packaged_base_is_resolved_or_reported_missing(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(parcelray, "__file__", str(tmp_path / "package" / "__init__.py"))
    with pytest.raises(UserError, match="does not contain the checkpoint 'mini_base'"):
        resolve_checkpoint("mini_base")
    (tmp_path / "package" / "assets").mkdir(parents=True)
    folder.rename(tmp_path / "package" / "assets" / "mini_base")
    assert resolve_checkpoint("mini_base").path == tmp_path / "package" / "assets" / "mini_base"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An offline machine with an empty Hub cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_model_that_is_not_cached_is_refused_offline(hub_cache):
    with pytest.raises(UserError, match="hf download org/name"):
        resolve_checkpoint("org/name")


def test_a_hub_model_is_pinned_to_its_commit(hub_cache, folder):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = hub_cache / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / commit)
    for reference in ("org/name", "hf:org/name", f"org/name@{commit}", f"hf:org/name@{commit}"):
        result = resolve_checkpoint(reference)
        assert result.pinned == f"hf:org/name@{commit}"
        assert result.path == repository / "snapshots" / commit
