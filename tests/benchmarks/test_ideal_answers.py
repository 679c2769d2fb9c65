"""The ideal answer, in the form that a split's prompt asks for, gets the best score: every split, every prompt family.

The ideal answers are made from the rows and the words of the prompt, not from the answers of the reader. A prompt that
asks for a letter while the metric expects a text is therefore found.
"""

import ast
import string
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from parcelray.benchmarks.catalog import builtin
from parcelray.benchmarks.open import open_reader
from parcelray.config.benchmark import BenchmarkConfig, PromptFamily, TableSource
from parcelray.datasets.boxes import Box, format_locations
from parcelray.datasets.sample import Sample
from parcelray.evaluation.scoring.split_scores import GivenAnswer, ScoringRules, score, score_splits

from .table_data import write_benchmark

_CASES = yaml.safe_load((Path(__file__).parents[1] / "fixtures" / "cases" / "metrics.yaml").read_text(encoding="utf-8"))
_TARGETS_LETTER = "the target's letter"
_ANNOTATORS = 10
_SPLITS = [
    pytest.param(name, family, id=f"{name}-{family}")
    for name, config in sorted(builtin().items())
    if isinstance(config.source, TableSource) and config.unscorable is None
    for family in config.prompts
]


@pytest.fixture
def full_masks(weights: dict[str, np.ndarray], tmp_path: Path) -> Path:
    """A mask decoder that fills every box."""
    arrays: dict[str, Any] = {name: np.zeros_like(array) for name, array in weights.items()}
    np.savez(tmp_path / "decoder.npz", **(arrays | {"decoder.12.bias": np.array([0.5], dtype=np.float32)}))
    return tmp_path / "decoder.npz"


@pytest.mark.parametrize(("name", "family"), _SPLITS)
def test_the_ideal_answer_gets_the_best_score(
    name: str, family: PromptFamily, full_masks: Path, tmp_path: Path
) -> None:
    config = builtin()[name]
    rows = write_benchmark(config, tmp_path)
    samples, truths = _read(config, family, rows, tmp_path)
    rules = ScoringRules(average_over=config.average_over, mask_decoder=full_masks)

    def value(texts: list[str]) -> float:
        (split,) = score_splits(samples, {16: [GivenAnswer(text) for text in texts]}, rules)
        return split.scores[16].estimate.value

    for form in _forms(family):
        ideal = [form(_ideal(sample.prompt, truth)) for sample, truth in zip(samples, truths, strict=True)]
        if samples[0].metric.startswith("cider"):
            others = (ideal[1:] + ideal[:1], [f"{text} and more" for text in ideal])
            assert value(ideal) > max(map(value, others))
        else:
            assert value(ideal) == pytest.approx(_best(samples)), (ideal[0], samples[0].metric)
        assert value(["-"] * len(samples)) < value(ideal)
    for sample, truth in zip(samples, truths, strict=True):
        if truth.choices:
            # Decoding by likelihood compares these.
            candidates = sample.metadata.get("candidates") or sample.metadata["choices"]
            assert candidates[truth.option] == _ideal(sample.prompt, truth)
            assert len(candidates) == len(truth.choices)


@pytest.mark.parametrize(
    ("name", "target", "answer", "value"),
    [
        ("nlvr2", "True", "true", 1),
        ("nlvr2", "True", "Yes.", 1),
        ("nlvr2", "True", "False", 0),
        ("llava_vqav2", "nokia", "Nokia", 1),
        ("okvqa_val", "nokia", "The Nokia.", 1),
        ("aokvqa_da_val", "nokia", "A Nokia.", 1),
        ("countbenchqa", None, "Two.", 1),
        ("countbenchqa", None, "12", 0),
        ("tallyqa_simple", None, "Two", 1),
        ("activitynet_qa", "ping pong", "Ping pong.", 1),
        ("ocrvqa", None, "ANSWERS 0", 1),
    ],
)
def test_the_forms_in_which_llava_answers_are_right(
    name: str, target: str | None, answer: str, value: float, tmp_path: Path
) -> None:
    config = builtin()[name]
    write_benchmark(config, tmp_path, target)
    sample = open_reader(config, family="llava", data=tmp_path).read(0).samples[0]
    assert score([sample], [answer]) == [value]


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, id=f"{name}-{case['family']}-{case['answer']}")
        for case in _CASES["by_family"]["cases"]
        for name in case["benchmark"].split(", ")
    ],
)
def test_answers_are_scored_by_the_rule_of_the_family(name: str, case: dict[str, Any], tmp_path: Path) -> None:
    target = case.get("target") or str(case.get("targets", [""])[0]).removesuffix(f" x{_ANNOTATORS}")
    config = builtin()[name]
    write_benchmark(config, tmp_path, target or None)
    sample = open_reader(config, family=case["family"], data=tmp_path).read(0).samples[0]
    if case["answer"] == _TARGETS_LETTER:
        assert "option's letter" in sample.prompt
        answer = "B"
    else:
        assert set(sample.answers) == {target}
        answer = case["answer"]
    assert score([sample], [answer]) == [case["score"]]


def test_the_ideal_answers_of_the_mini_suite_score_one() -> None:
    reader = open_reader(builtin()["mini"])
    rows = range(0, len(reader.order()), 37)
    samples = [sample for row in rows for sample in reader.read(row).samples]
    assert len({(sample.family, sample.task) for sample in samples}) > 10
    assert set(score(samples, [sample.answers[0] for sample in samples])) == {1.0}
    words = [sample for sample in samples if not sample.answers[0].startswith("<loc")]
    assert set(score(words, [_capitalised(sample.answers[0]) + "." for sample in words])) == {1.0}


class _Truth:
    """What a row says about the right answer: a text, an option or a box."""

    def __init__(self, columns: Any, row: dict[str, Any], question: int) -> None:
        self.text, self.option, self.box = "", None, None
        names = columns.choices
        self.choices = [row[name] for name in names] if len(names) > 1 else _listed(row[names[0]]) if names else []
        if columns.answers is None:
            left, top, width, height = row[columns.box.column]
            # The images have 32 x 24 pixels.
            self.box = Box(top / 24, left / 32, (top + height) / 24, (left + width) / 32)
            return
        cell = _cell(columns, row, question)
        while isinstance(cell, list | dict):
            cell = cell[columns.answers.field] if isinstance(cell, dict) else cell[0]
        self.text = str(cell)
        if self.text in self.choices:
            self.option = self.choices.index(self.text)
        elif self.choices:
            self.option = string.ascii_uppercase.index(self.text) if self.text.isalpha() else int(self.text)


def _cell(columns: Any, row: dict[str, Any], question: int) -> Any:
    """The cell of the right answers to one question of a row."""
    name = columns.answers.column
    if name in columns.each:
        return row[name][question]
    if name in columns.made():
        return row[columns.each[0]][question][name]
    return ast.literal_eval(row[name]) if columns.answers.form == "literal" else row[name]


def _listed(value: Any) -> list[str]:
    return list(ast.literal_eval(value) if isinstance(value, str) else value)


def _read(
    config: BenchmarkConfig, family: PromptFamily, rows: list[dict[str, Any]], folder: Path
) -> tuple[list[Sample], list[_Truth]]:
    """Returns the samples of a benchmark without images, and the truth about each."""
    reader = open_reader(config, family=family, data=folder)
    samples, truths = [], []
    for index in reader.order():
        for number, sample in enumerate(reader.read(index).samples):
            samples.append(replace(sample, images=()))
            truths.append(_Truth(config.columns, rows[index], number))
    return samples, truths


def _ideal(prompt: str, truth: _Truth) -> str:
    """Writes the right answer in the form that a prompt asks for."""
    if truth.box is not None:
        if "bounding box coordinate" in prompt:
            top, left, bottom, right = truth.box
            return f"[{left:.2f}, {top:.2f}, {right:.2f}, {bottom:.2f}]"
        return format_locations(truth.box) + "<seg007>" * 16
    if truth.option is None:
        return truth.text
    letter = string.ascii_uppercase[truth.option]
    if "option's letter" in prompt or "\u9009\u9879\u5b57\u6bcd" in prompt:
        return letter
    if "choose from:" in prompt or prompt.startswith("answer en"):
        return truth.choices[truth.option]
    return f"The answer is {letter}." if prompt.startswith("Question:") else letter


def _forms(family: PromptFamily) -> tuple[Callable[[str], str], ...]:
    """PaliGemma writes an answer as it was trained to; LLaVA may start it with a capital letter, as a sentence."""
    return (str,) if family == "paligemma" else (str, _capitalised)


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _best(samples: list[Sample]) -> float:
    """The largest score of a metric on the scale of papers; MME has 200 points per subtask."""
    subtasks = {sample.metadata["category"] for sample in samples if sample.metric.startswith("mme")}
    return 200.0 * len(subtasks) or 100.0
