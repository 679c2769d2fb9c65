"""The command line as a user runs it: output, error messages and exit codes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.core import TyperOption

from parcelray import cli
from parcelray.config.loader import load_job_of
from parcelray.config.tune import TuneJob
from parcelray.models.manifest import verify_manifest
from parcelray.profiling.reduction_table import REDUCERS
from parcelray.tracking.run_folder import RunFolder
from parcelray.tuning.trial_record import FinishedTrial, TrialRecord, point_key

from ..training.conftest import TINY, few_tokenizer_texts

BASE = "jobs/train/mini_base.yaml"
# Libraries that --help must not load.
HEAVY = ("torch", "ray", "mlflow", "transformers", "pydantic", "pyarrow", "numpy")


@pytest.fixture(autouse=True)
def _few_tokenizer_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    few_tokenizer_texts(monkeypatch)


def _job_file(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.yaml"
    tracking = {"uri": f"sqlite:///{folder}/mlflow.db"}
    path.write_text(
        yaml.safe_dump(TINY | {"storage": str(folder / "runs"), "tracking": tracking} | changes), encoding="utf-8"
    )
    return path


def test_help_loads_no_heavy_library() -> None:
    program = (
        "import sys; sys.argv = ['parcelray', '--help']\n"
        "from parcelray.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        f"sys.stderr.write(' '.join(name for name in {HEAVY!r} if name in sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stderr == ""
    order = ["Run", "train", "tune", "evaluate", "serve", "Cluster", "submit", "jobs"]
    order += ["Inspect", "models", "benchmarks", "flops", "analyze", "bench", "Set up", "doctor", "config", "keys"]
    # Each name opens a line, behind the border of a panel: `- Run ---` or `| train   Train a model`.
    lines = [line.lstrip("\u2502\u256d\u2500|+- ") for line in found.stdout.splitlines()]
    openings = [next((name for name in order if f"{line} ".startswith(f"{name} ")), None) for line in lines]
    assert [name for name in openings if name] == order


def test_every_option_describes_its_value_and_default() -> None:
    without = [
        f"{path} {parameter.name}"
        for path, command in _commands(typer.main.get_command(cli.app), "parcelray")
        for parameter in command.params
        if not parameter.help
        or (
            # A flag is off by default; typer prints the default of other options unless it is switched off.
            isinstance(parameter, TyperOption)
            and not parameter.is_flag
            and not parameter.show_default
            and "default:" not in parameter.help
            and not parameter.help.startswith("With --")
        )
    ]
    assert without == []


def _commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yields a command and all commands below it, each with its path."""
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from _commands(below, f"{path} {name}")


def test_version(run: Any) -> None:
    assert run("--version").out.startswith("parcelray 0.")


def test_validate_prints_the_identity_of_a_legal_job_file(run: Any) -> None:
    found = run("config", "validate", BASE)
    assert found.code == 0
    assert "is legal: train-mini_base-" in found.out


def test_show_fills_in_the_defaults_and_can_be_read_back(run: Any, tmp_path: Path) -> None:
    shown = run("config", "show", BASE, "--set", "training.steps=7")
    data = yaml.safe_load(shown.out)
    assert data["training"]["steps"] == 7
    assert data["training"]["strategy"] == "ddp"
    again = tmp_path / "again.yaml"
    again.write_text(shown.out, encoding="utf-8")
    assert json.loads(run("config", "show", str(again), "--json").out) == data


def test_config_schema_prints_a_json_schema(run: Any) -> None:
    schema = json.loads(run("config", "schema", "train").out)
    assert schema["additionalProperties"] is False
    assert {"model", "data", "training"} <= set(schema["properties"])
    assert run("config", "schema", "trian").code == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("config", "validate", "nowhere.yaml"), ("nowhere.yaml", "cannot be read")),
        (("config", "validate", BASE, "--set", "training.stepz=3"), (BASE, "training.stepz", "did you mean", "steps")),
        (("config", "validate", BASE, "--set", "training.steps=many"), (BASE, "training.steps", "many", "integer")),
        (
            ("config", "validate", BASE, "--set", "training.steps=0"),
            (BASE, "training.steps", "0", "greater than or equal to 1"),
        ),
        (("config", "validate", BASE, "--set", "optimizer.type=adam"), (BASE, "optimizer", "adam", "adamw")),
        (
            ("train", BASE, "--dry-run", "--set", "connector={type: m3}", "--set", "budget.budgets=[100]"),
            ("100", "legal budgets are", "256"),
        ),
        (("flops", "--budgets", "16,x"), ("--budgets", "16,x", "whole numbers")),
        (("flops", "--connector", "pca"), ("pca", "parcel")),
        (("flops", "--backbone", "nowhere"), ("nowhere", "paligemma2-3b")),
        (("flops", "--reducer", "fastvv"), ("fastvv", "did you mean fastv?")),
        (("flops", "--reducer", "scope", "--connector", "m3"), ("--reducer scope", "--connector is m3")),
        (("flops", "--reducer", "average_pooling", "--budgets", "65"), ("65", "legal budgets are")),
        (("flops", "--backbone", "llava-1.5-7b", "--reducer", "fastv", "--budgets", "16"), ("16", "37 to 576")),
    ],
)
def test_a_user_error_is_one_message_and_exit_code_2(
    run: Any, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    found = run(*arguments)
    assert found.code == 2
    assert "Traceback" not in found.err
    for word in words:
        assert word in found.err


def test_flops_of_the_backbone_of_the_paper(run: Any) -> None:
    assert "connector" in run("flops", "--budgets", "16,256").out
    data = json.loads(run("flops", "--budgets", "16,256", "--frames", "1,16", "--json").out)
    assert data["backbone"]["name"] == "paligemma2-3b"
    assert [(row["num_visual_tokens"], row["num_frames"]) for row in data["rows"]] == [
        (16, 1),
        (256, 1),
        (16, 16),
        (256, 16),
    ]
    for row in data["rows"]:
        assert sum(row["terms"].values()) == row["total_flops"]


@pytest.mark.parametrize("reducer", REDUCERS)
def test_flops_of_every_reducer(run: Any, reducer: str) -> None:
    arguments = ("flops", "--backbone", "llava-1.5-7b", "--reducer", reducer, "--budgets", "64")
    printed = run(*arguments)
    assert (printed.code, printed.err) == (0, "")
    assert "576 -> 64" in printed.out
    found = run(*arguments, "--json")
    (row,) = json.loads(found.out)["rows"]
    assert found.code == 0
    assert row["terms"]["reducer"] == row["reducer_flops"]
    assert sum(row["terms"].values()) == row["total_flops"]


def test_a_dry_run_shows_the_plan_and_computes_nothing(run: Any, tmp_path: Path) -> None:
    arguments = ("train", BASE, "--dry-run", "--set", f"storage={tmp_path}", "--set", "tracking.uri=null")
    assert "train-mini_base-" in run(*arguments).out
    plan = json.loads(run(*arguments, "--json").out)
    longer = json.loads(
        run(*arguments, "--json", "--set", f"training.steps={2 * plan['config']['training']['steps']}").out
    )
    assert longer["flops"] == 2 * plan["flops"] > 0
    assert plan["start"] == "random weights"
    assert plan["budgets"] == [256]
    assert list(tmp_path.iterdir()) == []


def test_a_training_runs_once_and_another_configuration_is_refused_under_its_name(run: Any, tmp_path: Path) -> None:
    path = _job_file(tmp_path)
    first = run("train", str(path), "--json")
    assert first.code == 0, first.err
    result = json.loads(first.out)
    assert result["was_done"] is False
    assert verify_manifest(Path(result["model"])).seed == 3
    again = run("train", str(path), "--json")
    assert json.loads(again.out) == result | {"was_done": True}
    assert "is finished; nothing to do" in again.err
    other = run("train", str(path), "--set", "seed=4")
    assert other.code == 2
    assert "seed: 3 -> 4" in other.err
    assert "another name" in other.err


def test_submit_dry_run_prints_the_submission_and_needs_no_cluster(run: Any) -> None:
    arguments = ("submit", BASE, "--dry-run", "--set", "seed=5", "--address", "http://127.0.0.1:1")
    sent = json.loads(run(*arguments, "--json").out)
    assert sent["identity"].startswith("train-mini_base-")
    assert sent["entrypoint"] == f"python -m parcelray.cli train {BASE} --set seed=5"
    assert sent["address"] == "http://127.0.0.1:1"
    assert sent["num_files"] > 100
    assert sum(sent["largest"].values()) <= sent["num_bytes"]
    assert len(sent["git_commit"]) == 40
    shown = run(*arguments)
    assert shown.code == 0
    assert sent["identity"] in shown.out
    assert shown.err.startswith("warning: storage (runs) and tracking.uri")


def test_a_user_error_in_a_separate_process(repo_root: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "parcelray.cli", "config", "validate", "nowhere.yaml"],
        cwd=repo_root,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 2
    assert found.stderr.startswith("error: nowhere.yaml")
    assert found.stdout == ""


def test_an_analysis_of_an_unknown_model_is_refused(run: Any) -> None:
    found = run("analyze", "saliency", "nothing")
    assert found.code == 2
    assert "neither an existing folder nor mini_base, mini_llava" in found.err


def test_an_analysis_of_budgets_that_are_no_numbers_is_refused(run: Any) -> None:
    found = run("analyze", "tokens", "mini_base", "--budgets", "16,all")
    assert found.code == 2
    assert "--budgets is '16,all'; give whole numbers" in found.err


def test_dry_run_of_an_evaluation_with_a_reducer(run: Any) -> None:
    found = run("evaluate", "run", "jobs/evaluate/training_free.yaml", "--dry-run", "--json")
    assert found.code == 0
    assert json.loads(found.out)["budgets"] == [13, 28, 51, 77]


def test_an_empty_registry_and_job_files_of_another_kind(run: Any, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert json.loads(run("models", "list", "--tracking-uri", uri, "--json").out) == {"models": []}
    for command in ("show", "rollback"):
        found = run("models", command, "nobody", "--tracking-uri", uri)
        assert (found.code, found.err) == (
            2,
            "error: There is no registered model 'nobody'; the registered models are: none.",
        )
    found = run("models", "promote", "jobs/evaluate/mini.yaml")
    assert found.code == 2
    assert "this command runs promote jobs; run it with `parcelray evaluate jobs/evaluate/mini.yaml`" in found.err
    found = run("evaluate", "run", "jobs/promote/mini.yaml")
    assert "run it with `parcelray models promote jobs/promote/mini.yaml`" in found.err
    sent = json.loads(
        run("submit", "jobs/promote/mini.yaml", "--dry-run", "--address", "http://127.0.0.1:1", "--json").out
    )
    assert sent["entrypoint"] == "python -m parcelray.cli models promote jobs/promote/mini.yaml"


def test_select_reads_only_the_trials_of_the_same_search(run: Any, tmp_path: Path, repo_root: Path) -> None:
    place = f"storage={tmp_path}"
    file = str(repo_root / "jobs" / "tune" / "cluster_count.yaml")
    RunFolder(load_job_of(TuneJob, file, [place])).claim()
    point = {"budgets": [64]}
    TrialRecord(tmp_path / "tune" / "cluster_count").add(
        FinishedTrial(point_key(point), point, {"retention": 90.0, "tokens": 64.0}, 1.0)
    )
    chosen = json.loads(run("tune", file, "--set", place, "--select", "max retention", "--json").out)
    assert (chosen["kind"], Path(chosen["evaluation"]).name) == ("serve", "selected_evaluate.yaml")
    # The selected reducer is served at the selected budget.
    served = run("serve", chosen["file"], "--dry-run", "--json")
    assert served.code == 0, served.err
    plan = json.loads(served.out)
    assert (plan["reducer"]["type"], list(plan["flops"])) == ("cluster_aggregate", ["64"])
    refused = run("serve", chosen["file"], "--dry-run", "--set", "budgets={offered: [300]}")
    assert (refused.code, "does not support 300 visual tokens" in refused.err) == (2, True)
    other = run("tune", file, "--set", place, "--set", "seed=5", "--select", "max retention")
    assert other.code == 2
    assert "whose configuration differs from this one (seed: 0 -> 5)" in other.err
