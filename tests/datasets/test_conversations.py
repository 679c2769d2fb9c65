"""Rows of conversations: formats, places of the images, splits, and the reasons of rows that cannot be used."""

import base64
import io
import json
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest
from PIL import Image

from parcelray.benchmarks.training_data import check_rows, training_source
from parcelray.config.data import ConversationsDataConfig, HeldOut, HubDataConfig, MixtureDataConfig
from parcelray.datasets.conversations.files import expand, read_part
from parcelray.datasets.conversations.parsing import BadRow, parse_conversation
from parcelray.datasets.conversations.source import ConversationSource
from parcelray.datasets.sample import Sample
from parcelray.datasets.source import BadRowsError, SampleSource
from parcelray.errors import UserError
from parcelray.files import open_storage

from .conversation_data import CASES, names_of, picture, rows_of, write_folder, write_shards


def _samples(source: SampleSource) -> dict[str, Sample]:
    found = [source.get(group.name, index) for group in source.groups for index in range(group.size or 0)]
    return {sample.id: sample for sample in found}


def _expected(count: int) -> dict[str, list[bytes]]:
    return {row["id"]: [picture(len(name) + int(row["id"][1:])) for name in names_of(row)] for row in rows_of(count)}


def _as_messages(row: dict[str, Any]) -> dict[str, Any]:
    roles = {"human": "user", "gpt": "assistant"}
    messages = [
        {"role": roles[turn["from"]], "content": turn["value"].replace("<image>", "").strip()}
        for turn in row["conversations"]
    ]
    uris = [
        "data:image/png;base64," + base64.b64encode(picture(len(name) + int(row["id"][1:]))).decode()
        for name in names_of(row)
    ]
    parts = [{"type": "image_url", "image_url": {"url": uri}} for uri in uris]
    messages[0]["content"] = [*parts, {"type": "text", "text": messages[0]["content"]}]
    return {"id": row["id"], "messages": messages}


def _write(layout: str, folder: Path) -> ConversationsDataConfig:
    rows = rows_of(7)
    file = write_folder(folder, 7)
    images: str | None = str(folder / "images")
    path = str(file)
    if layout == "lines":
        path = str(folder / "rows.jsonl")
        Path(path).write_text("\ufeff" + "\r\n".join(map(json.dumps, rows)) + "\n\n")
    if layout == "messages":
        (folder / "messages.json").write_text(json.dumps(list(map(_as_messages, rows))))
        path, images = str(folder / "messages.json"), None
    if layout == "parquet":
        for row in rows:
            row["images"] = [{"bytes": picture(len(n) + int(row["id"][1:])), "path": "x.png"} for n in names_of(row)]
            del row["image"]
        datasets.Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
        path, images = str(folder / "*.parquet"), None
    if layout == "shards":
        path, images = write_shards(folder / "shards", 7, per_shard=3), None
    if layout == "uris":
        filesystem = fsspec.filesystem("memory")
        for row in rows:
            for name in names_of(row):
                filesystem.pipe(f"/set/{name}", picture(len(name) + int(row["id"][1:])))
            row["image"] = [f"memory://set/{name}" for name in names_of(row)]
        filesystem.pipe("/set/rows.json", json.dumps(rows).encode())
        path, images = "memory://set/rows.json", None
    return ConversationsDataConfig(path=path, images=images)


@pytest.mark.parametrize("layout", ["array", "lines", "messages", "parquet", "shards", "uris"])
def test_every_layout_gives_the_same_samples(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = pickle.loads(pickle.dumps(training_source(_write(layout, tmp_path / layout), 64)))
    samples = _samples(source)
    assert {name: list(sample.images) for name, sample in samples.items()} == _expected(7)
    assert {group.num_images: group.size for group in source.groups} == {1: 5, 2: 2}
    assert samples["r0"].prompt == "compare"
    assert samples["r4"].later_turns == (("and then?", "5"),)
    assert samples["r5"].answers == ("number 5",)
    for group in source.groups:
        read = [source.get(group.name, index) for index in range(group.size or 0)]
        texts = ["".join([each.prompt, each.answers[0], *sum(each.later_turns, ())]) for each in read]
        assert group.num_characters is not None
        assert group.num_characters.tolist() == [len(text) for text in texts]


def test_an_array_larger_than_a_chunk_is_read_by_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parcelray.datasets.conversations.rows._CHUNK", 50)
    config = _write("array", tmp_path / "data")
    text = (tmp_path / "data" / "rows.json").read_text().replace("number 3", "n\u00famero \\u0033")
    (tmp_path / "data" / "rows.json").write_text(text, encoding="utf-8")
    assert _samples(training_source(config, 64))["r3"].answers == ("n\u00famero 3",)


def test_rows_of_the_cases() -> None:
    config = ConversationsDataConfig(path=str(CASES / "rows" / "conversations.json"), images=str(CASES))
    samples = _samples(training_source(config, 64))
    assert {name: len(sample.images) for name, sample in samples.items()} == {
        "one": 1,
        "three-turns": 1,
        "no-image": 0,
        "two-images": 2,
        "in-the-middle": 1,
    }
    assert samples["in-the-middle"].prompt == "Look at this: What color is it?"
    assert samples["two-images"].prompt == "Which is wider?"
    assert [answer for _, answer in samples["three-turns"].later_turns] == ["One", "Left"]
    bad = ConversationsDataConfig(
        path=str(CASES / "rows" / "conversations_bad.jsonl"), images=str(CASES), max_bad_rows=0.9
    )
    assert _samples(training_source(bad, 64))["control-text"].prompt == (
        "The page says <eos> and <pad>. What does <eos> mean?"
    )
    assert check_rows(bad).keys() == {"missing-file", "no-answer", "more-placeholders-than-images"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "neither conversations nor messages"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "an answer without a question"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}]}, "no answer"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "turn 1 is from 'robot'"),
        ({"messages": [{"role": "user", "content": None}]}, "turn 1 has no text"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "turn 1 has a part of type 'audio'"),
        ({"image": [None], "messages": [{"role": "user", "content": "a"}]}, "an image is null"),
        ({"messages": [{"role": "user", "content": "<image>"}]}, "1 <image> markers, but 0 images"),
    ],
)
def test_the_reason_of_a_bad_row(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        parse_conversation(row)


def test_a_bad_line_is_one_bad_row_and_a_bad_array_a_bad_file(tmp_path: Path) -> None:
    good = json.dumps(
        {"id": "g", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    )
    (tmp_path / "a.jsonl").write_text(f"{good}\n{{cut\n[1]\n{good}\n")
    with pytest.raises(BadRowsError) as caught:
        check_rows(ConversationsDataConfig(path=str(tmp_path / "a.jsonl")))
    assert list(caught.value.problems) == ["row-1", "row-2"]
    assert "line 2 is not JSON" in caught.value.problems["row-1"]
    (tmp_path / "b.json").write_text(f"[{good}, {{cut]")
    with pytest.raises(UserError, match="is not a JSON array of objects"):
        check_rows(ConversationsDataConfig(path=str(tmp_path / "b.json")))
    names = _samples(training_source(ConversationsDataConfig(path=str(tmp_path / "a.jsonl"), max_bad_rows=0.5), 64))
    assert sorted(names) == ["g", "g (row 1)"]


def test_rows_that_share_an_image_are_in_one_split(tmp_path: Path) -> None:
    write_folder(tmp_path, 40)
    rows = json.loads((tmp_path / "rows.json").read_text())
    for row in rows[1::2]:
        row["image"] = [f"{int(row['id'][1:]) - 1}.png"]
        row["conversations"][0]["value"] = "<image> what is it?"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = ConversationsDataConfig(
        path=str(tmp_path / "rows.json"),
        images=str(tmp_path / "images"),
        held_out=HeldOut(validation=0.2, test=0.3, seed=1),
    )
    parts = {split: ConversationSource(config, split).rows.tolist() for split in ("train", "validation", "test")}
    assert sorted(row for rows in parts.values() for row in rows) == list(range(40))
    assert {split: len(rows) for split, rows in parts.items()} == {"train": 20, "validation": 8, "test": 12}
    for rows in parts.values():
        assert all(row + 1 in rows for row in rows if row % 2 == 0)
    larger = config.model_copy(update={"held_out": HeldOut(validation=0.4, test=0.3, seed=1)})
    assert ConversationSource(larger, "test").rows.tolist() == parts["test"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("nothing-*.json", "does not exist"), (".", "files of several kinds"), ("a.csv", "files of the types .csv")],
)
def test_files_that_cannot_be_rows(tmp_path: Path, pattern: str, message: str) -> None:
    for name in ("a.csv", "a.json", "b.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=message):
        training_source(ConversationsDataConfig(path=str(tmp_path / pattern)), 64).groups  # noqa: B018


def test_ranges_of_shards() -> None:
    filesystem = fsspec.filesystem("memory")
    for number in range(8, 12):
        filesystem.pipe(f"/shards/s-{number:03}.tar", b"12345")
    files = expand("memory://shards/s-{008..010}.tar")
    assert files == [f"memory://shards/s-{number:03}.tar" for number in (8, 9, 10)]
    assert read_part(files[0], 1, 3) == b"23"
    assert len(expand("memory://shards/*.tar")) == 4


def test_a_hub_data_set_has_a_template_for_its_questions(tmp_path: Path) -> None:
    rows = [
        {"q": f"is it {number}?", "a": number % 2, "picture": {"bytes": picture(number), "path": None}}
        for number in range(6)
    ]
    features = datasets.Features(
        {"q": datasets.Value("string"), "a": datasets.ClassLabel(names=["no", "yes"]), "picture": datasets.Image()}
    )
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "set")
    config = HubDataConfig(path=str(tmp_path / "set"), images=("picture",), prompt="answer en {q}", answer="a")
    samples = _samples(training_source(config, 64))
    assert samples["row-3"].prompt == "answer en is it 3?"
    assert samples["row-3"].answers == ("yes",)
    assert samples["row-3"].images == (picture(3),)


@pytest.mark.parametrize(
    ("members", "temperature", "shares"),
    [
        ([{"weight": 3.0}, {"weight": 1.0}], 1, [0.75, 0.25]),
        ([{}, {}], 1, [2 / 3, 1 / 3]),
        ([{}, {}], 1e9, [0.5, 0.5]),
        ([{"epochs": 1.0}, {"epochs": 2.0}], 1, [0.5, 0.5]),
    ],
)
def test_a_mixture_shares_the_steps(
    tmp_path: Path, members: list[dict[str, float]], temperature: float, shares: list[float]
) -> None:
    data = []
    for number, count in enumerate((20, 10)):
        folder = tmp_path / str(number)
        write_folder(folder, count)
        data.append({"type": "conversations", "path": str(folder / "rows.json"), "images": str(folder / "images")})
    config = MixtureDataConfig.model_validate(
        {"sources": [{"data": each} | member for each, member in zip(data, members, strict=True)]}
        | {"temperature": temperature}
    )
    source = training_source(config, 64)
    found = [sum(group.weight for group in source.groups if group.name.startswith(f"{number}/")) for number in (0, 1)]
    assert found == pytest.approx(shares, rel=1e-6)
    assert _samples(source).keys() == {f"r{number}" for number in range(20)}


def test_tar_shards_on_object_storage(tmp_path: Path, s3: str) -> None:
    write_shards(tmp_path / "shards", 7, per_shard=3)
    filesystem, folder = open_storage(s3)
    filesystem.put(f"{tmp_path}/shards/", f"{folder}/set/", recursive=True)
    config = ConversationsDataConfig(path=f"{s3}/set/part-{{000..002}}.tar")
    samples = _samples(training_source(config, 64))
    assert {name: list(sample.images) for name, sample in samples.items()} == _expected(7)


_READ_ALL = """
import pathlib, re, sys
from parcelray.benchmarks.training_data import training_source
from parcelray.config.data import ConversationsDataConfig
from parcelray.datasets.collator import Collator
from parcelray.models.checkpoint import resolve_checkpoint
from parcelray.models.vlm import load_processor
from parcelray.training.batches.schedule import BatchSchedule, StepReader, in_process_batches

source = training_source(ConversationsDataConfig(path=sys.argv[1]), 64)
collator = Collator(load_processor(resolve_checkpoint("mini_base").path))
reader = StepReader(source, BatchSchedule(source, num_steps=32, images_per_step=32, seed=0), collator, 0, 1)
images = sum(len(batch["pixel_values"]) for batch in in_process_batches(reader, 0, 32))
# The maximum of getrusage would include the memory of the process that has started this one.
peak_kb = re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]
print(images, int(peak_kb) * 1024)
"""


@pytest.mark.nightly
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_two_gigabytes_of_images_are_read_within_one(tmp_path: Path) -> None:
    image = io.BytesIO()
    Image.new("RGB", (836, 836)).save(image, format="BMP")
    for shard in range(5):
        with tarfile.open(tmp_path / f"part-{shard}.tar", "w") as archive:
            for number in range(200 * shard, 200 * shard + 206):
                turns = [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": str(number)}]
                row = json.dumps({"id": str(number), "conversations": turns}).encode()
                for name, content in ((f"{number}.json", row), (f"{number}.bmp", image.getvalue())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    assert sum(file.stat().st_size for file in tmp_path.glob("*.tar")) > 2 * 2**30
    command = [sys.executable, "-c", _READ_ALL, str(tmp_path / "part-{0..4}.tar")]
    read = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert int(read[0]) == 1024
    # The process with torch and transformers alone has 430 MiB.
    assert int(read[1]) < 2**30
