"""PuzzleVQA's published files, if present: JSON lines with choices of mixed types, and an image folder."""

import dataclasses
import json
from pathlib import Path

import pytest

from parcelray.benchmarks.catalog import builtin
from parcelray.benchmarks.open import open_reader
from parcelray.config.benchmark import TableSource
from parcelray.datasets.images import decode_image
from parcelray.evaluation.scoring.chance import chance
from parcelray.evaluation.scoring.split_scores import GivenAnswer, score_splits


def test_every_puzzle_is_read_and_scored_by_letter(puzzlevqa_dir: Path) -> None:
    config = builtin()["puzzlevqa"]
    assert isinstance(config.source, TableSource)
    assert sorted(file.stem for file in puzzlevqa_dir.glob("*.json")) == sorted(config.source.splits)
    for name in config.source.splits:
        file = puzzlevqa_dir / f"{name}.json"
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        one = config.model_copy(update={"source": config.source.model_copy(update={"splits": (name,)})})
        reader = open_reader(one, data=puzzlevqa_dir)
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
        by_chance = chance(split)
        assert by_chance is not None
        assert by_chance.value == pytest.approx(100 / len(choices))
        scores = [split.scores[number].estimate.value for number in answers]
        shares = [100 * correct.count(index) / len(correct) for index in range(4)]
        assert scores == pytest.approx([*shares, 100]), "always one letter, and always the correct letter"
