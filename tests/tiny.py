"""A tiny untrained checkpoint, and a benchmark whose reference answers a test can choose."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from parcelray.models.manifest import write_manifest
from parcelray.training.start import build_start

from .benchmarks.table_data import png
from .training.conftest import few_tokenizer_texts, tiny_job

OWN = """
name: own
family: general
source: {splits: [test], rows: %d}
columns:
  types: {name: string, question: string, answer: list<string>, image: image}
  id: [name]
  images: [image]
  answers: {column: answer, form: list}
prompts: {paligemma: "answer en {question}"}
max_new_tokens: 4
metric: exact_match
"""


def tiny_checkpoint(folder: Path, seed: int, **changes: Any) -> Path:
    """Writes a checkpoint with a manifest; returns the folder of its files."""
    with pytest.MonkeyPatch.context() as patch:
        few_tokenizer_texts(patch)
        model, processor = build_start(tiny_job(folder, seed=seed, **changes), None)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    write_manifest(folder / "model", config={}, git_commit=None, data=None, seed=seed)
    return folder / "model"


def own_benchmark(folder: Path, answers: Sequence[Sequence[str]], more: str = "") -> Path:
    """Writes a benchmark with one question about patches of different colours, one row per set of reference answers.

    Returns the folder of own.yaml and its data.
    """
    folder.mkdir()
    (folder / "own.yaml").write_text(OWN % len(answers) + more)
    rows = [
        {
            "name": f"row {number}",
            "question": "what color",
            "answer": list(answer),
            "image": {"bytes": png((6 * number, 255 - 6 * number, 90)), "path": None},
        }
        for number, answer in enumerate(answers)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "test.parquet")
    return folder
