"""Reading of rows from every kind of file, frames from videos, and reporting of problems."""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import av
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from parcelray.benchmarks.open import open_reader
from parcelray.benchmarks.readers.base import chosen_rows
from parcelray.benchmarks.readers.table import TableReader
from parcelray.benchmarks.tables.images import BadCell, cell_images, image_size, video_frames, with_box
from parcelray.config.benchmark import BenchmarkConfig, VideoConfig
from parcelray.datasets.images import decode_image
from parcelray.errors import UserError
from tests.datasets.image_cases import REFUSED, read

from .table_data import png

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_ROWS: list[dict[str, Any]] = [
    {
        "name": str(number),
        "scene": f"s{number // 2}",
        "question": f"q{number}",
        "answers": [f"a{number}", "a"],
        "image": {"bytes": png((number, 0, 0)), "path": None},
    }
    for number in range(6)
]


def _config(**changes: Any) -> BenchmarkConfig:
    columns = {
        "types": {
            "name": "string",
            "scene": "string",
            "question": "string",
            "answers": "list<string>",
            "image": "image",
        },
        "id": ["name"],
        "images": ["image"],
        "answers": {"column": "answers", "form": "list"},
        "cluster": "scene",
    }
    return BenchmarkConfig.model_validate(
        {
            "name": "mine",
            "family": "general",
            "source": {"splits": ["test"]} | changes.pop("source", {}),
            "columns": columns | changes,
            "prompts": {"paligemma": "answer en {question}"},
            "metric": "exact_match",
        }
    )


def _reader(data: Path, **changes: Any) -> TableReader:
    reader = open_reader(_config(**changes), data=data)
    assert isinstance(reader, TableReader)
    return reader


def _parquet(file: Path, rows: list[dict[str, Any]] = _ROWS, row_group_size: int = 2) -> Path:
    schema = pa.schema(
        [
            ("name", pa.string()),
            ("scene", pa.string()),
            ("question", pa.string()),
            ("answers", pa.list_(pa.string())),
            ("image", _IMAGE),
        ]
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file, row_group_size=row_group_size)
    return file


def _jsonl(folder: Path) -> Path:
    (folder / "images").mkdir(parents=True)
    lines = []
    for row in _ROWS:
        (folder / "images" / f"{row['name']}.png").write_bytes(row["image"]["bytes"])
        lines.append(json.dumps(row | {"image": f"images/{row['name']}.png"}))
    (folder / "test.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder


def _hugging_face(folder: Path) -> Path:
    images = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in _ROWS]
    table = datasets.Dataset.from_dict(
        {name: [row[name] for row in _ROWS] for name in ("name", "scene", "question", "answers")} | {"image": images}
    )
    datasets.DatasetDict({"test": table, "train": table}).save_to_disk(str(folder))
    return folder


def _single_hugging_face(folder: Path) -> Path:
    datasets.load_from_disk(str(_hugging_face(folder / "all")))["test"].save_to_disk(str(folder / "one"))
    return folder / "one"


def _shards(folder: Path) -> Path:
    for number in range(2):
        _parquet(folder / "data" / f"test-0000{number}-of-00002.parquet", _ROWS[3 * number : 3 * number + 3])
    return folder


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda folder: _parquet(folder / "x.parquet"), id="a parquet file"),
        pytest.param(
            lambda folder: _parquet(folder / "test.parquet").parent, id="a folder with the split's name in it"
        ),
        pytest.param(lambda folder: _parquet(folder / "test" / "0.parquet").parent.parent, id="a folder of the split"),
        pytest.param(_shards, id="shards as on the hub"),
        pytest.param(_jsonl, id="JSON lines and an image folder"),
        pytest.param(lambda folder: _jsonl(folder) / "test.jsonl", id="a JSON-lines file"),
        pytest.param(_hugging_face, id="save_to_disk, several splits"),
        pytest.param(_single_hugging_face, id="save_to_disk, one split"),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(make: Any, tmp_path: Path) -> None:
    reader = _reader(make(tmp_path / "data"))
    for each in (reader, pickle.loads(pickle.dumps(reader))):
        assert each.fingerprint().rows == 6
        assert len(each.fingerprint().ids) == 64
        samples = [sample for row in each.order() for sample in each.read(row).samples]
        assert [sample.prompt for sample in samples] == [f"answer en q{number}" for number in range(6)]
        assert [sample.answers for sample in samples] == [(f"a{number}", "a") for number in range(6)]
        assert [np.asarray(Image.open(io.BytesIO(sample.images[0])))[0, 0, 0] for sample in samples] == list(range(6))
        assert [sample.scene for sample in samples] == ["s0", "s0", "s1", "s1", "s2", "s2"]
    assert (
        reader.fingerprint() == _reader(make(tmp_path / "again")).fingerprint()
        or "save_to_disk" in str(make)
        or reader.fingerprint().ids == _reader(tmp_path / "data").fingerprint().ids
    )


def test_changed_data_have_another_fingerprint(tmp_path: Path) -> None:
    first = _reader(_parquet(tmp_path / "a.parquet")).fingerprint()
    assert _reader(_parquet(tmp_path / "b.parquet", _ROWS[:5])).fingerprint().ids != first.ids
    changed = [*_ROWS[:5], _ROWS[5] | {"question": "another"}]
    second = _reader(_parquet(tmp_path / "a.parquet", changed)).fingerprint()
    assert second.ids == first.ids
    assert second.revision != first.revision


def test_a_limit_takes_whole_clusters(tmp_path: Path) -> None:
    reader = _reader(_parquet(tmp_path / "x.parquet"))
    some, more = chosen_rows(reader, 3), chosen_rows(reader, 5)
    assert len(some) == 4
    assert set(some) <= set(more)
    assert {row // 2 for row in some} == {row // 2 for row in some if row % 2}
    assert list(chosen_rows(reader, None)) == list(range(6))


def test_only_rows_that_pass_the_filter_are_read(tmp_path: Path) -> None:
    reader = _reader(_parquet(tmp_path / "x.parquet"), keep={"scene": ["s1"]})
    assert [reader.read(row).samples[0].id for row in reader.order()] == ["2", "3"]
    with pytest.raises(UserError, match="no row of the data passes the filter"):
        _reader(_parquet(tmp_path / "x.parquet"), keep={"scene": ["s9"]}).fingerprint()


def test_problems_of_rows_are_reported(tmp_path: Path) -> None:
    rows = [
        _ROWS[0] | {"answers": []},
        _ROWS[1] | {"image": None},
        _ROWS[2] | {"question": None},
        _ROWS[3] | {"image": {"bytes": None, "path": "gone.png"}},
        _ROWS[4],
    ]
    reader = _reader(_parquet(tmp_path / "x.parquet", rows))
    found = [reader.read(row) for row in reader.order()]
    reasons = [(problem.row, problem.reason) for each in found for problem in each.problems]
    assert reasons == [
        ("0", "no answer"),
        ("1", "no image"),
        ("2", "the column question, which the prompt uses, is empty"),
        ("3", "the file gone.png does not exist"),
    ]
    assert [len(each.samples) for each in found] == [0, 0, 0, 0, 1]


def test_missing_columns_are_reported(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"name": ["0"], "Question": ["q"]}), file)
    with pytest.raises(
        UserError,
        match="mine: the data of split test lack the columns answers, image, question, scene; they have name, Question",
    ):
        _reader(file).fingerprint()


def test_ids_must_be_unique(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="more than one row has the id '1'; name more columns"):
        _reader(_parquet(tmp_path / "x.parquet", [_ROWS[1], _ROWS[1]])).fingerprint()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere", "does not exist"),
        (lambda folder: _parquet(folder / "x.txt"), "neither a parquet nor a JSON-lines file"),
        (
            lambda folder: _parquet(folder / "validation.parquet").parent,
            r"has no test-\*.parquet, test.parquet or test.jsonl; it has validation.parquet",
        ),
        (lambda folder: None, "is not on the Hugging Face hub"),
    ],
)
def test_missing_data_are_refused(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        open_reader(_config(), data=make(tmp_path)).fingerprint()


def test_broken_files_are_reported(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="not all of these are parquet files"):
        _reader(tmp_path / "x.parquet").fingerprint()
    (tmp_path / "x.jsonl").write_text('{"name": 1}\n{"name": \n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        _reader(tmp_path / "x.jsonl").fingerprint()


def test_paths_must_stay_below_the_data(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="leads out of"):
        cell_images("../secret.png", tmp_path / "data")


def test_cells_hold_images_in_several_forms(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"A")
    assert cell_images(
        [b"x", {"bytes": b"y", "path": None}, {"bytes": None, "path": "a.png"}, "a.png", None], tmp_path
    ) == [b"x", b"y", b"A", b"A"]
    assert cell_images(None, tmp_path) == []
    with pytest.raises(BadCell, match="a cell of type int"):
        cell_images(3, tmp_path)


def test_a_box_is_drawn_in_red() -> None:
    pixels = np.asarray(Image.open(io.BytesIO(with_box(png((0, 0, 0), (11, 11)), (0.2, 0.1, 0.8, 0.9)))))
    red = np.argwhere(pixels[:, :, 0] == 255)
    assert (red.min(axis=0).tolist(), red.max(axis=0).tolist()) == ([2, 1], [8, 9])
    assert pixels[5, 5, 0] == 0


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("exif_orientation_6.jpg", (48, 96)),
        ("one_pixel_wide.png", (1, 64)),
        ("wide_60000x1.png", (60_000, 1)),
        ("rgb_transparent_color.png", (64, 64)),
        ("grey_16_bit.png", (256, 4)),
    ],
)
def test_sizes_and_boxes_are_those_of_the_decoded_image(name: str, size: tuple[int, int]) -> None:
    data = read(name)
    assert image_size(data) == size
    marked, plain = decode_image(with_box(data, (0.0, 0.0, 1.0, 1.0))), decode_image(data)
    assert marked.size == plain.size == size
    assert marked.getpixel((0, 0)) == marked.getpixel((size[0] - 1, size[1] - 1)) == (255, 0, 0)
    if min(size) > 2:
        assert np.array_equal(np.asarray(marked)[1:-1, 1:-1], np.asarray(plain)[1:-1, 1:-1])


@pytest.mark.parametrize("name", REFUSED)
def test_an_image_that_cannot_be_used_is_a_problem_of_its_row(name: str) -> None:
    with pytest.raises(BadCell, match=r"cannot be decoded|too many pixels"):
        with_box(read(name), (0.0, 0.0, 1.0, 1.0))
    if name != "truncated.jpg":  # its header is valid
        with pytest.raises(BadCell, match=r"cannot be decoded|too many pixels"):
            image_size(read(name))


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """A folder with a video of 30 frames at 10 frames per second, with increasing brightness."""
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(30):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 8 * number, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return tmp_path


def _brightness(frames: tuple[bytes, ...]) -> list[int]:
    return [round(float(np.asarray(Image.open(io.BytesIO(frame))).mean()) / 8) for frame in frames]


@pytest.mark.parametrize(
    ("config", "segment", "expected"),
    [
        ({"frames": 4, "stride": 5}, None, [0, 5, 10, 15]),
        ({"frames": 4, "stride": 15}, None, [0, 15, 0, 15]),
        ({"frames": 3, "stride": 2}, (1.0, 3.0), [10, 12, 14]),
        ({"frames": 3, "stride": 2}, (1.0, 1.25), [10, 12, 10]),
    ],
)
def test_frames_have_a_fixed_stride_and_repeat(
    video: Path, config: dict[str, int], segment: tuple[float, float] | None, expected: list[int]
) -> None:
    frames = video_frames(video, "v.mp4", VideoConfig(path="", **config), segment)
    assert _brightness(frames) == pytest.approx(expected, abs=1)


def test_videos_that_cannot_be_read_are_reported(video: Path) -> None:
    config = VideoConfig(path="", frames=2, stride=1)
    (video / "broken.mp4").write_bytes(b"no video")
    (video / "empty").mkdir()
    for path, reason in (
        ("none.mp4", "the file none.mp4 does not exist"),
        ("broken.mp4", "cannot be decoded"),
        ("empty", "no frames in empty"),
    ):
        with pytest.raises(BadCell, match=reason):
            video_frames(video, path, config)
