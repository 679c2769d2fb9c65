"""What the studies of attention find in maps whose answer is known, and on a small model."""

import numpy as np
import pytest

from parcelray.analysis.attention_maps import AttentionMaps, attention_maps
from parcelray.analysis.leave_token_out import Pair, leave_one_out, validity
from parcelray.analysis.redundancy_profile import redundancy_profile
from parcelray.analysis.saliency import jaccard, saliency_report
from parcelray.config.connector import M3ConnectorConfig
from parcelray.config.model import MiniLlavaModelConfig
from parcelray.errors import UserError
from parcelray.models.mini_llava import build

from ..models.conftest import CORPUS, MINI_LLAVA, random_images

PROMPTS = ["what color is the circle", "how many", "which image has more"]


def _maps(last_IPLHN: np.ndarray, tokens_INW: np.ndarray) -> AttentionMaps:
    images, count, _ = tokens_INW.shape
    contrast = np.random.default_rng(9).random((images, count)).astype(np.float32)
    return AttentionMaps(last_IPLHN.astype(np.float32), last_IPLHN.astype(np.float32), None, tokens_INW.astype(np.float32), contrast, int(count**0.5))


def test_rankings_that_follow_the_image_and_not_the_prompt_are_told_from_those_that_follow_the_prompt() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(6, 64, 4))
    by_image = np.broadcast_to(rng.random((6, 1, 1, 1, 64)), (6, 3, 1, 2, 64))
    by_prompt = np.broadcast_to(rng.random((1, 3, 1, 1, 64)), (6, 3, 1, 2, 64))
    report = saliency_report(_maps(np.concatenate([by_image, by_prompt], axis=2), tokens))
    image_layer, prompt_layer = report.between_prompts
    assert image_layer.spearman.value == pytest.approx(1)
    assert image_layer.kendall.value == pytest.approx(1)
    assert image_layer.jaccard.value == 1
    assert abs(prompt_layer.spearman.value) < 0.2
    assert abs(report.between_images[0].spearman.value) < 0.2
    assert report.between_images[1].spearman.value == pytest.approx(1)
    assert [each.value for each in report.between_heads] == [1, 1]
    assert report.between_layers[0, 0] == 1
    assert report.between_layers[0, 1] < 0.3
    assert report.with_class_attention == []


def test_what_draws_attention_is_found() -> None:
    rng = np.random.default_rng(1)
    tokens = rng.normal(size=(5, 64, 4)) * rng.uniform(1, 3, size=(5, 64, 1))
    norms = np.linalg.norm(tokens, axis=2)
    rows = np.broadcast_to(np.arange(64) // 8, (5, 64))
    layers = np.stack([norms, rows + 0.01 * rng.random((5, 64))], axis=1)[:, None, :, None]
    report = saliency_report(_maps(np.broadcast_to(layers, (5, 2, 2, 2, 64)), tokens))
    assert report.drawn_by["norm"][0].value == pytest.approx(1)
    assert report.drawn_by["row"][1].value > 0.95
    assert abs(report.drawn_by["column"][0].value) < 0.2


def test_the_overlap_is_of_the_highest() -> None:
    first, second = np.zeros(100, dtype=np.float32), np.zeros(100, dtype=np.float32)
    first[:11], second[5:16] = 1, 1
    assert jaccard(first, second) == pytest.approx(6 / 16)


def test_validity_tells_a_measure_that_matters_from_one_that_does_not() -> None:
    rng = np.random.default_rng(2)
    losses = [rng.normal(size=64) for _ in range(30)]
    measures = [{"good": loss + rng.normal(size=64), "bad": rng.normal(size=64), "constant": np.ones(64)} for loss in losses]
    found = validity(losses, measures, permutations=300)
    # The correlation of a value with itself and as much noise is 0.71, of ranks a little less.
    assert found["good"].correlation.value == pytest.approx(0.69, abs=0.05)
    assert found["good"].p_value == pytest.approx(1 / 301)
    assert found["good"].mass.value > 0.2
    assert found["bad"].p_value > 0.05
    assert found["bad"].mass.value == pytest.approx(0.11, abs=0.04)
    assert found["constant"].correlation.value == 0


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
    report = saliency_report(maps)
    assert -1 <= report.between_prompts[0].spearman.value <= 1
    losses, measures = leave_one_out(model, processor, Pair(images[0], PROMPTS[0], "red"), batch_size=100)
    assert losses.shape == (256,)
    assert {"norm", "random", "last word, layer 0", "mean of words, layer 2"} <= set(measures)
    assert ("vision tower" in measures) == (tower == "clip")
    profile = redundancy_profile(model, processor, images).measures
    explained = [profile[f"projected tokens: variance that {share} centres explain"].value for share in ("5%", "11%", "20%", "30%")]
    assert explained == sorted(explained)
    assert 0 < explained[0] < explained[-1] <= 1


def test_compressing_models_and_uneven_prompts_are_refused() -> None:
    model, processor = build(MINI_LLAVA, CORPUS, M3ConnectorConfig().model_dump(mode="json"), seed=0)
    with pytest.raises(UserError, match="and this one has the connector m3; give its vanilla base"):
        attention_maps(model.eval(), processor, random_images(1), [PROMPTS])
    plain, _ = build(MINI_LLAVA, CORPUS, None, seed=0)
    with pytest.raises(UserError, match="give every image as many"):
        attention_maps(plain.eval(), processor, random_images(2), [PROMPTS, PROMPTS[:1]])
