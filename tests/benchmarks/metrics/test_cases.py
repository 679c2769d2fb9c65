"""The answers and scores of `fixtures/cases/metrics.yaml`, which the official scorers of the benchmarks give."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from parcelray.benchmarks.metrics import metric
from parcelray.benchmarks.metrics.mmmu import read_mmmu
from parcelray.benchmarks.metrics.multiple_choice import options

_SECTIONS = yaml.safe_load(
    (Path(__file__).parents[2] / "fixtures" / "cases" / "metrics.yaml").read_text(encoding="utf-8")
)


def _cases(section: str) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = _SECTIONS[section]["cases"]
    return cases


@pytest.mark.parametrize("name", ["multiple_choice:option", "mmbench"])
@pytest.mark.parametrize("case", _cases("multiple_choice_text"))
def test_multiple_choice_text(make_sample, name: str, case: dict[str, Any]) -> None:
    answers = [case["target"]] if "target" in case else [case["choices"][case["target_index"]]]
    metadata = {key: case[key] for key in ("choices", "target_index") if key in case}
    result = metric(name)([case["answer"]], [make_sample(*answers, index=1, **metadata)])
    assert result.values == (case["score"],)
    assert result.unparsed == (case.get("note") == "unparsable")


@pytest.mark.parametrize("name", ["multiple_choice:option", "mmbench"])
def test_option_letter(make_sample, name: str) -> None:
    section = _SECTIONS["option_letter"]
    choices = [f"choice number {number}" for number in range(len(section["letters"]))]
    for score in (0, 1):
        for template in section[f"templates_score_{score}"]:
            for letter in section["letters"]:
                sample = make_sample(letter, index=1, choices=choices)
                assert metric(name)([template.format(L=letter)], [sample]).values == (score,), (template, letter)


@pytest.mark.parametrize("case", _cases("anls"))
def test_anls(make_sample, case: dict[str, Any]) -> None:
    sample = make_sample(case["target"])
    for variant, key in (("paper", "paper"), ("docvqa_server", "server")):
        value = metric(f"anls:{variant}")([case["answer"]], [sample]).values[0]
        # Two edits for the case without a score; its note gives the length of seven.
        assert value == pytest.approx(case.get(key, 1 - 2 / 7))


def test_anls_permuted(make_sample) -> None:
    parts = [f"part {number}" for number in range(10)]
    result = metric("anls:permuted")([", ".join(reversed(parts))], [make_sample(", ".join(parts))])
    assert result.values == (1,)


@pytest.mark.parametrize("case", _cases("mmmu_open"))
def test_mmmu_open(make_sample, case: dict[str, Any]) -> None:
    if "options" in case:
        assert read_mmmu(case["answer"], options(case["options"])) == case["parsed"]
        sample = make_sample(case["parsed"], choices=case["options"])
        assert metric("mmmu")([case["answer"]], [sample]).values == (1,)
    else:
        assert metric("mmmu")([case["answer"]], [make_sample(case["target"])]).values == (case["score"],)
