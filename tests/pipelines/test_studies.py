"""The pipelines of the studies on small stand-ins: they start, say what is wrong, and write what they promise."""

import subprocess
import sys
from pathlib import Path

import pytest

from parcelray.benchmarks.catalog import catalog, find

from ..benchmarks.table_data import write_benchmark

ROOT = Path(__file__).resolve().parents[2]


def _run(pipeline: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"pipelines/{pipeline}.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def _sets(*changes: str) -> list[str]:
    return [part for change in changes for part in ("--set", change)]


@pytest.fixture(scope="module")
def llava_job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """GQA and TextVQA with four rows each, on the mini LLaVA in this process."""
    folder = tmp_path_factory.mktemp("llava")
    for name in ("gqa", "textvqa_val"):
        write_benchmark(find(name, catalog()), folder / name)
    return _sets(
        f"benchmarks=[{{name: gqa, data: {folder}/gqa, max_new_tokens: 2}}, {{name: textvqa_val, data: {folder}/textvqa_val, max_new_tokens: 2}}]",
        "model.reference=mini_llava",
        "dtype=float32",
        "compute={actors: 0}",
        f"storage={folder}/runs",
        "tracking.uri=null",
    )


@pytest.mark.slow
def test_clusters_on_gqa_and_textvqa_are_planned(llava_job: list[str]) -> None:
    done = _run("training_free_llava", "--dry-run", *llava_job)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gqa 4, textvqa_val 4" in done.stdout
    assert "64" in done.stdout


@pytest.mark.slow
def test_clusters_on_gqa_and_textvqa_are_compared_at_one_budget(llava_job: list[str]) -> None:
    done = _run("training_free_llava", *llava_job)
    assert done.returncode == 0, done.stdout + done.stderr
    storage = next(Path(each.removeprefix("storage=")) for each in llava_job if each.startswith("storage="))
    table = (storage / "studies" / "training_free_llava" / "frontier.md").read_text()
    # 64 of 576 is 28 of 256.
    assert "| cluster | 28 |" in table
    assert "| blind | - |" in table
    assert "textvqa_val" in table


@pytest.mark.slow
@pytest.mark.parametrize(("pipeline", "files"), [("saliency", ("saliency.json", "saliency.npz", "agreement.png")), ("validity", ("validity.json",))])
def test_the_studies_of_attention_ask_a_benchmark(pipeline: str, files: tuple[str, ...], tmp_path: Path) -> None:
    job = ("benchmarks=[{name: mini, source: {samples: 3}}]", f"storage={tmp_path}", "tracking.uri=null")
    done = _run(pipeline, *_sets("count=6", *job))
    assert done.returncode == 0, done.stdout + done.stderr
    assert all((tmp_path / "studies" / f"{pipeline}-attention" / name).stat().st_size for name in files)


@pytest.mark.slow
def test_too_few_questions_are_one_sentence(tmp_path: Path) -> None:
    done = _run("validity", *_sets("count=99", "benchmarks=[{name: mini, source: {samples: 3}}]", f"storage={tmp_path}", "tracking.uri=null"))
    assert done.returncode == 2
    assert "questions about one image, fewer than the 99 that are asked for" in " ".join(done.stdout.split())
