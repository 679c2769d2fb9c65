"""Boxes, masks, and the mask decoder."""

import json
from pathlib import Path

import numpy as np
import pytest

from parcelray.benchmarks.metrics import metric
from parcelray.benchmarks.metrics.box_iou import iou
from parcelray.benchmarks.metrics.mask_decoder import MaskDecoder, load_mask_decoder
from parcelray.benchmarks.metrics.refseg_miou import decode_mask, mask_iou, polygon_mask, read_segmentation
from parcelray.datasets.boxes import Box, format_corners, format_locations, parse_corners, parse_locations
from parcelray.errors import UserError

_OFFICIAL = json.loads((Path(__file__).parent / "official_scores.json").read_text(encoding="utf-8"))
_WHOLE = "<loc0000><loc0000><loc1023><loc1023>"


def test_intersection_over_union() -> None:
    # The unit square and a unit square shifted by half a side: 0.5 / 1.5.
    assert iou(Box(0, 0, 1, 1), Box(0, 0.5, 1, 1.5)) == pytest.approx(1 / 3)
    assert iou(Box(0, 0, 1, 1), Box(0, 0, 1, 1)) == 1
    assert iou(Box(0, 0, 0.2, 0.2), Box(0.5, 0.5, 1, 1)) == 0
    assert iou(Box(0.5, 0.5, 0.1, 0.1), Box(0, 0, 1, 1)) == 0


def test_boxes_are_written_as_location_tokens() -> None:
    text = format_locations(Box(0.0, 0.25, 0.5, 1.0))
    assert text == "<loc0000><loc0256><loc0512><loc1023>"
    box = parse_locations(f"{text} red circle")
    assert box is not None
    assert box == pytest.approx((0.0, 0.25, 0.5, 1.0), abs=1e-3)
    assert parse_locations("<loc0000><loc0256>") is None


def test_a_box_is_correct_from_iou_one_half(make_sample) -> None:
    target = format_locations(Box(0, 0, 0.5, 0.5))
    sample = make_sample(f"{target} cat")
    boxes = [target, format_locations(Box(0, 0, 0.5, 0.3)), format_locations(Box(0, 0, 0.5, 0.2)), "nothing"]
    result = metric("box_iou")(boxes, [sample] * 4)
    assert result.values == (1, 1, 0, 0)
    assert result.unparsed == 1
    mean = metric("box_iou:mean")(boxes, [sample] * 4)
    # Widths 0.3 and 0.2 of 0.5, up to one bin.
    assert mean.values == pytest.approx((1, 0.6, 0.4, 0), abs=5e-3)
    assert mean.totals["accuracy_50"] == result.totals["box_iou"] == 0.5
    assert metric("box_iou")([target], [make_sample(box=[0, 0, 0.5, 0.5])]).values == (1,)


def test_corners_are_read_as_by_lmms_eval(make_sample) -> None:
    """Left, top, right, bottom in fractions, the first four numbers in square brackets."""
    box = Box(top=0.25, left=0.125, bottom=0.5, right=1.0)
    assert format_corners(box) == "[0.125, 0.250, 1.000, 0.500]"
    assert parse_corners("Here: [ 0.125,0.25 , 1,0.5 ] and [0, 0, 1, 1].") == box
    assert parse_corners("[0.1, 0.2, 0.3]") is None
    assert parse_corners("0.1, 0.2, 0.3, 0.4") is None
    sample = make_sample(box=list(box))
    texts = [format_corners(box), "[0.125, 0.25, 0.5625, 0.5]", "[0.125, 0.25, 0.55, 0.5]", format_locations(box)]
    result = metric("box_iou:lmms_eval")(texts, [sample] * 4)
    # Half of the box reaches IoU 0.5, a little less does not.
    assert (result.values, result.unparsed) == ((1, 1, 0, 0), 1)
    assert metric("box_iou:lmms_eval")(texts[:1], [make_sample(texts[0])]).values == (1,)


def test_only_the_first_box_counts(make_sample) -> None:
    right, wrong = format_locations(Box(0, 0, 0.5, 0.5)), format_locations(Box(0.5, 0.5, 1, 1))
    assert metric("box_iou")([f"{wrong} ; {right}"], [make_sample(right)]).values == (0,)


def test_polygons_are_filled_as_by_pycocotools() -> None:
    for case in _OFFICIAL["masks"]:
        drawn = polygon_mask(case["polygon"], *case["size"])
        assert np.array_equal(drawn, decode_mask({"size": case["size"], "counts": case["counts"]}, "1"))
        assert drawn.sum() == case["area"]


def test_run_lengths_go_down_the_columns() -> None:
    mask = decode_mask({"size": [2, 3], "counts": [1, 2, 3]}, "1")
    assert mask.tolist() == [[False, True, False], [True, False, False]]
    with pytest.raises(UserError, match="add up"):
        decode_mask({"size": [2, 3], "counts": [1, 2]}, "1")


def test_agreement_with_an_installed_pycocotools() -> None:
    official = pytest.importorskip(
        "pycocotools.mask", reason="needs a package: .venv/bin/python -m pip install pycocotools"
    )
    draw = np.random.default_rng(2)
    for _ in range(50):
        height, width = (int(side) for side in draw.integers(5, 40, 2))
        points = (draw.random((6, 2)) * (width, height)).round(1).ravel().tolist()
        theirs = official.decode(official.frPyObjects([points], height, width))[..., 0].astype(bool)
        assert np.array_equal(polygon_mask(points, height, width), theirs)


def test_a_decoder_with_only_a_bias_gives_constant_masks(weights) -> None:
    """With all weights 0 except the last bias, every pixel of a mask equals that bias."""
    flat = {name: np.zeros_like(array) for name, array in weights.items()} | {
        "decoder.12.bias": np.array([0.5], dtype=np.float32)
    }
    masks = MaskDecoder(flat, "x")(np.zeros((2, 16), dtype=np.int64))
    assert masks.shape == (2, 64, 64)
    assert np.all(masks == 0.5)


def test_codes_fill_the_grid_row_by_row(weights) -> None:
    """If residual and upsampling layers copy their input, each code covers a square of 16 x 16 pixels."""
    plain = {name: np.zeros_like(array) for name, array in weights.items()}
    plain["_vq_vae._embedding"][:, 0] = np.arange(128)
    plain["decoder.0.weight"][0, 0] = 1
    for layer in (4, 6, 8, 10):
        # The middle 2 x 2 of the 4 x 4 kernel copies each input to its own 2 x 2 outputs.
        plain[f"decoder.{layer}.weight"][0, 0, 1:3, 1:3] = 1
    plain["decoder.12.weight"][0, 0] = 1
    mask = MaskDecoder(plain, "x")(np.arange(16, dtype=np.int64)[None])[0]
    assert np.array_equal(mask, np.kron(np.arange(16).reshape(4, 4), np.ones((16, 16))))


def test_residual_blocks_add_to_their_input(weights) -> None:
    plain = {name: np.zeros_like(array) for name, array in weights.items()}
    plain["decoder.0.bias"][0] = 1
    for block in (2, 3):
        plain[f"decoder.{block}.net.4.bias"][0] = 0.25
    for layer in (4, 6, 8, 10):
        plain[f"decoder.{layer}.weight"][0, 0, 1:3, 1:3] = 1
    plain["decoder.12.weight"][0, 0] = 1
    assert np.all(MaskDecoder(plain, "x")(np.zeros((1, 16), dtype=np.int64)) == 1.5)


def test_decoder_files_are_checked(tmp_path, weights) -> None:
    weights["encoder.0.weight"] = np.zeros(1, dtype=np.float32)
    np.savez(tmp_path / "vae.npz", **weights)
    assert load_mask_decoder(tmp_path / "vae.npz")(np.zeros((1, 16), dtype=np.int64)).shape == (1, 64, 64)
    with pytest.raises(UserError, match="no mask decoder at"):
        load_mask_decoder(tmp_path / "other.npz")
    (tmp_path / "text.npz").write_text("no arrays")
    with pytest.raises(UserError, match=r"not an \.npz file"):
        load_mask_decoder(tmp_path / "text.npz")
    with pytest.raises(UserError, match=r"lacks decoder\.0\.bias"):
        MaskDecoder({name: array for name, array in weights.items() if name != "decoder.0.bias"}, "x")
    with pytest.raises(UserError, match=r"decoder\.4\.weight has shape \(16, 8, 4, 4\)"):
        MaskDecoder(weights | {"decoder.4.weight": np.zeros((16, 8, 4, 4), dtype=np.float32)}, "x")


def _answer(locations: str = _WHOLE, codes: int = 16) -> str:
    return locations + "<seg007>" * codes


def test_invalid_segmentation_tokens_are_refused() -> None:
    read = read_segmentation(_answer() + " cat ; and more")
    assert read is not None
    assert read.codes == (7,) * 16
    assert read_segmentation(_answer(codes=15)) is None
    assert read_segmentation(_WHOLE) is None
    assert read_segmentation("cat " + _answer()) is None
    assert read_segmentation(_answer("<loc0100><loc0000><loc0100><loc1023>")) is None
    assert read_segmentation(_answer("<loc1024><loc0000><loc1023><loc1023>")) is None
    assert read_segmentation(_WHOLE + "<seg128>" * 16) is None


def test_mask_iou_by_hand() -> None:
    truth = np.zeros((10, 10), dtype=bool)
    truth[:, :5] = True
    full = np.ones((64, 64), dtype=np.float32)
    # The whole image against its left half: 50 / 100. The top half against the left half: 25 / (50 + 50 - 25).
    assert mask_iou(Box(0, 0, 1, 1), full, truth) == 0.5
    assert mask_iou(Box(0, 0, 0.5, 1), full, truth) == pytest.approx(1 / 3)
    assert mask_iou(Box(0, 0, 0.05, 1), full, truth) is None
    assert mask_iou(Box(0, 0, 1, 1), -full, truth) == 0


def test_mean_iou_of_predictions(tmp_path, make_sample, weights) -> None:
    flat = {name: np.zeros_like(array) for name, array in weights.items()} | {
        "decoder.12.bias": np.array([0.5], dtype=np.float32)
    }
    np.savez(tmp_path / "vae.npz", **flat)
    mask = {"size": [10, 10], "counts": [0, 50, 50]}  # the left half
    left = _answer(format_locations(Box(0, 0, 1, 0.5)))
    samples = [make_sample(id=str(number), mask=mask) for number in range(4)] + [make_sample()]
    result = metric("refseg_miou", mask_decoder=tmp_path / "vae.npz")(
        [left, _answer(), "no", _answer("<loc0000><loc0000><loc0010><loc1023>"), left], samples
    )
    # The box 0 to 512/1023 ends in pixel int(5.004) = 5: the mask is exact. The whole image: 50/100. The third has no
    # tokens, the fourth is int(0.0978) = 0 pixels high.
    assert result.values == pytest.approx((1, 0.5, 0, 0, np.nan), nan_ok=True)
    assert result.unparsed == 2
    assert result.totals == pytest.approx(
        {"refseg_miou": 0.375, "box_accuracy_50": 0.5, "box_accuracy_75": 0.25}, abs=1e-3
    )
    with pytest.raises(UserError, match=r"vae-oid\.npz"):
        metric("refseg_miou")([left], samples[:1])


def test_a_missing_mask_decoder_is_refused_before_any_prediction(tmp_path) -> None:
    with pytest.raises(UserError, match=r"no mask decoder at .*none\.npz"):
        metric("refseg_miou", mask_decoder=tmp_path / "none.npz")


@pytest.mark.parametrize(
    "mask",
    [
        "left half",
        {"size": 10, "counts": [100]},
        {"size": ["a", "b"], "counts": [100]},
        {"size": [10, 10], "counts": ["many"]},
        {"size": [10, 10], "counts": None},
        {"size": [10, 10], "polygons": [[0, 0, 5]]},
        {"size": [10, 10], "polygons": [["0", "0", "5", "5"]]},
        {"size": [10, 10]},
    ],
    ids=str,
)
def test_a_mask_that_is_no_coco_annotation_is_refused(make_sample, mask) -> None:
    with pytest.raises(UserError, match=r"The mask of sample 's7' is not a COCO annotation"):
        metric("refseg_miou")(["no tokens"], [make_sample(id="s7", mask=mask)])
