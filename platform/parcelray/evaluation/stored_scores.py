"""Scores of a checkpoint kept beside it, so that an interrupted comparison goes on where it was."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from parcelray.data.sample import Sample
from parcelray.evaluation.held_out import score_checkpoint
from parcelray.evaluation.score import Score
from parcelray.models.checkpoint import read_manifest


def scored(model_folder: Path, samples: Sequence[Sample], budgets: Sequence[int], path: Path) -> dict[int, list[Score]]:
    """Scores a checkpoint, or reads the scores of the same checkpoint on the same samples from `path`.

    Args:
        model_folder: checkpoint with a manifest.
        samples: what to score on.
        budgets: visual tokens per image; 0: blind.
        path: JSON file; budgets that it lacks are added.
    """
    key = {"files": {name: entry.sha256 for name, entry in read_manifest(model_folder).files.items()}, "samples": [sample.id for sample in samples]}
    stored = _read(path, key)
    missing = [budget for budget in budgets if budget not in stored]
    if missing:
        stored |= score_checkpoint(model_folder, samples, missing)
        _write(path, key, stored)
    return {budget: stored[budget] for budget in budgets}


def _read(path: Path, key: Mapping[str, object]) -> dict[int, list[Score]]:
    if not path.is_file():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    if data["key"] != key:
        return {}
    # JSON turns integer keys into text.
    return {int(budget): [Score(**score) for score in scores] for budget, scores in data["scores"].items()}


def _write(path: Path, key: Mapping[str, object], scores: dict[int, list[Score]]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(
        json.dumps({"key": key, "scores": {str(budget): [asdict(score) for score in values] for budget, values in scores.items()}}), encoding="utf-8"
    )
    partial.replace(path)
