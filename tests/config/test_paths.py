"""Path keys: absolute in the job that is read, `~` expanded, as written in identities, the same in every process."""

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

from parcelray.cli import app
from parcelray.cli.options import path
from parcelray.config.identity import config_hash
from parcelray.config.loader import JOB_MODELS, ConfigError, changed, load_job, validate
from parcelray.config.paths import AS_WRITTEN, WITH_TEXT, PathKey, PathText, written
from parcelray.config.train import TrainJob
from parcelray.config.tune import TuneJob

TRAIN: dict[str, Any] = {
    "kind": "train",
    "name": "x",
    "model": {"type": "checkpoint"},
    "data": {"type": "parquet", "path": "data/own"},
    "training": {"steps": 5},
}
EVALUATE: dict[str, Any] = {"kind": "evaluate", "name": "x", "benchmarks": [{"name": "own"}]}
PROMOTE: dict[str, Any] = {
    "kind": "promote",
    "name": "x",
    "model": "m",
    "benchmarks": [{"name": "own"}],
    "budgets": [16],
    "gates": {},
}
SERVE: dict[str, Any] = {"kind": "serve", "name": "x"}
TUNE: dict[str, Any] = {
    "kind": "tune",
    "name": "x",
    "space": {
        "kind": "search_space",
        "name": "s",
        "job": "jobs/train/x.yaml",
        "parameters": {"seed": {"type": "choice", "values": [0, 1]}},
    },
    "base": TRAIN,
    "algorithm": {"type": "grid"},
    "objectives": [{"metric": "train/loss", "mode": "min"}],
}
# Fields whose name or description sounds like a path of this machine, but which are none.
_NO_PATHS = {
    "VideoConfig.path": "a template relative to the data folder",
    "SearchSpace.job": "replaced by the content of the job file when a search is read",
    "JoinConfig.config": "the name of a configuration of a data set",
    "TracesConfig.exporter": "an import path",
    "SamplesSource.split": "the name of a split",
    "BenchmarkChoice.name": "a name",
    "BenchmarkDataConfig.name": "a name",
    "TrainJob.new_words": "words",
    "SearchSpace.parameters": "key paths",
}
_SOUNDS_LIKE_A_PATH = re.compile(r"\b(path|folder|folders|file|files|checkpoint|database|uri)\b", re.IGNORECASE)


def _models(root: type[BaseModel]) -> list[type[BaseModel]]:
    """Returns a model and all models that its fields contain."""
    found: dict[type[BaseModel], None] = {}

    def visit(annotation: Any) -> None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            if annotation not in found:
                found[annotation] = None
                for field in annotation.model_fields.values():
                    visit(field.annotation)
            return
        for argument in get_args(annotation):
            visit(argument)

    visit(root)
    return list(found)


def _holds(annotation: Any, metadata: Any, wanted: Any) -> bool:
    """Whether an annotation, its metadata or one of its arguments satisfies a condition."""
    return any(wanted(each) for each in (annotation, *metadata)) or any(
        _holds(argument, getattr(argument, "__metadata__", ()), wanted) for argument in get_args(annotation)
    )


def test_every_path_field_of_every_job_has_the_path_type() -> None:
    models = {model for job in JOB_MODELS.values() for model in _models(job)}
    suspects, typed = [], set()
    for model in models:
        for name, field in model.model_fields.items():
            full = f"{model.__name__}.{name}"
            if _holds(field.annotation, field.metadata, lambda each: isinstance(each, PathKey)):
                typed.add(full)
            elif full not in _NO_PATHS and _holds(field.annotation, (), lambda each: each in (str, Path)):
                text = f"{name.replace('_', ' ')} {(field.description or '').splitlines()[0]}"
                suspects += [full] if _SOUNDS_LIKE_A_PATH.search(text) else []
    assert suspects == [], "use LocalPath, ModelReference or TrackingUri of config/paths.py"
    assert typed >= {
        "NlvrDataConfig.path",
        "ParquetDataConfig.path",
        "BenchmarkChoice.data",
        "CheckpointModelConfig.reference",
        "ServedModelConfig.reference",
        "EvaluateJob.catalog",
        "PromoteJob.catalog",
        "PromoteJob.candidate",
        "EvaluateJob.mask_decoder",
        "InputPolicyConfig.predictor",
        "HttpConfig.keys_file",
        "TrackingConfig.uri",
        "TuneJob.baselines",
        *(f"{job}.storage" for job in ("TrainJob", "EvaluateJob", "TuneJob", "PromoteJob")),
    }


def test_no_default_was_resolved_when_its_module_was_imported() -> None:
    def resolved(value: Any) -> bool:
        return isinstance(value, PathText) or (
            isinstance(value, BaseModel) and any(resolved(each) for _, each in value if str(each).startswith("/"))
        )

    fields = [field for job in JOB_MODELS.values() for model in _models(job) for field in model.model_fields.values()]
    assert [field.default for field in fields if resolved(field.default)] == []


@pytest.mark.parametrize(
    ("data", "in_process"),
    [
        (TRAIN, {"scaling": {"num_workers": 0}}),
        (EVALUATE, {"compute": {"actors": 0}}),
        (PROMOTE, {"compute": {"actors": 0}}),
    ],
)
def test_storage_in_memory_is_only_for_jobs_in_one_process(data: dict[str, Any], in_process: dict[str, Any]) -> None:
    job = JOB_MODELS[data["kind"]]
    with pytest.raises(ConfigError, match="memory://runs exists only in the process that writes it"):
        validate(job, data | {"storage": "memory://runs"}, "job")
    validate(job, data | {"storage": "memory://runs"} | in_process, "job")


@pytest.mark.parametrize(
    ("data", "key", "value", "expected"),
    [
        (TRAIN, "data.path", "data/own", "{cwd}/data/own"),
        (TRAIN, "data.path", "../own/", "{parent}/own"),
        (TRAIN, "data.path", "~/own", "{home}/own"),
        (TRAIN, "data.path", "/data/own", "/data/own"),
        (TRAIN, "storage", "runs", "{cwd}/runs"),
        (TRAIN, "storage", "~", "{home}"),
        (TRAIN, "storage", "s3://bucket/runs", "s3://bucket/runs"),
        (TRAIN, "storage", "gs://bucket/runs", "gs://bucket/runs"),
        (TRAIN, "tracking.uri", "sqlite:///runs/mlflow.db", "sqlite:///{cwd}/runs/mlflow.db"),
        (TRAIN, "tracking.uri", "sqlite:///~/mlflow.db?timeout=9", "sqlite:///{home}/mlflow.db?timeout=9"),
        (TRAIN, "tracking.uri", "sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        (TRAIN, "tracking.uri", "sqlite:///:memory:", "sqlite:///:memory:"),
        (TRAIN, "tracking.uri", "http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        (TRAIN, "tracking.uri", "mlruns", "mlruns"),
        (TRAIN, "model.reference", "mini_base", "mini_base"),
        (TRAIN, "model.reference", "runs/train/x/model", "{cwd}/runs/train/x/model"),
        (TRAIN, "model.reference", "there", "{cwd}/there"),
        (TRAIN, "model.reference", "there/inside", "{cwd}/there/inside"),
        (TRAIN, "model.reference", "org/model", "org/model"),
        (TRAIN, "model.reference", "org/model@v1/a", "org/model@v1/a"),
        (TRAIN, "model.reference", "hf:org/model@v1", "hf:org/model@v1"),
        (TRAIN, "model.reference", "./org/model", "{cwd}/org/model"),
        (TRAIN, "model.reference", "~/model", "{home}/model"),
        (TRAIN, "model.reference", "models:/name@champion", "models:/name@champion"),
        (TRAIN, "model.reference", "s3://bucket/model", "s3://bucket/model"),
        (EVALUATE, "benchmarks.0.data", "own", "{cwd}/own"),
        (EVALUATE, "catalog", ["own.yaml", "~/more"], ["{cwd}/own.yaml", "{home}/more"]),
        (EVALUATE, "mask_decoder", "vae.npz", "{cwd}/vae.npz"),
        (EVALUATE, "model.reference", "a/b/c", "{cwd}/a/b/c"),
        (EVALUATE, "reference.reference", "~/full", "{home}/full"),
        (PROMOTE, "candidate", "3", "3"),
        (PROMOTE, "candidate", "challenger", "challenger"),
        (PROMOTE, "candidate", "runs/train/x/model", "{cwd}/runs/train/x/model"),
        (PROMOTE, "catalog", ["own"], ["{cwd}/own"]),
        (SERVE, "model.reference", "there", "{cwd}/there"),
        (SERVE, "http.keys_file", "~/keys.txt", "{home}/keys.txt"),
        (SERVE, "budgets.policy", {"type": "input", "predictor": "p"}, {"predictor": "{cwd}/p"}),
    ],
)
def test_paths_are_absolute_in_the_job_that_is_read(
    data: dict[str, Any], key: str, value: Any, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, home = tmp_path / "here", tmp_path / "home"
    (here / "there" / "inside").mkdir(parents=True)
    home.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    file = here / "job.yaml"
    file.write_text(yaml.safe_dump(data))
    by_set = load_job(file, [f"{key}={yaml.safe_dump(value, default_flow_style=True).strip().removesuffix('...')}"])
    assert _at(by_set, key, expected) == _filled(expected, cwd=here, parent=tmp_path, home=home)
    # The same value in the file itself.
    file.write_text(yaml.safe_dump(by_set.model_dump(mode="json", exclude_unset=True, context=AS_WRITTEN)))
    assert load_job(file) == by_set


def _at(job: Any, key: str, expected: Any) -> Any:
    value = job
    for part in key.split("."):
        value = value[int(part)] if part.isdecimal() else getattr(value, part)
    if isinstance(expected, list):
        return list(value)
    if isinstance(expected, dict) and isinstance(value, BaseModel):
        return {name: getattr(value, name) for name in expected}
    return value


def _filled(expected: Any, **names: Path) -> Any:
    if isinstance(expected, list):
        return [each.format(**names) for each in expected]
    if isinstance(expected, dict):
        return {name: each.format(**names) for name, each in expected.items()}
    return expected.format(**names)


def test_the_home_of_an_unknown_user_is_refused_with_one_sentence() -> None:
    with pytest.raises(
        ConfigError, match=r"^job: storage is .*: ~nobody-here/runs starts with the home folder of an unknown"
    ):
        validate(TrainJob, TRAIN | {"storage": "~nobody-here/runs"}, "job")


def test_the_identity_counts_the_text_and_not_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        job = validate(TrainJob, TRAIN, "job")
        assert job.data.model_dump()["path"] == f"{tmp_path}/{name}/data/own"
        hashes.append(config_hash(job))
    # The identity of the same job before paths were made absolute.
    assert hashes == ["bd270350"] * 2
    absolute = validate(
        TrainJob, TRAIN | {"data": {"type": "parquet", "path": str(tmp_path / "b" / "data/own")}}, "job"
    )
    assert absolute == job
    assert config_hash(absolute) != hashes[0]


def test_a_job_keeps_its_paths_and_identity_in_another_process_and_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = validate(TrainJob, TRAIN, "job")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    copies = {
        "pickled": pickle.loads(pickle.dumps(job)),
        "copied": copy.deepcopy(job),
        "dumped": TrainJob.model_validate(job.model_dump()),
        "dumped to JSON": TrainJob.model_validate(job.model_dump(mode="json", context=WITH_TEXT)),
        "changed": changed(job, {}, "the search", folder=str(tmp_path)),
    }
    for how, each in copies.items():
        assert each == job, how
        assert config_hash(each) == config_hash(job), how
    moved = changed(job, {"data.path": "more"}, "the search", folder=str(tmp_path))
    assert moved.model_dump()["data"]["path"] == f"{tmp_path}/more"
    assert written(moved.model_dump()["data"]["path"]) == "more"
    plain = TrainJob.model_validate(job.model_dump(mode="json"))
    assert plain == job, "a plain dump has absolute paths"


def test_the_paths_of_a_search_and_its_jobs_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(TRAIN))
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(TUNE["space"] | {"job": "train.yaml"}))
    (tmp_path / "search.yaml").write_text(
        yaml.safe_dump(TUNE | {"space": "space.yaml", "base": {"storage": "elsewhere"}})
    )
    job = load_job(tmp_path / "search.yaml", ["baselines.M3=runs/train/m3/model"])
    assert isinstance(job, TuneJob)
    assert job.baselines == {"M3": f"{tmp_path}/runs/train/m3/model"}
    assert isinstance(job.base, TrainJob)
    assert job.base.storage == f"{tmp_path}/elsewhere"
    assert job.base.model_dump()["data"]["path"] == f"{tmp_path}/data/own"


def _commands(group: typer.Typer) -> list[Callable[..., Any]]:
    own = [command.callback for command in group.registered_commands if command.callback is not None]
    below = [
        each for inner in group.registered_groups if inner.typer_instance for each in _commands(inner.typer_instance)
    ]
    return own + below


def test_every_path_option_of_a_command_expands_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/users/somebody")
    options = {
        f"{command.__name__} {name}": annotation
        for command in _commands(app)
        for name, annotation in get_type_hints(command, include_extras=True).items()
        if _holds(annotation, (), lambda each: each is Path)
    }
    assert len(options) > 20
    parsers = {name: annotation.__metadata__[0].parser for name, annotation in options.items()}
    assert [name for name, parser in parsers.items() if parser is not path] == []
    assert path("~/runs") == Path("/users/somebody/runs")
    result = CliRunner().invoke(app, ["config", "validate", "~/no-such-job.yaml"])
    assert "/users/somebody/no-such-job.yaml" in str(result.exception)
