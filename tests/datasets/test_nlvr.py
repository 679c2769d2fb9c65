"""The NLVR source, on small files in the two layouts of the corpus and on the real corpus."""

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from parcelray.benchmarks.metrics import metric
from parcelray.benchmarks.readers.base import chosen_rows
from parcelray.benchmarks.readers.samples import NlvrReader
from parcelray.benchmarks.training_data import held_out_samples
from parcelray.config.data import NlvrDataConfig
from parcelray.datasets.boxes import parse_locations
from parcelray.datasets.nlvr.source import BOX, BOX_STARTS, PERMUTATIONS, NlvrSource
from parcelray.datasets.sample import Sample
from parcelray.errors import UserError
from parcelray.evaluation.scoring.split_scores import score

CASES = Path(__file__).parents[1] / "fixtures" / "cases"
RGB = {"Yellow": (255, 215, 0), "Black": (0, 0, 0), "#0099ff": (0, 153, 255)}
BOXES: list[list[dict[str, Any]]] = [
    [{"x_loc": 10, "y_loc": 20, "type": "square", "color": "Yellow", "size": 30}],
    [
        {"x_loc": 40, "y_loc": 50, "type": "square", "color": "Black", "size": 20},
        {"x_loc": 70, "y_loc": 5, "type": "square", "color": "Black", "size": 10},
    ],
    [{"x_loc": 0, "y_loc": 80, "type": "square", "color": "#0099ff", "size": 20}],
]


def _picture(permutation: int) -> bytes:
    pixels = np.full((BOX, 400, 3), 128, dtype=np.uint8)
    for index, start in enumerate(BOX_STARTS):
        pixels[:, start : start + BOX] = 211
        for thing in BOXES[PERMUTATIONS[permutation][index]]:
            x, y, size = thing["x_loc"], thing["y_loc"], thing["size"]
            pixels[y : y + size, start + x : start + x + size] = RGB[thing["color"]]
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("RGBA").save(buffer, format="PNG")
    return buffer.getvalue()


def _rows(split: str) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{split}-{sentence}-0-{permutation}",
            "sentence": "There is a  Yellow square",
            "label": "true" if sentence % 2 else "false",
            "identifier": f"{sentence}-0",
            "permutation": permutation,
            "directory": str(sentence % 3),
            "structured_rep": json.dumps(BOXES),
            "image": {"bytes": _picture(permutation), "path": f"{split}-{sentence}-0-{permutation}.png"},
        }
        for sentence in range(6)
        for permutation in range(6)
    ]


def _write_parquet(folder: Path) -> Path:
    for split in ("dev", "test"):
        pq.write_table(pa.Table.from_pylist(_rows(split)), folder / f"{split}.parquet")
    return folder


def _write_corpus(folder: Path) -> Path:
    for split in ("dev", "test"):
        root = folder / "nlvr" / split
        rows = _rows(split)
        for row in rows:
            path = root / "images" / row["directory"] / row["image"]["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(row["image"]["bytes"])
        entries = [
            {key: row[key] for key in ("sentence", "label", "identifier", "directory")} | {"structured_rep": BOXES}
            for row in rows
        ]
        lines = [json.dumps(entry) for entry in entries[::6]]
        (root / f"{split}.json").write_text("\n".join(lines))
    return folder


@pytest.fixture(params=[_write_parquet, _write_corpus])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write: Callable[[Path], Path] = request.param
    return write(tmp_path)


def test_both_layouts_give_the_same_samples(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    first, second = (
        NlvrSource(path, "dev", "all") for path in (_write_parquet(tmp_path / "a"), _write_corpus(tmp_path / "b"))
    )
    assert first.groups == second.groups
    for group in first.groups:
        for index in (0, 5, group.size - 1 if group.size else 0):
            assert first.get(group.name, index) == second.get(group.name, index)


def test_three_boxes_are_three_images(folder: Path) -> None:
    source = NlvrSource(folder, "dev", "all", questions=("statement",))
    sample = source.get("boxes", 2)
    assert sample.prompt == "true or false: there is a yellow square"
    assert sample.answers == ("false",)
    assert sample.metadata == {"identifier": "0-0", "permutation": 2, "directory": "0"}
    images = [np.asarray(Image.open(io.BytesIO(data))) for data in sample.images]
    assert [image.shape for image in images] == [(64, 64, 3)] * 3
    blue = [int((np.abs(image.astype(int) - RGB["#0099ff"]).sum(-1) < 60).sum()) > 20 for image in images]
    assert blue == [box == 2 for box in PERMUTATIONS[2]]


def test_the_whole_picture_is_one_image(folder: Path) -> None:
    sample = NlvrSource(folder, "dev", "all", view="picture", questions=("statement",)).get("picture", 0)
    assert len(sample.images) == 1


def test_box_answers_match_the_pixels(folder: Path) -> None:
    source = NlvrSource(folder, "dev", "all", questions=("box",), image_size=100)
    for index in range(12):
        sample = source.get("box", index)
        box = parse_locations(sample.answers[0])
        assert box is not None
        image = np.asarray(Image.open(io.BytesIO(sample.images[0]))).astype(int)
        color = {"yellow": "Yellow", "black": "Black", "blue": "#0099ff"}[sample.prompt.split()[2]]
        rows, columns = (round((box.top + box.bottom) * 50), round((box.left + box.right) * 50))
        assert np.abs(image[min(rows, 99), min(columns, 99)] - RGB[color]).sum() < 60


# Every possible question about BOXES, with its answer.
ANSWERS = {
    "how many yellow objects": "1",
    "how many black objects": "2",
    "how many blue objects": "1",
    "how many squares": "4",
    "how many triangles": "0",
    "how many circles": "0",
    "how many yellow squares": "1",
    "how many black squares": "2",
    "how many blue squares": "1",
    "what color is the small square": "black",
    "what color is the big square": "yellow",
    "what size is the yellow square": "big",
    "what size is the blue square": "medium",
}


def test_derived_answers_match_the_representation(folder: Path) -> None:
    source = NlvrSource(folder, "dev", "all", questions=("count", "color", "size"))
    (group,) = source.groups
    samples = [source.get(group.name, index) for index in range(group.size or 0)]
    assert len(samples) == 3 * 36
    answers = {sample.prompt: sample.answers for sample in samples}
    absent = {prompt for prompt in answers if prompt.endswith(("triangles", "circles"))} - ANSWERS.keys()
    assert answers == {prompt: (ANSWERS.get(prompt, "0"),) for prompt in answers}
    assert answers.keys() - absent <= ANSWERS.keys()
    assert len(answers) > 10


def test_the_ideal_answers_to_all_questions_score_one(folder: Path) -> None:
    """NLVR has one prompt for all families: answers as they are trained, and as a capitalised sentence."""
    source = NlvrSource(folder, "dev", "all")
    samples = [source.get(group, index) for group, index, _ in source.questions_in_order()]
    assert {sample.family for sample in samples} == {"statement", "count", "color", "size", "box"}
    ideal = [sample.answers[0] for sample in samples]
    assert set(score(samples, ideal)) == {1.0}
    sentences = [text if text.startswith("<loc") else f"{text.capitalize()}." for text in ideal]
    assert set(score(samples, sentences)) == {1.0}


def test_training_and_validation_share_no_directory(folder: Path) -> None:
    parts = [NlvrSource(folder, "dev", part, questions=("statement",)) for part in ("train", "validation")]
    directories = [
        {source.get("boxes", index).metadata["directory"] for index in range(source.groups[0].size or 0)}
        for source in parts
    ]
    assert directories[0]
    assert directories[1]
    assert not directories[0] & directories[1]


def test_a_source_is_pickled_without_its_data(folder: Path) -> None:
    source = NlvrSource(folder, "dev", "train")
    source.get("boxes", 0)
    data = pickle.dumps(source)
    assert len(data) < 1000
    assert pickle.loads(data).get("boxes", 3) == source.get("boxes", 3)


def test_a_missing_picture_is_reported(tmp_path: Path) -> None:
    _write_corpus(tmp_path)
    (tmp_path / "nlvr" / "dev" / "images" / "1" / "dev-1-0-3.png").unlink()
    with pytest.raises(UserError, match=r"dev-1-0-3\.png does not exist, .*; download its images"):
        NlvrSource(tmp_path, "dev", "all").get("boxes", 0)


def test_files_that_are_not_nlvr_are_rejected(tmp_path: Path) -> None:
    pq.write_table(pa.table({"sentence": ["a"], "label": ["true"]}), tmp_path / "dev.parquet")
    with pytest.raises(UserError, match=r"lacks the columns identifier, permutation, directory, structured_rep, image"):
        NlvrSource(tmp_path, "dev", "all").get("boxes", 0)
    (tmp_path / "test.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"test\.parquet is not a parquet file"):
        NlvrSource(tmp_path, "test", "all").get("boxes", 0)


def test_the_layout_of_the_hidden_split_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    shutil.copy(CASES / "rows" / "nlvr_no_directory.json", tmp_path / "test" / "test.json")
    with pytest.raises(UserError, match=r"Line 1 of .*test\.json lacks 'directory', .* give the dev or test split"):
        NlvrSource(tmp_path, "test", "all").get("boxes", 0)


def test_the_pictures_of_all_sets_of_a_sentence_are_one_cluster(tmp_path: Path) -> None:
    rows = _rows("dev")
    for row in rows:
        sentence = int(row["identifier"].partition("-")[0])
        row["identifier"] = f"{sentence // 2}-{sentence % 2}"
    for split in ("dev", "test"):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{split}.parquet")
    source = NlvrSource(tmp_path, "dev", "all", questions=("statement",))
    assert {source.get("boxes", index).scene for index in range(36)} == {"0", "1", "2"}
    reader = NlvrReader(source)
    assert [len(chosen_rows(reader, limit)) for limit in (1, 12, 13, None)] == [12, 12, 24, 36]


def test_always_true_on_the_real_test_split(nlvr_dir: Path) -> None:
    """The rule of the corpus's own script: 56.2 accuracy and 10.9 consistency for the constant answer."""
    source = NlvrSource(nlvr_dir, "test", "all", questions=("statement",))
    samples = [
        Sample(
            id=row.id,
            benchmark="nlvr",
            family="statement",
            task="statement",
            images=(),
            prompt=row.sentence,
            answers=(row.label,),
            metric="nlvr2",
            scene=row.sentence_id,
            metadata={"identifier": row.identifier},
        )
        for row in source.pictures
    ]
    totals = metric("nlvr2")(["true"] * len(samples), samples).totals
    assert totals == {"nlvr2": pytest.approx(3336 / 5940), "consistency": pytest.approx(29 / 266)}


def test_a_missing_corpus_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"contains no NLVR corpus .* --set data.path=FOLDER"):
        NlvrSource(tmp_path, "dev", "train")


def test_the_real_corpus_has_the_expected_samples(nlvr_dir: Path) -> None:
    samples = held_out_samples(NlvrDataConfig(path=str(nlvr_dir)), "test", 60, 64)
    assert {sample.task for sample in samples} == {"statement", "count", "color", "size", "box"}
    statements = [sample for sample in samples if sample.task == "statement"]
    assert len(statements) == 60
    assert len({sample.metadata["identifier"] for sample in statements}) == 10
    sizes = {
        split: sum(group.size or 0 for group in NlvrSource(nlvr_dir, split, "all", questions=("statement",)).groups)
        for split in ("dev", "test")
    }
    assert sizes == {"dev": 5934, "test": 5940}


def test_the_real_pixels_match_the_representation(nlvr_dir: Path) -> None:
    source = NlvrSource(nlvr_dir, "dev", "all", questions=("box",), image_size=100)
    size = source.groups[0].size or 0
    for index in range(0, size, 37):
        sample = source.get("box", index)
        box = parse_locations(sample.answers[0])
        assert box is not None
        image = np.asarray(Image.open(io.BytesIO(sample.images[0]))).astype(int)
        color = {"yellow": "Yellow", "black": "Black", "blue": "#0099ff"}[sample.prompt.split()[2]]
        # At 0.6 of the height; further up, a triangle may be narrower than the rounding to pixels.
        row, column = round((0.4 * box.top + 0.6 * box.bottom) * 99), round((box.left + box.right) * 49.5)
        assert np.abs(image[row, column] - RGB[color]).sum() < 120, sample.id
