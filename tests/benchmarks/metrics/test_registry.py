"""Metrics by name, and properties of all metrics."""

import math
import random
import re
from pathlib import Path

import pytest

from parcelray.benchmarks.metrics import METRICS, RENAMED, metric
from parcelray.errors import UserError

_METADATA = {
    "choices": ["red", "blue"],
    "index": 1,
    "category": "existence",
    "image_id": "1",
    "question_type": "comp",
    "box": [0, 0, 0.5, 0.5],
}


_ALL = [metric for variants in METRICS.values() for metric in variants.values()]


def test_every_variant_is_found_by_name() -> None:
    assert metric("vqa_accuracy").variant == "leave_one_out"
    assert metric("vqa_accuracy:simple").variant == "simple"
    assert metric("exact_match").variant == "lenient"
    for each in _ALL:
        assert metric(f"{each.name}:{each.variant}") == each


def test_the_documentation_lists_every_variant(repo_root: Path) -> None:
    page = (repo_root / "docs" / "metrics.md").read_text(encoding="utf-8")
    sections = {section.splitlines()[0]: section for section in re.split(r"\n##+ ", page)}
    for name, members in METRICS.items():
        rows = re.findall(r"^\| `(\w+)` \|", sections[name], re.MULTILINE)
        assert rows == list(members), f"{name}: in order, the default variant first"


def test_errors_about_unknown_names_suggest_similar_ones() -> None:
    with pytest.raises(UserError, match="did you mean 'vqa_accuracy'"):
        metric("vqa_acuracy")
    with pytest.raises(UserError, match=r"no variant 'leave_one_in' \(did you mean 'leave_one_out'"):
        metric("vqa_accuracy:leave_one_in")


def test_a_variant_of_a_stored_evaluation_is_found_by_its_earlier_name() -> None:
    for old, new in RENAMED.items():
        assert old.partition(":")[2] not in METRICS[old.partition(":")[0]]
        assert metric(old) is metric(new)
    assert metric("anls:strict").variant == "paper"


def test_only_metrics_of_independent_samples_are_additive() -> None:
    assert {each.name for each in _ALL if not each.additive} == {"cider", "mmbench", "mme", "pope", "rsvqa"}
    assert metric("mme").paper_scale == 1


def _all_but_masks():
    return [pytest.param(each, id=f"{each.name}:{each.variant}") for each in _ALL if each.name != "refseg_miou"]


@pytest.mark.parametrize("each", _all_but_masks())
def test_the_order_of_samples_changes_nothing(each, make_sample) -> None:
    draw = random.Random(1)
    words = ["yes", "no", "A", "red", "two", "<loc0000><loc0000><loc0512><loc0512>", ""]
    samples = []
    for number in range(24):
        answer = draw.choice(["yes", "no"]) if each.name in ("mme", "pope", "nlvr2") else draw.choice(["A", "B"])
        pair = {
            "index": number // 2 + 1_000_000 * (number % 2),
            "image_id": str(number // 2),
            "category": ("existence", "count")[number // 2 % 2],
        }
        samples.append(make_sample(answer, answer, id=str(number), **(_METADATA | pair)))
    predictions = [draw.choice(words) for _ in samples]
    result = each(predictions, samples)
    order = draw.sample(range(24), 24)
    shuffled = each([predictions[index] for index in order], [samples[index] for index in order])
    assert shuffled.values == pytest.approx([result.values[index] for index in order], nan_ok=True)
    assert shuffled.totals == pytest.approx(result.totals, nan_ok=True)
    assert shuffled.unparsed == result.unparsed
    assert next(iter(result.totals)) == each.name
    if each.additive:
        scored = [value for value in result.values if not math.isnan(value)]
        assert result.totals[each.name] == pytest.approx(sum(scored) / len(scored))


@pytest.mark.parametrize("each", _all_but_masks())
def test_a_sample_without_answers_is_unscored_and_never_zero(each, make_sample) -> None:
    metadata = {key: value for key, value in _METADATA.items() if key != "box"}
    result = each(["A"], [make_sample(**metadata)])
    assert math.isnan(result.values[0])
    assert math.isnan(result.totals[each.name])
    assert result.unparsed == 0


@pytest.mark.parametrize("each", _all_but_masks())
def test_a_missing_prediction_is_refused(each, make_sample) -> None:
    with pytest.raises(ValueError, match="argument"):
        each([], [make_sample("A", **_METADATA)])


@pytest.mark.parametrize(
    ("name", "key", "value", "legal"),
    [
        ("gqa", "types", "query", "a mapping with the texts `structural` and `semantic`, or null"),
        ("gqa", "types", ["query", "attr"], "a mapping"),
        ("gqa", "types", {"structural": ["query"]}, "a mapping"),
        ("box_iou", "box", [0, 0, 1], "four finite numbers"),
        ("box_iou", "box", ["0", "0", "1", "1"], "four finite numbers"),
        ("box_iou:mean", "box", "[0, 0, 1, 1]", "four finite numbers"),
        ("box_iou", "box", [0, 0, math.nan, 1], "four finite numbers"),
        ("box_iou", "box", [0, 0, 10**400, 1], "four finite numbers"),
        ("counting", "issimple", ["x"], "1 (simple), 0 (complex) or null"),
        ("counting", "issimple", "yes", "1 (simple)"),
        ("mme", "image_id", None, "an id that the two questions of an image share"),
    ],
)
def test_metadata_of_another_type_are_refused(make_sample, name: str, key: str, value: object, legal: str) -> None:
    sample = make_sample("yes", id="s7", **(_METADATA | {key: value}))
    sentence = f"metadata {key!r} of sample 's7' of b, which is {value!r}; give {legal}"
    with pytest.raises(UserError, match=re.escape(sentence)):
        metric(name)(["yes"], [sample])


@pytest.mark.parametrize(("name", "key"), [("gqa", "types"), ("box_iou", "box"), ("counting", "issimple")])
def test_null_metadata_are_like_absent_ones(make_sample, name: str, key: str) -> None:
    answer = "<loc0000><loc0000><loc0512><loc0512>"
    result = metric(name)([answer], [make_sample(answer, **{key: None})])
    assert result == metric(name)([answer], [make_sample(answer)])
    assert result.values == (1,)
