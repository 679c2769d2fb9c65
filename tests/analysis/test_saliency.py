"""The studies of attention, on made-up maps with a known result and on a small model."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from parcelray.analysis.attention_maps import AttentionMaps, attention_maps
from parcelray.analysis.leave_token_out import leave_one_out, shifted_positions, validity
from parcelray.analysis.redundancy_profile import redundancy_profile
from parcelray.analysis.saliency import jaccard, saliency_report, saliency_reports
from parcelray.config.connector import M3ConnectorConfig
from parcelray.config.model import MiniLlavaModelConfig
from parcelray.errors import UserError
from parcelray.evaluation.inputs import Pair
from parcelray.models.mini_llava import build

from ..models.conftest import CORPUS, MINI_LLAVA, random_images

PROMPTS = ["what color is the circle", "how many", "which image has more"]


def _maps(last_IPLHN: np.ndarray, tokens_INW: np.ndarray) -> AttentionMaps:
    images, count, _ = tokens_INW.shape
    contrast = np.random.default_rng(9).random((images, count)).astype(np.float32)
    return AttentionMaps(
        last_IPLHN.astype(np.float32),
        last_IPLHN.astype(np.float32),
        None,
        tokens_INW.astype(np.float32),
        contrast,
        int(count**0.5),
    )


def test_rankings_by_the_image_are_distinguished_from_rankings_by_the_prompt() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(6, 64, 4))
    by_image = np.broadcast_to(rng.random((6, 1, 1, 1, 64)), (6, 3, 1, 2, 64))
    by_prompt = np.broadcast_to(rng.random((1, 3, 1, 1, 64)), (6, 3, 1, 2, 64))
    maps = _maps(np.concatenate([by_image, by_prompt], axis=2), tokens)
    report = saliency_report(maps.last_word_IPLHN, maps)
    image_layer, prompt_layer = report.between_prompts
    assert image_layer.spearman.value == pytest.approx(1)
    assert image_layer.kendall.value == pytest.approx(1)
    assert image_layer.jaccard.value == 1
    assert abs(prompt_layer.spearman.value) < 0.2
    assert abs(report.between_images[0].spearman.value) < 0.2
    assert report.between_images[1].spearman.value == pytest.approx(1)
    assert [each.jaccard.value for each in report.between_heads] == [1, 1]
    assert [each.spearman.value for each in report.between_heads] == pytest.approx([1, 1])
    assert report.between_layers[0][0].jaccard[:3] == (1, 1, 1)
    assert report.between_layers[0][1].jaccard.value < 0.3
    assert abs(report.between_layers[0][1].spearman.value) < 0.3
    assert report.with_class_attention == []


def test_a_head_that_ignores_the_prompt_is_distinguished_from_one_that_depends_on_it() -> None:
    rng = np.random.default_rng(3)
    ignores = np.broadcast_to(rng.random((5, 1, 1, 1, 100)), (5, 3, 1, 1, 100))
    follows = 10 * rng.random((5, 3, 1, 1, 100))
    maps = _maps(np.concatenate([ignores, follows], axis=3), rng.normal(size=(5, 100, 4)))
    report = saliency_report(maps.last_word_IPLHN, maps)
    (ignoring, following), averaged = report.by_head[0], report.between_prompts[0]
    assert ignoring.spearman[:3] == pytest.approx((1, 1, 1))
    assert ignoring.jaccard[:3] == (1, 1, 1)
    assert abs(following.spearman.value) < 0.15
    assert following.jaccard.value < 0.15
    # The mean over heads hides the agreement of the first head.
    assert averaged.spearman.value < 0.3


def test_both_definitions_are_compared_each_by_its_own_maps() -> None:
    rng = np.random.default_rng(4)
    maps = _maps(np.broadcast_to(rng.random((3, 1, 1, 1, 64)), (3, 2, 1, 1, 64)), rng.normal(size=(3, 64, 4)))
    reports = saliency_reports(replace(maps, mean_word_IPLHN=rng.random((3, 2, 1, 1, 64)).astype(np.float32)))
    assert reports["last word"].between_prompts[0].spearman.value == pytest.approx(1)
    assert abs(reports["mean of words"].between_prompts[0].spearman.value) < 0.3


def test_rankings_and_overlaps_are_those_of_scipy_and_of_sets() -> None:
    rng = np.random.default_rng(5)
    attention = np.round(rng.random((2, 2, 1, 1, 64)), 1).astype(np.float32)
    maps = _maps(attention, rng.normal(size=(2, 64, 4)))
    (overlap,) = saliency_report(maps.last_word_IPLHN, maps).by_head[0]
    pairs = [(attention[image, 0, 0, 0], attention[image, 1, 0, 0]) for image in range(2)]
    assert overlap.spearman.value == pytest.approx(
        np.mean([stats.spearmanr(a, b).statistic for a, b in pairs]), abs=1e-6
    )
    assert overlap.jaccard.value == pytest.approx(np.mean([jaccard(a, b) for a, b in pairs]))


def test_the_properties_that_attract_attention_are_identified() -> None:
    rng = np.random.default_rng(1)
    tokens = rng.normal(size=(5, 64, 4)) * rng.uniform(1, 3, size=(5, 64, 1))
    norms = np.linalg.norm(tokens, axis=2)
    rows = np.broadcast_to(np.arange(64) // 8, (5, 64))
    layers = np.stack([norms, rows + 0.01 * rng.random((5, 64))], axis=1)[:, None, :, None]
    maps = _maps(np.broadcast_to(layers, (5, 2, 2, 2, 64)), tokens)
    report = saliency_report(maps.last_word_IPLHN, maps)
    assert report.drawn_by["norm"][0].value == pytest.approx(1)
    assert report.drawn_by["row"][1].value > 0.95
    assert abs(report.drawn_by["column"][0].value) < 0.2


def test_the_jaccard_index_is_of_the_highest_values() -> None:
    first, second = np.zeros(100, dtype=np.float32), np.zeros(100, dtype=np.float32)
    first[:11], second[5:16] = 1, 1
    assert jaccard(first, second) == pytest.approx(6 / 16)


def test_validity_distinguishes_a_relevant_measure_from_an_irrelevant_one() -> None:
    rng = np.random.default_rng(2)
    losses = [rng.normal(size=64) for _ in range(30)]
    measures = [
        {"good": loss + rng.normal(size=64), "bad": rng.normal(size=64), "constant": np.ones(64)} for loss in losses
    ]
    found = validity(losses, measures, permutations=300)
    # The correlation of a value with itself and as much noise is 0.71, of ranks a little less.
    assert found["good"].correlation.value == pytest.approx(0.69, abs=0.05)
    assert found["good"].p_value == pytest.approx(1 / 301)
    assert found["good"].mass.value > 0.2
    assert found["good"].p_holm == pytest.approx(3 / 301)
    assert found["bad"].p_value > 0.05
    assert found["bad"].mass.value == pytest.approx(0.11, abs=0.04)
    assert found["constant"].correlation.value == 0


def test_a_shift_keeps_neighbours_together() -> None:
    positions = shifted_positions(64, 200, np.random.default_rng(0))
    assert all(sorted(each) == list(range(64)) for each in positions.tolist())
    assert len({tuple(each) for each in positions.tolist()}) > 100
    rows, columns = np.divmod(positions.reshape(-1, 8, 8), 8)
    neighbours = np.abs(columns[:, :, 1:] - columns[:, :, :-1])
    assert set(neighbours.ravel().tolist()) <= {1, 7}, "on a torus the first and the last column are neighbours"
    assert (rows[:, :, 1:] == rows[:, :, :-1]).all()


def test_unrelated_smooth_maps_are_not_significant() -> None:
    rng = np.random.default_rng(6)

    def smooth() -> np.ndarray:
        waves = np.fft.rfft2(rng.normal(size=(16, 16)))
        waves[3:-2], waves[:, 3:] = 0, 0
        return np.asarray(np.fft.irfft2(waves, (16, 16))).ravel()

    p_values = []
    for _ in range(30):
        losses, measures = [smooth() for _ in range(5)], [{"unrelated": smooth()} for _ in range(5)]
        p_values.append(validity(losses, measures, permutations=200)["unrelated"].p_value)
    # Shuffling single tokens would give p < 0.05 in half of these cases; shifts of the grid give it in about one of 20.
    assert sum(value < 0.05 for value in p_values) <= 4


@pytest.mark.parametrize("tower", ["clip", "convnext"])
def test_a_model_is_studied(tower: str) -> None:
    config = MiniLlavaModelConfig(**MINI_LLAVA.model_dump() | {"tower": tower})
    model, processor = build(config, CORPUS, None, seed=0)
    model.eval()
    images = random_images(3)
    maps = attention_maps(model, processor, images, [PROMPTS] * 3)
    assert maps.last_word_IPLHN.shape == maps.mean_word_IPLHN.shape == (3, 3, 3, 2, 256)
    # All visual tokens together get less than all attention: words get some, too.
    assert 0 < float(maps.last_word_IPLHN.sum(-1).max()) < 1
    assert (maps.class_attention_IN is None) == (tower == "convnext")
    report = saliency_reports(maps)["mean of words"]
    assert len(report.by_head) == 3
    assert len(report.by_head[0]) == 2
    assert -1 <= report.between_prompts[0].spearman.value <= 1
    losses, measures = leave_one_out(model, processor, Pair(images[0], PROMPTS[0], "red"), batch_size=100)
    assert losses.shape == (256,)
    assert {"norm", "random", "last word, layer 0", "mean of words, layer 2"} <= set(measures)
    assert ("vision tower" in measures) == (tower == "clip")
    profile = redundancy_profile(model, processor, images).measures
    explained = [
        profile[f"projected tokens: variance that {share} centres explain"].value
        for share in ("5%", "11%", "20%", "30%")
    ]
    assert explained == sorted(explained)
    assert 0 < explained[0] < explained[-1] <= 1


def test_compressing_models_and_uneven_prompts_are_refused() -> None:
    model, processor = build(MINI_LLAVA, CORPUS, M3ConnectorConfig().model_dump(mode="json"), seed=0)
    with pytest.raises(
        UserError, match="The model has the connector m3, but attention maps need a model without compression"
    ):
        attention_maps(model.eval(), processor, random_images(1), [PROMPTS])
    plain, _ = build(MINI_LLAVA, CORPUS, None, seed=0)
    with pytest.raises(UserError, match="give every image the same number of prompts"):
        attention_maps(plain.eval(), processor, random_images(2), [PROMPTS, PROMPTS[:1]])
