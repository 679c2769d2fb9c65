"""Aggregates of published tables."""

from pathlib import Path

import pytest

from parcelray.errors import UserError
from parcelray.evaluation.scoring.printed_table import aggregate_table

# LLaVA-1.5-7B at 192, 128 and 64 visual tokens; per-benchmark scores and averages as printed in papers on token
# compression (ToMe; VisionZip tuned at 64).
_LLAVA = """benchmark,family,reference,tome_192,tome_128,tome_64,visionzip_64
gqa,general,61.9,54.3,52.4,48.6,57.0
mmbench,general,64.7,60.5,53.3,43.7,61.5
mme,general,1862,1563,1343,1138,1756
pope,general,85.9,72.4,62.8,52.5,80.9
sqa,general,69.5,65.2,59.6,50.0,68.8
vqav2,general,78.5,68.0,63.0,57.1,74.2
textvqa,text,58.2,52.1,49.1,45.3,56.0
"""
_PRINTED = {"tome_192": 88.5, "tome_128": 80.4, "tome_64": 70.1, "visionzip_64": 95.0}


def _file(folder: Path, text: str) -> Path:
    file = folder / "table.csv"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(("method", "average"), _PRINTED.items())
def test_the_published_average_is_reproduced(tmp_path: Path, method: str, average: float) -> None:
    assert aggregate_table(_file(tmp_path, _LLAVA)).mean_retention(method) == pytest.approx(average, abs=0.055)


def test_the_mean_of_ratios_is_not_the_ratio_of_means(tmp_path: Path) -> None:
    table = aggregate_table(_file(tmp_path, "benchmark,family,reference,m\na,x,100,50\nb,x,10,10\nc,y,20,\n"))
    assert table.mean_retention("m") == 75
    assert table.to_dict()["m"]["benchmarks"] == 2
    assert table.to_dict()["m"]["most_sensitive"] == ["a", "b"]


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    table = aggregate_table(_file(tmp_path, "\ufeffbenchmark,family,reference,m\na,x,100,50\n"))
    assert table.mean_retention("m") == 50


def test_families_are_averaged_separately(tmp_path: Path) -> None:
    table = aggregate_table(_file(tmp_path, _LLAVA))
    assert table.mean_retention("tome_64", "text") == pytest.approx(100 * 45.3 / 58.2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("benchmark,family\na,x\n", "lacks reference"),
        ("benchmark,family,reference\na,x,1\n", "lacks a column for a method"),
        ("benchmark,family,reference,m\na,x,1,high\n", "m of a is 'high'; give a number"),
    ],
)
def test_a_malformed_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        aggregate_table(_file(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read as CSV"):
        aggregate_table(tmp_path / "none.csv")
