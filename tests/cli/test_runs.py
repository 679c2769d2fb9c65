"""`parcelray runs` on a folder."""

import json
from pathlib import Path
from typing import Any


def test_runs_are_listed_copied_and_deleted_only_with_yes(run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "train" / "tiny"
    folder.mkdir(parents=True)
    (folder / "job.json").write_text('{"identity": "train-tiny-1"}')
    storage = f"--storage={tmp_path}/runs"
    listed = json.loads(run("runs", "list", storage, "--json").out)["runs"]
    assert [(each["name"], each["identity"], each["state"]) for each in listed] == [
        ("train/tiny", "train-tiny-1", "unfinished")
    ]
    assert "train/tiny" in run("runs", "list", storage).out
    pulled = run("runs", "pull", "train/tiny", storage, f"--output={tmp_path}/copy", "--json")
    assert json.loads(pulled.out) == {"folder": f"{tmp_path}/copy/train/tiny"}
    assert (tmp_path / "copy" / "train" / "tiny" / "job.json").is_file()
    assert "Nothing was deleted; add --yes to delete." in run("runs", "prune", "train/tiny", storage).out
    assert folder.is_dir()
    assert json.loads(run("runs", "prune", "train/tiny", storage, "--yes", "--json").out)["is_deleted"]
    assert not (folder / "job.json").exists()
    refused = run("runs", "prune", storage, "--yes")
    assert (refused.code, refused.err) == (
        2,
        "error: Nothing is selected; name runs as KIND/NAME, or set --older-than DAYS.",
    )
