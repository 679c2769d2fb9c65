"""The pipelines of the studies: how they use the benchmarks of a job, and the numbers that they write."""

import io
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from scipy import stats

from parcelray.benchmarks.catalog import catalog, find
from parcelray.config.evaluate import EvaluateJob
from parcelray.datasets.mini import FAMILIES, family_samples
from parcelray.errors import UserError
from parcelray.evaluation.inputs import Pair
from parcelray.files import open_storage
from parcelray.models.backbones.base import Depths
from parcelray.studies import attention as attention_studies
from parcelray.studies.reduction.methods import all_budgets, methods_of

from ..benchmarks.table_data import write_benchmark
from .scripts import script, sets


def _run(pipeline: str, *arguments: str) -> str:
    """Runs a pipeline in this process and returns its output."""
    output = io.StringIO()
    script(pipeline).run(list(arguments), Console(file=output, width=200))
    return output.getvalue()


def _attention(storage: Path | str, count: int) -> list[str]:
    return sets(
        f"count={count}", "benchmarks=[{name: mini, source: {samples: 3}}]", f"storage={storage}", "tracking.uri=null"
    )


@pytest.fixture(scope="module")
def llava_job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The storage folder, and overrides for GQA and TextVQA with four rows each on the mini LLaVA."""
    folder = tmp_path_factory.mktemp("llava")
    for name in ("gqa", "textvqa_val"):
        write_benchmark(find(name, catalog()), folder / name)
    return folder / "runs", sets(
        f"benchmarks=[{{name: gqa, data: {folder}/gqa, max_new_tokens: 2}}, {{name: textvqa_val, data:"
        f" {folder}/textvqa_val, max_new_tokens: 2}}]",
        "model.reference=mini_llava",
        "dtype=float32",
        "compute={actors: 0}",
        f"storage={folder}/runs",
        "tracking.uri=null",
    )


def test_the_plan_of_the_llava_study_has_the_size_of_its_benchmarks(llava_job: tuple[Path, list[str]]) -> None:
    storage, job = llava_job
    plan = _run("training_free_llava", "--dry-run", *job)
    assert "gqa 4, textvqa_val 4" in plan
    assert not storage.exists(), "a plan writes nothing"


def test_the_llava_study_compares_all_methods_at_one_budget(
    llava_job: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks the arguments of the study. tests/studies/reduction/test_study.py runs a study on these benchmarks."""
    calls: list[tuple[EvaluateJob, dict[str, Any]]] = []
    pipeline = script("training_free_llava")
    monkeypatch.setattr(pipeline, "run_reduction_study", lambda job, console, **options: calls.append((job, options)))
    pipeline.run(llava_job[1], Console(quiet=True))
    ((job, options),) = calls
    assert [choice.name for choice in job.benchmarks] == ["gqa", "textvqa_val"]
    # LLaVA-1.5-7B has 576 visual tokens and a decoder of 32 layers; the mini LLaVA has 256 and 3.
    for num_tokens, depths, budget in ((576, Depths(23, 32), 64), (256, Depths(3, 3), 28)):
        known = methods_of(depths)
        chosen = {name: known[name] for name in options["methods"]}
        budgets = all_budgets(chosen, num_tokens, depths, equal=False, retentions=options["shares"])
        assert set(budgets.values()) == {(budget,)}


def test_saliency_is_studied_with_the_prompts_of_each_image_and_of_two_others(tmp_path: Path) -> None:
    _run("saliency", *_attention(tmp_path, 4))
    folder = tmp_path / "studies" / "saliency-attention"
    maps = np.load(folder / "saliency.npz")
    report = json.loads((folder / "saliency.json").read_text())
    assert report.keys() == {"model", "last word", "mean of words"}
    for name, array in (("last word", "last_word_IPLHN"), ("mean of words", "mean_word_IPLHN")):
        maps_IPLHN = maps[array]
        assert maps_IPLHN.shape[:2] == (4, 3)
        assert maps_IPLHN.shape[-1] == 256
        # The attention of a word to the image is a share of its whole attention, which sums to 1.
        assert maps_IPLHN.min() >= 0
        assert 0 < maps_IPLHN.sum(-1).max() <= 1 + 1e-4
        mean_IPLN = maps_IPLHN.mean(3)
        measured = [each["spearman"]["value"] for each in report[name]["between_prompts"]]
        expected = [_mean_spearman(mean_IPLN[:, :, layer]) for layer in range(mean_IPLN.shape[2])]
        # The mean over heads is rounded to single precision, so neighbours in the ranking may be swapped.
        assert measured == pytest.approx(expected, abs=1e-3)
        assert max(measured) < 1, "the maps of an image differ between its prompts"
    for picture in ("agreement.png", "heat_maps_3.png"):
        with Image.open(folder / picture) as image:
            assert image.width > 300


def _mean_spearman(maps_IPN: NDArray[np.float32]) -> float:
    pairs = [
        (each[first], each[second])
        for each in maps_IPN
        for first, second in itertools.combinations(range(len(each)), 2)
    ]
    return float(np.mean([stats.spearmanr(first, second).statistic for first, second in pairs]))


def test_validity_is_studied_on_the_samples_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses are made up, so that the numbers are known; tests/analysis measures them on a model."""
    pairs: list[Pair] = []

    def leave_one_out(
        model: object, processor: object, pair: Pair, *, seed: int
    ) -> tuple[NDArray[np.float64], Mapping[str, NDArray[np.float64]]]:
        pairs.append(pair)
        loss_N = np.random.default_rng(seed).random(256)
        return loss_N, {
            "follows": loss_N**2,
            "opposes": -loss_N,
            "random": np.random.default_rng(100 + seed).random(256),
        }

    monkeypatch.setattr(attention_studies, "leave_one_out", leave_one_out)
    _run("validity", *_attention(tmp_path, 5))
    written = json.loads((tmp_path / "studies" / "validity-attention" / "validity.json").read_text())
    assert written["pairs"] == 5
    # The samples come in turn from the families with one image per sample; a video sample has four images.
    first = {family: family_samples("test", family, 3)[0].prompt for family in FAMILIES if family != "video"}
    assert [pair.prompt for pair in pairs[: len(first)]] == list(first.values())
    follows, opposes, random = (written["measures"][name] for name in ("follows", "opposes", "random"))
    assert follows["correlation"]["value"] == pytest.approx(1)
    assert opposes["correlation"]["value"] == pytest.approx(-1)
    assert abs(random["correlation"]["value"]) < 0.2
    # The smallest p-value is one of 1,000 permutations plus the observed order. Three measures are corrected together.
    assert follows["p_value"] == opposes["p_value"] == pytest.approx(1 / 1001)
    assert follows["p_holm"] == pytest.approx(3 / 1001)
    assert random["p_value"] > 0.01
    assert follows["mass"]["value"] > 0.15 > random["mass"]["value"] > opposes["mass"]["value"]


@pytest.mark.nightly
def test_studies_are_stored_on_object_storage(
    llava_job: tuple[Path, list[str]], s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = [change.replace(f"storage={llava_job[0]}", f"storage={s3}") for change in llava_job[1]]
    models = sets("models.SigLIP=mini_llava", "models.ConvNeXt=mini_llava", "models.CLIP=mini_llava")
    _run("saliency", *_attention(s3, 4))
    printed = _run("encoders", *job, *models)
    filesystem, root = open_storage(s3)
    files = {name.removeprefix(f"{root}/studies/") for name in filesystem.find(f"{root}/studies")}
    assert {"saliency-attention/saliency.json", "encoders/encoders.csv", "encoders/redundancy.png"} <= files
    assert {f"encoders-{name}/frontier.json" for name in ("clip", "siglip", "convnext")} <= files
    assert f"are stored in {s3}/studies/encoders" in printed
    assert list(tmp_path.iterdir()) == [], "nothing is written below the working folder"


def test_the_elastic_study_needs_a_folder() -> None:
    with pytest.raises(UserError, match="storage is s3://bucket/runs, but this study needs a folder"):
        _run("elastic", "report", *sets("storage=s3://bucket/runs"))


def test_too_few_samples_are_reported_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="samples with one image, but 99 are needed"):
        _run("validity", *_attention(tmp_path, 99))
