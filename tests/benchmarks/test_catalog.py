"""Every split of the catalog is valid, complete, and readable from a small file with its exact schema."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from parcelray.benchmarks.catalog import builtin, catalog, find
from parcelray.benchmarks.listing import Listing, check_data
from parcelray.benchmarks.metrics import metric
from parcelray.benchmarks.open import open_reader
from parcelray.benchmarks.readers.table import TableReader
from parcelray.config.benchmark import TableSource
from parcelray.datasets.images import decode_image
from parcelray.errors import UserError

from .table_data import ROWS, write_benchmark

TABLES = sorted(name for name, config in builtin().items() if isinstance(config.source, TableSource))


def test_the_sets_have_all_their_splits() -> None:
    sets = {
        name: sum(name in config.sets for config in builtin().values())
        for name in ("parcel", "paligemma", "llava", "local")
    }
    assert sets == {"parcel": 27, "paligemma": 21, "llava": 16, "local": 5}
    families = [config.family for config in builtin().values() if "parcel" in config.sets]
    assert {family: families.count(family) for family in set(families)} == {
        "video": 5,
        "grounding": 8,
        "resolution_sensitive": 9,
        "general": 5,
    }
    assert len(TABLES) == 75


def test_splits_have_references_facts_and_prompts() -> None:
    configs = [builtin()[name] for name in TABLES]
    assert [config.name for config in configs if not config.references] == [], "splits without a published score"
    assert [config.name for config in configs if not config.facts] == [], "splits without sources"
    assert [config.name for config in configs if not config.prompts] == [], "splits without prompts"
    for config in configs:
        for each in (*config.metrics(), *config.other_metrics):
            assert metric(each)
    lengths = {(config.name, family): config.longest_answer(family) for config in configs for family in config.prompts}
    assert {split: length for split, length in lengths.items() if not 8 <= length <= 1024} == {}


@pytest.mark.parametrize("name", TABLES)
def test_a_split_is_read_from_its_schema(name: str, tmp_path: Path) -> None:
    config = builtin()[name]
    rows = len(write_benchmark(config, tmp_path))
    for family in config.prompts:
        reader = open_reader(config, family=family, data=tmp_path)
        assert reader.fingerprint().rows == rows
        found = [reader.read(row) for row in reader.order()]
        assert not [problem for each in found for problem in each.problems]
        samples = [sample for each in found for sample in each.samples]
        assert len(samples) >= rows
        assert len({sample.id for sample in samples}) == len(samples)
        for sample in samples:
            assert sample.prompt
            assert sample.images
            assert all(decode_image(image).width for image in sample.images)


def test_the_refcoco_mask_and_box_are_those_of_the_row(tmp_path: Path) -> None:
    config = builtin()["refcoco_testA"]
    write_benchmark(config, tmp_path)
    sample = open_reader(config, data=tmp_path).read(0).samples[1]
    assert sample.prompt == "answer 1"
    assert sample.metadata["box"] == pytest.approx([3 / 24, 2 / 32, 16 / 24, 12 / 32])
    assert sample.metadata["mask"]["size"] == [24, 32]
    assert sample.answers == ("<loc0128><loc0064><loc0682><loc0384>",)
    sample = open_reader(config, family="llava", data=tmp_path).read(0).samples[1]
    assert sample.prompt.endswith("the region this sentence describes: answer 1")
    assert sample.answers == ("[0.062, 0.125, 0.375, 0.667]",)


def test_prompts_are_those_of_the_model_family(tmp_path: Path) -> None:
    config = builtin()["ai2d"]
    write_benchmark(config, tmp_path)
    samples = {
        family: open_reader(config, family=family, data=tmp_path).read(0).samples[0]
        for family in ("paligemma", "llava")
    }
    assert samples["paligemma"].prompt == "answer en  question 0 choose from: red \t blue \t green \t white"
    assert (
        samples["llava"].prompt
        == "question 0\nA. red\nB. blue\nC. green\nD. white\nAnswer with the option's letter from the given choices"
        " directly."
    )
    assert samples["llava"].answers == ("B",)
    assert samples["paligemma"].answers == ("blue",)
    assert {family: sample.metric for family, sample in samples.items()} == config.metric
    science = builtin()["scienceqa_img"]
    write_benchmark(science, tmp_path / "science")
    sample = open_reader(science, data=tmp_path / "science").read(0).samples[0]
    assert (
        sample.prompt
        == "Question: question 0\nContext: hint 0\nOptions: (A) red, (B) blue, (C) green, (D) white\nAnswer:"
    )
    assert sample.answers == ("The answer is B.",)
    with pytest.raises(UserError, match="mmbench_en_dev has no prompt for paligemma models"):
        open_reader(builtin()["mmbench_en_dev"], data=tmp_path)


def test_the_list_and_the_check_name_the_metric_of_each_family(tmp_path: Path) -> None:
    rows = {split.name: split for split in Listing.of((), "llava").benchmarks}
    assert rows["gqa"].metrics() == ("gqa:official", "gqa:llava")
    shown = Console(width=200, record=True, file=io.StringIO())
    shown.print(Listing.of((), "llava").to_rich())
    text = shown.export_text()
    assert "paligemma gqa:official" in text
    assert "llava gqa:llava" in text
    assert "mmbench:circular" in text
    write_benchmark(builtin()["gqa"], tmp_path)
    for family, metric_name in (("paligemma", "gqa:official"), ("llava", "gqa:llava")):
        example = check_data("gqa", tmp_path, (), 1, family).to_dict()["example"]
        assert example["metric"] == metric_name


def test_the_check_names_samples_that_their_metric_cannot_score(tmp_path: Path) -> None:
    """An index of MMBench that is missing passed the check and stopped the evaluation."""
    config = builtin()["mmbench_en_dev"]
    write_benchmark(config, tmp_path)
    assert not check_data(config.name, tmp_path, (), ROWS, "llava").problems
    for file in tmp_path.rglob("*.parquet"):
        table = pq.read_table(file)
        place = table.column_names.index("index")
        missing = pa.array([None, *table.column("index").to_pylist()[1:]], pa.int64())
        pq.write_table(table.set_column(place, "index", missing), file)
    problems = check_data(config.name, tmp_path, (), ROWS, "llava").problems
    assert ["needs metadata 'index' (int) on every sample" in each.reason for each in problems] == [True]


def test_the_check_names_samples_that_their_metric_cannot_score_together(tmp_path: Path) -> None:
    write_benchmark(builtin()["mmbench_en_dev"], tmp_path)
    own = tmp_path / "own.yaml"
    text = builtin()["mmbench_en_dev"].model_dump(mode="json", exclude_defaults=True)
    text["name"], text["columns"]["id"] = "own", ["question"]
    text["columns"]["metadata"]["index"] = "group"
    text["columns"]["types"]["group"] = "int64"
    own.write_text(yaml.safe_dump(text), encoding="utf-8")
    for file in tmp_path.rglob("*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.append_column("group", pa.array([7] * len(table), pa.int64())), file)
    (problem,) = check_data("own", tmp_path, (own,), ROWS, "llava").problems
    assert problem.row == "mmbench:circular"
    assert "give every row another index" in problem.reason


def test_samples_have_their_language(tmp_path: Path) -> None:
    config = builtin()["marvl5"]
    write_benchmark(config, tmp_path)
    reader = open_reader(config, data=tmp_path)
    languages = [reader.read(row).samples[0].metadata["language"] for row in reader.order()]
    assert languages == [language for language in ("id", "sw", "ta", "tr", "zh") for _ in range(ROWS)]
    assert reader.read(0).samples[0].answers == ("True",)


def test_rows_with_the_same_image_are_next_to_each_other(tmp_path: Path) -> None:
    config = builtin()["gqa"]
    write_benchmark(config, tmp_path)
    reader = open_reader(config, data=tmp_path)
    assert isinstance(reader, TableReader)
    reader.__dict__["_light"] = {"imageId": ["b", "a", "b", "a"], "id": ["0", "1", "2", "3"]}
    assert list(reader.order()) == [0, 2, 1, 3]


def test_a_user_benchmark_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("""
name: mine
family: general
source: {splits: [test]}
columns:
  types: {picture: image, q: string, a: string}
  images: [picture]
  answers: {column: a}
prompts: {paligemma: "answer en {q}"}
metric: exact_match
""")
    config = find("mine", catalog([tmp_path / "mine.yaml"]))
    write_benchmark(config, tmp_path / "data")
    sample = open_reader(config, data=tmp_path / "data").read(2).samples[0]
    assert (sample.id, sample.prompt, sample.answers) == ("test-2", "answer en q 2", ("red",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "prompts: {paligemma: 'answer en {question}'}",
            "uses question, which is not a column; legal: a, options_inline",
        ),
        ("metrik: exact_match", "metrik is not a known key.*did you mean metric"),
        (
            "columns: {types: {q: string, a: string}, images: [picture], answers: {column: a}}",
            "types lacks the columns picture",
        ),
        (
            "columns: {types: {picture: image, a: string}, answers: {column: a}}",
            "set exactly one of images, join and video",
        ),
        ("columns: {types: {picture: image, a: string}, images: [picture]}", "no target is set"),
        ("metric: null", "set either metric, or unscorable with the reason why there is no metric"),
        (
            "metric: {llava: exact_match}",
            "metric has no value for paligemma, but prompts are given for paligemma; give one value per family",
        ),
        (
            "metric: {paligemma: exact_match, llava: exact_match}",
            "metric has a value for llava, but prompts are given for paligemma; give one value per family",
        ),
        ("metric: {paligema: exact_match}", r"metric.paligema is 'paligema'; legal: paligemma, llava \(did you mean"),
        (
            "columns: {types: {picture: image, a: string}, images: [picture],"
            " answers: {column: a, form: {paligemma: txt}}}",
            r"columns\.answers\.form\.paligemma is 'txt'; legal: text, list, .*\(did you mean text\?\)",
        ),
        ("decoding: beam", "legal: beam with at least 2 beams"),
        ("source: {type: mini}", "columns are required for a source of type table"),
    ],
)
def test_errors_in_a_file_are_reported(tmp_path: Path, change: str, message: str) -> None:
    lines = {
        "name": "name: mine",
        "family": "family: general",
        "source": "source: {splits: [test]}",
        "columns": "columns: {types: {picture: image, q: string, a: string}, images: [picture], answers: {column: a}}",
        "prompts": "prompts: {paligemma: 'answer en {q}'}",
        "metric": "metric: exact_match",
    }
    file = tmp_path / "mine.yaml"
    file.write_text("\n".join((lines | {change.split(":")[0]: change}).values()))
    with pytest.raises(UserError, match=message):
        catalog([file])


def test_the_error_about_an_unknown_name_suggests_similar_ones() -> None:
    with pytest.raises(UserError, match=r"no benchmark 'texvqa_val' \(did you mean textvqa_val"):
        find("texvqa_val", catalog())
    with pytest.raises(UserError, match="contains no YAML files"):
        catalog([Path(__file__).parent])
