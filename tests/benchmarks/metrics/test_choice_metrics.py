"""Multiple-choice metrics: which option a prediction names, computed by hand from each tool's rule."""

import math

import pytest

from parcelray.benchmarks.metrics import metric
from parcelray.benchmarks.metrics.multiple_choice import (
    options,
    read_first_character,
    read_llava_sqa,
    read_lmms_eval_sqa,
    read_option,
    read_paligemma_sqa,
)
from parcelray.errors import UserError

_CHOICES = ["red cat", "blue dog", "green bird"]
_OPTIONS = options(_CHOICES)

# VLMEvalKit's can_infer_option: the only letter among the words, first occurring within the last four of them.
_NAMING = (
    "{L}", "{L}.", "({L})", "[{L}]", "{L}:", "{L})", " {L} ", "**{L}**", "#{L}", "{{{L}}}", "{L},", "{L};", "{L}!",
    "{L}\n", "Answer: {L}", "Answer:{L}", "answer {L}", "The answer is {L}.", "The answer is {L}",
    "The answer is ({L}).", "The correct option is ({L}).", "The correct option is {L}", "The correct answer is: {L}.",
    "I think it is {L}.", "I would choose {L}", "Option {L}", "Option {L}.", "Option ({L}) is correct.",
    "{L} is correct", "{L}: it is red", "{L}. it is red", "{L} is the answer", "{L}, I am sure", "{L} {L}",
    "My final answer to this question is {L}.", "Based on the image, the answer is **{L}**.",
    "It has to be {L}, of course.", "We can see in the picture that ({L}) holds.", "So: {L}", "[Answer] {L}",
    "Neither of the others, {L}!", "As shown here, {L} fits best.", "Final: {L}#",
)  # fmt: skip
_NOT_NAMING = (
    "{L}: because it is red", "{L} or maybe not, I am not sure at all", "{L}1", "x{L}", "{L}-", "'{L}'", '"{L}"',
    "{L}?", "option_{L}", "The answer is {L}/", "answer={L}",
)  # fmt: skip


@pytest.mark.parametrize("template", _NAMING)
def test_a_letter_is_parsed_whichever_letter_it_is(template: str) -> None:
    named = options([f"choice number {number}" for number in range(8)])
    assert {letter: read_option(template.format(L=letter), named) for letter in named} == {each: each for each in named}


@pytest.mark.parametrize("template", _NOT_NAMING)
def test_a_letter_is_not_parsed_whichever_letter_it_is(template: str) -> None:
    named = options([f"choice number {number}" for number in range(8)])
    assert {read_option(template.format(L=letter), named) for letter in named} == {None}


def test_the_templates_are_enough() -> None:
    assert len(set(_NAMING)) >= 40


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("It is a Blue dog", "B"), ("a red cat", "A"), ("A red cat", "A"), ("A man walks with a blue dog", "B"),
        ("A or B", None), ("a red cat and a blue dog", None), ("D", None), ("", None), ("neither", None), ("ABC", None),
        ("BC", None), ("b", None), ("blue dog " * 7, None), ("no, the answer is neither A nor blue dog", "A"),
    ],
)  # fmt: skip
def test_option_by_letter_then_by_text(text: str, letter: str | None) -> None:
    assert read_option(text, _OPTIONS) == letter


@pytest.mark.parametrize(
    ("choices", "text", "letter"),
    [
        (["300 AD", "300 BC", "150 AD", "150 BC"], "300 BC", "B"),
        (["DVD", "CD", "VHS", "tape"], "CD", "B"),
        (["cat", "caterpillar"], "Caterpillar", "B"),
        (["cat", "caterpillar"], "a caterpillar", None),
        (["x", "", "y"], "C", "C"),
        (["x", "", "y"], "B", None),
        (["x", None, 12], "12", "C"),
    ],
)
def test_option_texts_and_empty_options(choices: list[object], text: str, letter: str | None) -> None:
    assert read_option(text, options(choices)) == letter


@pytest.mark.parametrize(
    ("text", "llava", "lmms_eval", "first", "paligemma"),
    [
        ("B", "B", "B", "B", None),
        ("b", None, "B", "B", None),
        ("B. blue dog", "B", "B", "B", None),
        ("B.", None, "B", "B", None),
        ("b. blue dog", None, None, "B", None),
        ("The answer is B.", "B", None, None, "B"),
        ("The answer is B", None, None, None, None),
        ("The answer is B, because", "B", None, None, None),
        ("The answer is B\n", None, None, None, None),
        ("The answer is Blue dog", "B", None, None, None),
        ("the answer is b. Sure", None, None, None, "B"),
        ("The answer is B. The answer is C.", None, None, None, "B"),
        ("D. The answer is B.", None, None, None, None),
        ("X. The answer is B.", "B", None, None, None),
        ("Blue dog", None, None, "B", None),
        ("blue dog", None, None, "B", None),
        (" B", None, None, "B", None),
        ("E", None, None, None, None),
        ("AB", None, None, "A", None),
        ("", None, None, None, None),
    ],
)
def test_parsers_of_other_tools(
    text: str, llava: str | None, lmms_eval: str | None, first: str | None, paligemma: str | None
) -> None:
    assert read_llava_sqa(text, _OPTIONS) == llava
    assert read_lmms_eval_sqa(text, _OPTIONS) == lmms_eval
    assert read_first_character(text, _OPTIONS) == first
    assert read_paligemma_sqa(text, _OPTIONS) == paligemma


def test_an_unparsed_prediction_is_wrong_and_counted(make_sample) -> None:
    samples = [make_sample("B", choices=_CHOICES)] * 4
    result = metric("multiple_choice")(["B", "C", "no idea", ""], samples)
    assert result.values == (1, 0, 0, 0)
    assert result.unparsed == 2
    assert all(metric("multiple_choice")(["no idea"] * 4, samples).values == (0, 0, 0, 0) for _ in range(5))


def test_the_answer_may_be_a_letter_a_text_or_a_sentence(make_sample) -> None:
    for answer in ("B", "blue dog", "The answer is B."):
        assert metric("multiple_choice")(["B"], [make_sample(answer, choices=_CHOICES)]).values == (1,)
    with pytest.raises(UserError, match="choices"):
        metric("multiple_choice")(["B"], [make_sample("B")])


def test_a_target_is_a_position_if_it_is_known(make_sample) -> None:
    choices = ["D", "A", "E", "B"]
    for variant, answers in (
        ("option", ("A", "D")),
        ("first_character", ("a", "D")),
        ("llava_sqa", ("The answer is A.", "D")),
        ("lmms_eval_sqa", ("A.", "D")),
        ("paligemma_sqa", ("The answer is A.", "The answer is D.")),
    ):
        samples = [make_sample("D", choices=choices, target_index=0)] * 2
        assert metric(f"multiple_choice:{variant}")(answers, samples).values == (1, 0)
    for index in (4, -1):
        result = metric("multiple_choice")(["A"], [make_sample("D", choices=choices, target_index=index)])
        assert math.isnan(result.values[0])


def test_more_choices_than_letters_are_refused_by_name(make_sample) -> None:
    choices = [f"number {number}" for number in range(27)]
    sample = make_sample("number 26", choices=choices)
    for name in ("multiple_choice", "mmbench", "mmmu"):
        with pytest.raises(UserError, match="sample '1' of b: it has 27 choices; the letters A to Z name at most 26"):
            metric(name)(["A"], [sample])
    assert metric("multiple_choice")(["number 25"], [make_sample("Z", choices=choices[:26])]).values == (1,)


def _rotations(make_sample):
    # Question 7 in three rotations, question 8 in two.
    rows = [(7, "A"), (1_000_007, "B"), (2_000_007, "C"), (8, "A"), (1_000_008, "B")]
    return [
        make_sample(answer, id=str(index), index=index, choices=_CHOICES, category="x" if index % 10 == 7 else "y")
        for index, answer in rows
    ]


def test_an_mmbench_question_is_correct_only_in_every_rotation(make_sample) -> None:
    samples = _rotations(make_sample)
    result = metric("mmbench")(["A", "B", "A", "A", "B"], samples)
    # Question 7 is wrong in one rotation, question 8 is correct: 1/2. Rows: 4/5.
    assert result.totals == {"mmbench": 0.5, "rows": 0.8, "category/x": 0.0, "category/y": 1.0}
    assert metric("mmbench:vanilla")(["A", "B", "A", "A", "B"], samples).totals["mmbench"] == 1
    assert metric("mmbench")(["?", "B", "C", "A", "B"], samples).unparsed == 1


def test_mmbench_rows_with_the_same_index_are_refused(make_sample) -> None:
    samples = [make_sample("A", id=name, index=7, choices=_CHOICES) for name in ("one", "two")]
    with pytest.raises(UserError, match="'index' of sample 'two' of b, which is 7; give every row another index"):
        metric("mmbench")(["A", "A"], samples)
