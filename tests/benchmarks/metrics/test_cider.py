"""CIDEr-D: computed by hand, compared with pycocoevalcap's scores and with the tokens of the Stanford tokenizer."""

import json
import math
import random
from pathlib import Path

import pytest

from parcelray.benchmarks.metrics import metric
from parcelray.benchmarks.metrics.cider import caption_tokens, cider_d

_OFFICIAL = json.loads((Path(__file__).parent / "official_scores.json").read_text(encoding="utf-8"))


def test_by_hand() -> None:
    # Two images, each n-gram in one of them, so idf = log 2.
    # "a b" against itself: orders 1 and 2 have cosine 1, orders 3 and 4 have no n-grams: 10 x 2/4 = 5.
    # "c x" against "c d": in order 1 one of two words agrees, and x, which is in no reference, also has weight log 2:
    # cosine 1/2. Order 2 has no match: 10 x (1/2)/4 = 1.25.
    assert cider_d([["a", "b"], ["c", "x"]], [[["a", "b"]], [["c", "d"]]]) == pytest.approx([5, 1.25])


def test_repeated_words_are_clipped_and_a_wrong_length_is_penalised() -> None:
    # "a a" against "a": order 1 weights 2w and w: min(2w, w) x w / (2w x w) = 1/2. Lengths in bigrams are 1 and 0, so
    # the penalty is exp(-1/72): 10 x (1/2)/4 x exp(-1/72).
    assert cider_d([["a", "a"], ["b"]], [[["a"]], [["b"]]])[0] == pytest.approx(1.25 * math.exp(-1 / 72))


def test_scores_equal_those_of_pycocoevalcap() -> None:
    cases = _OFFICIAL["cider"]
    ours = cider_d(
        [case["caption"].split() for case in cases], [[text.split() for text in case["references"]] for case in cases]
    )
    assert ours == pytest.approx([case["score"] for case in cases], rel=1e-12, abs=1e-12)


def test_agreement_with_an_installed_pycocoevalcap() -> None:
    reason = "needs a package of 100 MB: .venv/bin/python -m pip install pycocoevalcap"
    official = pytest.importorskip("pycocoevalcap.cider.cider", reason=reason)
    draw = random.Random(5)
    for size in (1, 2, 15):
        captions = [[draw.choice("abcdefg") for _ in range(draw.randint(0, 9))] for _ in range(size)]
        references = [
            [[draw.choice("abcdefg") for _ in range(draw.randint(1, 9))] for _ in range(draw.randint(1, 4))]
            for _ in range(size)
        ]
        truths = {number: [" ".join(tokens) for tokens in each] for number, each in enumerate(references)}
        answers = {number: [" ".join(tokens)] for number, tokens in enumerate(captions)}
        assert cider_d(captions, references) == pytest.approx(
            list(official.Cider().compute_score(truths, answers)[1]), rel=1e-12, abs=1e-12
        )


def test_a_corpus_score_is_not_a_mean_over_subsets(make_sample) -> None:
    samples = [
        make_sample("a red cat on grass", "the cat"),
        make_sample("a blue dog on grass"),
        make_sample("two birds"),
    ]
    predictions = ["a red cat", "a blue dog", "two birds"]
    whole = metric("cider")(predictions, samples)
    part = metric("cider")(predictions[:2], samples[:2])
    assert whole.totals["cider"] == pytest.approx(sum(whole.values) / 3)
    assert part.values != pytest.approx(whole.values[:2])


def test_a_sample_without_references_is_not_in_the_corpus(make_sample) -> None:
    samples = [make_sample("a red cat"), make_sample(), make_sample("two birds")]
    result = metric("cider")(["a red cat", "x", "birds"], samples)
    assert math.isnan(result.values[1])
    assert [result.values[0], result.values[2]] == list(
        metric("cider")(["a red cat", "birds"], [samples[0], samples[2]]).values
    )


def test_case_and_punctuation_do_not_matter(make_sample) -> None:
    samples = [make_sample("A red cat, sitting."), make_sample("Two birds")]
    assert (
        metric("cider")(["a RED cat sitting", "two birds!"], samples).values
        == metric("cider")(["A red cat; sitting", "Two birds"], samples).values
    )


@pytest.mark.parametrize(
    ("caption", "tokens"),
    # Output of the Stanford tokenizer 3.4.1 with coco-caption's options and list of punctuation.
    [
        ("A man's photo of a dog, sitting on a 3.5-inch chair.", "a man 's photo of a dog sitting on a 3.5-inch chair"),
        (
            'Two people don\'t like "pizza" (with cheese) & beer!',
            "two people do n't like pizza -lrb- with cheese -rrb- & beer",
        ),
        (
            "the boys' bikes and/or 1/2 of a pie; 50% off for $5.99 at 10:30 a.m.",
            "the boys bikes and/or 1/2 of a pie 50 % off for $ 5.99 at 10:30 a.m.",
        ),
        (
            "I cannot see what he's gonna do... they're here -- we'll go",
            "i can not see what he 's gon na do they 're here we 'll go",
        ),
        (
            "It's the girl's U.S. flag at St. Mark's in Washington D.C.",
            "it 's the girl 's u.s. flag at st. mark 's in washington d.c.",
        ),
        ("a sign that reads 'stop' and 5 o'clock", "a sign that reads stop and 5 o'clock"),
        ("A living room with tv,couch", "a living room with tv couch"),
        ("what?! wow!! hmm....", "what ?! wow !! hmm"),
        ("can't won't shouldn't i'm you've", "ca n't wo n't should n't i 'm you 've"),
    ],
)
def test_tokens(caption: str, tokens: str) -> None:
    assert caption_tokens(caption) == tokens.split()
