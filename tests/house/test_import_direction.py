"""Imports point downwards without cycles, heavy libraries are imported only where allowed, and modules stay small."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

LAYERS = (
    ("errors", "console", "plotting", "environment"),
    ("files", "loopback", "s3_storage"),
    ("config",),
    ("models",),
    ("datasets",),
    ("benchmarks", "profiling"),
    ("tracking", "cluster"),
    ("evaluation",),
    ("analysis",),
    ("training",),
    ("serving",),
    ("tuning", "promotion"),
    ("studies", "bench", "doctor"),
    ("cli",),
    ("pipelines",),
)
_WITHOUT_A_LEVEL = ("", "__main__", "data")
"""The package itself, its entry point, and the module that refuses MLflow versions of an older layout."""
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
"""Folder -> its level. A folder imports only from lower levels; folders of one level do not import each other."""
# Library -> modules and packages (with everything in them) that may import it.
MAY_IMPORT = {
    "ray": (
        "cluster",
        "evaluation.passes.ray_pass",
        "training.trainer",
        "training.ray_worker",
        "training.train_loop",
        "training.batches.ray_reading",
        "serving",
        "tuning",
        "bench",
    ),
    "mlflow": ("tracking", "evaluation.predict.pyfunc_model"),
}
HEAVY = ("mlflow", "ray", "torch", "transformers")
MAX_LINES = 500


def _modules() -> dict[str, Path]:
    """Returns modules by dotted name inside the package (`training.step`), and the scripts as `pipelines.<name>`."""
    root = Path(__file__).resolve().parents[2]
    package = root / "platform" / "parcelray"
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found | {f"pipelines.{path.stem}": path for path in sorted((root / "pipelines").glob("*.py"))}


MODULES = _modules()


def imported_names(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Yields the absolute dotted names of all imports of a module, also those in functions and for typing only."""
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
    """Returns imported names of other folders of the package that are not below the level of the module."""
    part = module.split(".")[0]
    own = [name.removeprefix("parcelray.") for name in imports if name.startswith("parcelray.")]
    return sorted(
        {name for name in own if (other := name.split(".")[0]) != part and LEVEL.get(other, -1) >= LEVEL[part]}
    )


@cache
def _imports(module: str) -> list[str]:
    path = MODULES[module]
    dotted = module if module.startswith("pipelines.") else f"parcelray.{module}".rstrip(".")
    return list(imported_names(path.read_text(encoding="utf-8"), dotted, path.stem == "__init__"))


def _libraries(module: str) -> set[str]:
    return {name.split(".")[0] for name in _imports(module)}


def _is_allowed(module: str, allowed: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


def test_every_module_has_a_level() -> None:
    without_level = [
        module for module in MODULES if module not in _WITHOUT_A_LEVEL and module.split(".")[0] not in LEVEL
    ]
    assert without_level == [], "add each folder to LAYERS here and to docs/architecture.md"


def test_imports_point_downwards() -> None:
    # The package itself has no level.
    wrong = {
        module: wrong_direction(module, iter(_imports(module))) for module in MODULES if module.split(".")[0] in LEVEL
    }
    assert {module: names for module, names in wrong.items() if names} == {}


def test_no_modules_import_each_other_in_a_cycle() -> None:
    # A module may import its own package, to get a sibling module from it.
    graph = {
        module: (
            {
                name
                for each in _imports(module)
                if not f"{module}.".startswith(f"{(name := each.removeprefix('parcelray.'))}.")
            }
            & MODULES.keys()
        )
        for module in MODULES
    }
    order = TopologicalSorter(graph)
    # Raises CycleError with the modules of the cycle.
    assert len(list(order.static_order())) == len(MODULES)


def test_ray_and_mlflow_stay_where_they_belong() -> None:
    misplaced = [
        f"{module} imports {library}"
        for module in MODULES
        for library, allowed in MAY_IMPORT.items()
        if library in _libraries(module) and not _is_allowed(module, allowed)
    ]
    assert misplaced == [], f"allowed: {MAY_IMPORT}"


def test_config_and_errors_import_nothing_heavy() -> None:
    light = {"errors", "console", "config"}
    heavy = {module: _libraries(module) & set(HEAVY) for module in MODULES if module.split(".")[0] in light}
    assert heavy.keys() >= light
    assert {module: sorted(libraries) for module, libraries in heavy.items() if libraries} == {}


def test_modules_keep_one_subject() -> None:
    lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert {module: number for module, number in lines.items() if number > MAX_LINES} == {}, "split each by subject"


def test_light_modules_load_no_heavy_library(repo_root: Path) -> None:
    light = ("config.loader", "errors", "cli")
    assert _loaded(light, repo_root) == {module: [] for module in light}


def test_modules_of_ray_processes_without_a_model_load_no_model_library(repo_root: Path) -> None:
    modules = ("serving.app", "training.ray_worker", "tuning.tune_run")
    assert _loaded(modules, repo_root) == {module: ["ray"] for module in modules}


def _loaded(modules: tuple[str, ...], repo_root: Path) -> dict[str, list[str]]:
    """Returns the heavy libraries loaded after importing each module, one after the other in a fresh process."""
    code = (
        "import importlib, json, sys\n"
        "loaded = {}\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(f'parcelray.{name}')\n"
        f"    loaded[name] = [library for library in {HEAVY!r} if library in sys.modules]\n"
        "print(json.dumps(loaded))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def test_imported_names_finds_every_kind_of_import() -> None:
    source = (
        "import ray.train\nfrom parcelray.cluster import session\ndef f():\n    from . import step\n    from ..tracking"
        " import tracker\n"
    )
    names = set(imported_names(source, "parcelray.training.trainer", is_package=False))
    assert names >= {
        "ray.train",
        "parcelray.cluster",
        "parcelray.cluster.session",
        "parcelray.training.step",
        "parcelray.tracking.tracker",
    }
    lower = ["cluster", "cluster.session", "tracking", "tracking.tracker"]
    assert wrong_direction("training.trainer", iter(names)) == []
    assert wrong_direction("models.vlm", iter(names)) == [*lower, "training", "training.step"]
    assert wrong_direction("cluster.jobs", iter(names)) == ["tracking", "tracking.tracker", "training", "training.step"]
