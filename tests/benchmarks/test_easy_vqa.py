"""easy-VQA: the real files of the package where it is installed, and files of the same layout."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from parcelray.benchmarks.catalog import builtin
from parcelray.benchmarks.open import open_reader
from parcelray.benchmarks.reader_source import ReaderSource
from parcelray.benchmarks.readers.base import RowSamples
from parcelray.benchmarks.training_data import held_out_samples, training_source
from parcelray.config.data import BenchmarkDataConfig, HeldOut
from parcelray.datasets.images import decode_image
from parcelray.datasets.sample import Sample
from parcelray.datasets.source import BadRowsError
from parcelray.errors import UserError
from tests.datasets.conversation_data import picture


def _write(folder: Path) -> None:
    for split in ("train", "test"):
        (folder / split / "images").mkdir(parents=True)
        for number in range(6):
            (folder / split / "images" / f"{number}.png").write_bytes(picture(number))
        rows = [["what color is the shape?", "teal", number % 6] for number in range(12)]
        rows[3] = ["is there a shape?", "yes", 9]
        (folder / split / "questions.json").write_text(json.dumps(rows))


def test_questions_about_one_image_are_neighbours_and_a_missing_image_is_a_problem(tmp_path: Path) -> None:
    _write(tmp_path)
    reader = open_reader(builtin()["easy_vqa"], data=tmp_path)
    rows = [reader.read(row) for row in reader.order()]
    assert [each.samples[0].scene for each in rows if each.samples] == [
        f"test-{number}" for number in (0, 0, 1, 1, 2, 2, 3, 4, 4, 5, 5)
    ]
    assert [problem.reason for each in rows for problem in each.problems] == [
        "the image 9.png cannot be read (No such file or directory)"
    ]


def test_the_training_split_is_a_source_and_some_of_its_images_are_held_out(tmp_path: Path) -> None:
    _write(tmp_path)
    config = BenchmarkDataConfig(name="easy_vqa", data=str(tmp_path), validation=0.3, max_bad_rows=0.1)
    source = training_source(config, 64)
    (group,) = source.groups
    held = {sample.scene for sample in held_out_samples(config, "validation", 12, 64)}
    trained = set()
    for index in range(group.size or 0):
        try:
            trained.add(source.get(group.name, index).scene)
        except UserError:
            continue
    assert trained
    assert held
    assert not trained & held
    assert all(name.startswith("train-") for name in trained | held)


@pytest.mark.parametrize(
    ("rows_per_sample", "sizes"), [(1, [1] * 12), (4, [1, 2, 2, 2, 2, 3]), (2, [1, 1, 2, 2, 2, 2, 2])]
)
def test_the_questions_about_one_image_are_turns_of_one_sample(
    tmp_path: Path, rows_per_sample: int, sizes: list[int]
) -> None:
    _write(tmp_path)
    rows = json.loads((tmp_path / "train" / "questions.json").read_text())
    rows[3][2] = 0
    (tmp_path / "train" / "questions.json").write_text(json.dumps(rows))
    config = BenchmarkDataConfig(name="easy_vqa", data=str(tmp_path), validation=0.0, rows_per_sample=rows_per_sample)
    source = training_source(config, 64)
    (group,) = source.groups
    samples = [source.get(group.name, index) for index in range(group.size or 0)]
    assert sorted(1 + len(sample.later_turns) for sample in samples) == sizes
    turns = [
        (sample.scene, *turn)
        for sample in samples
        for turn in ((sample.prompt, sample.answers[0]), *sample.later_turns)
    ]
    assert sorted(turns) == sorted((f"train-{number}", question, answer) for question, answer, number in rows)


def test_the_rows_of_a_sample_with_a_row_that_cannot_be_used_are_all_reported(tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / "train" / "images" / "5.png").unlink()
    config = BenchmarkDataConfig(name="easy_vqa", data=str(tmp_path), validation=0.0, rows_per_sample=2)
    source = training_source(config, 64)
    (group,) = source.groups
    problems: dict[str, str] = {}
    for index in range(group.size or 0):
        try:
            source.get(group.name, index)
        except BadRowsError as error:
            problems |= error.problems
    assert sorted(problems) == ["train-11", "train-3", "train-5"]


def test_rows_of_one_cluster_with_different_images_are_not_one_sample() -> None:
    class Reader:
        name = "pairs"
        images_per_row = 1

        def order(self) -> Sequence[int]:
            return (0, 1)

        def cluster(self, row: int) -> str:
            return "sentence"

        def read(self, row: int) -> RowSamples:
            return RowSamples((Sample(f"row-{row}", "pairs", "f", "t", (picture(row),), "?", ("yes",)),))

    source = ReaderSource(Reader(), HeldOut(), "train", 0.0, rows_per_sample=2)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"row-0 and row-1 of pairs have different images.*rows_per_sample: 1"):
        source.get("images-1", 0)


def test_the_files_of_the_package(tmp_path: Path) -> None:
    if importlib.util.find_spec("easy_vqa") is None:
        pytest.skip("the package easy-vqa is not installed")
    reader = open_reader(builtin()["easy_vqa"])
    order = reader.order()
    assert len(order) == 9673
    assert len({reader.cluster(row) for row in order}) == 1000
    samples = [reader.read(row).samples[0] for row in order[::500]]
    assert {sample.task for sample in samples} == {"yes_no", "color", "shape"}
    assert all(decode_image(sample.images[0]).size == (64, 64) for sample in samples)
    source = training_source(BenchmarkDataConfig(name="easy_vqa", validation=0.0), 64)
    assert [group.size for group in source.groups] == [38575]
    source = training_source(BenchmarkDataConfig(name="easy_vqa", validation=0.0, rows_per_sample=32), 64)
    assert [group.size for group in source.groups] == [4000]
