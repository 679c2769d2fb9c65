"""PuzzleVQA's published files, if present: JSON lines with choices of mixed types, and an image folder."""

import dataclasses
import json
from pathlib import Path

import pytest

from parcelray.benchmarks.open import open_reader
from parcelray.config.benchmark import BenchmarkConfig
from parcelray.datasets.images import decode_image
from parcelray.evaluation.scoring.split_scores import GivenAnswer, score_splits

BENCHMARK = BenchmarkConfig.model_validate(
    {
        "name": "puzzlevqa",
        "family": "general",
        "source": {"splits": ["test"]},
        "columns": {
            "types": {"image": "image", "question": "string", "options": "list<string>", "answer": "string"},
            "id": ["image"],
            "images": ["image"],
            "answers": {"column": "answer"},
            "choices": ["options"],
        },
        "prompts": {"paligemma": "answer en {question} {options_inline}"},
        "metric": "multiple_choice:option",
    }
)


def test_every_puzzle_is_read_and_scored_by_letter(puzzlevqa_dir: Path) -> None:
    files = sorted(puzzlevqa_dir.glob("*.json"))
    assert len(files) == 20
    for file in files:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        reader = open_reader(BENCHMARK, data=file)
        samples = [sample for row in reader.order() for sample in reader.read(row).samples]
        assert len(samples) == len(rows), f"{file.name}: no puzzle has a problem"
        correct = []
        for sample, row in zip(samples, rows, strict=True):
            (image,) = sample.images
            assert image == (puzzlevqa_dir / row["image"]).read_bytes()
            assert decode_image(image).width > 0
            choices = [str(option) for option in row["options"]]
            assert sample.metadata["choices"] == choices
            assert sample.answers == (str(row["answer"]),)
            correct.append(choices.index(str(row["answer"])))
            assert sample.prompt.endswith(", ".join(f"({'ABCD'[i]}) {choice}" for i, choice in enumerate(choices)))
        answers = {number: [GivenAnswer(f"({letter})")] * len(samples) for number, letter in enumerate("ABCD", 1)}
        answers[256] = [GivenAnswer("ABCD"[index]) for index in correct]
        (split,) = score_splits([dataclasses.replace(sample, images=()) for sample in samples], answers)
        scores = [split.scores[number].estimate.value for number in answers]
        shares = [100 * correct.count(index) / len(correct) for index in range(4)]
        assert scores == pytest.approx([*shares, 100]), "always one letter, and always the correct letter"
