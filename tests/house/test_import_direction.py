"""Modules import downwards only, heavy libraries stay where they belong, and no module outgrows its subject."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

LAYERS = (
    ("config", "errors"),
    ("models", "benchmarks", "data"),
    ("profiling", "analysis", "training", "evaluation"),
    ("tuning", "serving", "tracking", "reports"),
    ("cluster",),
    ("cli", "pipelines"),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
# A name stands for itself and everything below it; `data.ray_` stands for the modules whose names start so.
MAY_IMPORT = {
    "ray": (
        "training.trainer",
        "training.ray_worker",
        "training.train_loop",
        "training.progress_board",
        "tuning",
        "data.ray_",
        "evaluation.evaluate",
        "serving",
        "cluster",
    ),
    "mlflow": ("tracking",),
}
HEAVY = ("mlflow", "ray", "torch", "transformers")
MAX_LINES = 450


def _modules() -> dict[str, Path]:
    """Dotted names below the package (`training.step`), and the scripts as `pipelines.<name>`."""
    root = Path(__file__).resolve().parents[2]
    package = root / "platform" / "parcelray"
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found | {f"pipelines.{path.stem}": path for path in sorted((root / "pipelines").glob("*.py"))}


MODULES = _modules()
EVERY_MODULE = pytest.mark.parametrize("module", MODULES, ids=lambda name: name or "parcelray")


def imported_names(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Yields the absolute dotted names that a module imports anywhere: at its top, inside functions, for typing only."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            parent = ".".join([*base, *([node.module] if node.module else [])])
            yield parent
            yield from (f"{parent}.{alias.name}" for alias in node.names)


def wrong_direction(module: str, imports: Iterator[str]) -> list[str]:
    """Names of the package that lie above the module's own layer."""
    level = LEVEL[module.split(".")[0]]
    own = [name.removeprefix("parcelray.") for name in imports if name.startswith("parcelray.")]
    return sorted({name for name in own if LEVEL.get(name.split(".")[0], -1) > level})


def _imports(module: str) -> list[str]:
    path = MODULES[module]
    dotted = module if module.startswith("pipelines.") else f"parcelray.{module}".rstrip(".")
    return list(imported_names(path.read_text(encoding="utf-8"), dotted, path.stem == "__init__"))


def _is_allowed(module: str, places: tuple[str, ...]) -> bool:
    return any(module.startswith(place) if place.endswith("_") else module == place or module.startswith(f"{place}.") for place in places)


@EVERY_MODULE
def test_every_module_has_a_layer(module: str) -> None:
    assert module in ("", "__main__") or module.split(".")[0] in LEVEL, f"put {module} into a layer of design.md, or add one there and here"


@EVERY_MODULE
def test_imports_point_downwards(module: str) -> None:
    if module in ("", "__main__"):
        pytest.skip("the package itself has no layer")
    assert wrong_direction(module, iter(_imports(module))) == []


@EVERY_MODULE
def test_ray_and_mlflow_stay_where_they_belong(module: str) -> None:
    libraries = {name.split(".")[0] for name in _imports(module)}
    misplaced = [library for library, places in MAY_IMPORT.items() if library in libraries and not _is_allowed(module, places)]
    assert misplaced == [], f"{module} imports {misplaced}; legal places: {MAY_IMPORT}"


@EVERY_MODULE
def test_config_and_errors_import_nothing_heavy(module: str) -> None:
    libraries = {name.split(".")[0] for name in _imports(module)}
    assert module.split(".")[0] not in LAYERS[0] or libraries.isdisjoint(HEAVY)


@EVERY_MODULE
def test_modules_keep_one_subject(module: str) -> None:
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{module} has {lines} lines; split it by subject"


@pytest.mark.parametrize("start", ["config.loader", "errors", "cli"])
def test_light_modules_load_no_heavy_library(start: str, repo_root: Path) -> None:
    assert _loaded(start, repo_root) == set()


@pytest.mark.parametrize("start", ["serving.app", "training.ray_worker", "tuning.tune_run"])
def test_what_ray_loads_in_processes_without_a_model_needs_no_model_library(start: str, repo_root: Path) -> None:
    assert _loaded(start, repo_root) == {"ray"}


def _loaded(start: str, repo_root: Path) -> set[str]:
    code = f"import sys, parcelray.{start}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    return set(subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=True).stdout.split())


def test_the_guard_sees_every_kind_of_import() -> None:
    source = "import ray.train\nfrom parcelray.cluster import session\ndef f():\n    from . import step\n    from ..tracking import tracker\n"
    names = set(imported_names(source, "parcelray.training.trainer", is_package=False))
    assert names >= {"ray.train", "parcelray.cluster", "parcelray.cluster.session", "parcelray.training.step", "parcelray.tracking.tracker"}
    assert wrong_direction("training.trainer", iter(names)) == ["cluster", "cluster.session", "tracking", "tracking.tracker"]
    assert wrong_direction("cluster.jobs", iter(names)) == []
