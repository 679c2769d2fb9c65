"""Schedules, rankings and mergers of the in-decoder methods, compared with slow references."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from parcelray.errors import UnsupportedBudgetError, UserError
from parcelray.models.backbones.base import Depths
from parcelray.models.token_reduction.base import PromptView, ReductionContext
from parcelray.models.token_reduction.fastv import FastV
from parcelray.models.token_reduction.in_decoder import InDecoderReducer, Stage, mean_tokens
from parcelray.models.token_reduction.mmtok import MMTok
from parcelray.models.token_reduction.pyramid_drop import PyramidDrop
from parcelray.models.token_reduction.saliency import Saliency
from parcelray.models.token_reduction.sparsevlm import SparseVLM, density_peaks, raters, recycled

EACH = pytest.mark.parametrize("reducer", [FastV(), FastV(layer=3), PyramidDrop(first_layer=2), SparseVLM()], ids=repr)


@EACH
@pytest.mark.parametrize("budget", [64, 128, 192, 300, 576])
def test_the_budget_is_the_mean_over_the_layers(reducer: InDecoderReducer, budget: int) -> None:
    stages = reducer.stages(32, 576, budget)
    result = mean_tokens(stages, 32, 576)
    assert budget - 1.5 <= result <= budget
    assert all(1 <= stage.layer < 32 and 1 <= stage.num_tokens < 576 for stage in stages)
    assert list(stages) == sorted(stages)


@pytest.mark.parametrize(
    ("reducer", "smallest"), [(FastV(), 37), (PyramidDrop(), 19), (PyramidDrop(first_layer=8), 145), (SparseVLM(), 37)]
)
def test_the_smallest_budget_covers_the_first_layers(reducer: InDecoderReducer, smallest: int) -> None:
    assert mean_tokens(reducer.stages(32, 576, smallest), 32, 576) <= smallest
    with pytest.raises(UnsupportedBudgetError, match=rf"does not support {smallest - 2} visual tokens"):
        reducer.stages(32, 576, smallest - 2)


def test_fastv_with_half_of_the_tokens_has_the_papers_mean() -> None:
    # K = 3 and R = 50 %, in 32 layers.
    assert mean_tokens((Stage(3, 288, 2),), 32, 576) == pytest.approx(315)
    assert FastV(layer=3).stages(32, 576, 315) == (Stage(3, 288, 2),)


def test_pyramid_drop_with_half_per_stage_is_the_papers_schedule() -> None:
    mean = 576 * (1 + 0.5 + 0.25 + 0.125) / 4
    assert PyramidDrop().stages(32, 576, round(mean)) == (Stage(8, 288, 8), Stage(16, 144, 16), Stage(24, 72, 24))


def test_pyramid_drop_begins_earlier_for_budgets_that_a_quarter_of_the_layers_exceeds() -> None:
    for budget, layers in ((145, [8, 16, 24]), (144, [2, 12, 22]), (37, [2, 12, 22]), (36, [1, 12, 22])):
        assert [stage.layer for stage in PyramidDrop().stages(32, 576, budget)] == layers


# Published numbers of kept tokens for each budget, plus the clusters of the recycled tokens. Example: of 576 - 300
# dropped tokens, int(0.3 * 276) + 1 = 83 are recycled, in int(83 / 10) + 1 = 9 clusters.
PUBLISHED = [
    (192, (300 + 9, 200 + 4, 110 + 3), 192.03),
    (128, (303 + 9, 110 + 7, 36 + 3), 128.63),
    (64, (66 + 16, 30 + 2, 17 + 1), 64.81),
]


@pytest.mark.parametrize(("budget", "totals", "mean"), PUBLISHED)
def test_sparsevlm_has_the_stages_of_the_paper(budget: int, totals: tuple[int, ...], mean: float) -> None:
    # With the recycled tokens, the mean of the published numbers is slightly above the nominal budget.
    published = tuple(Stage(layer, total, layer) for layer, total in zip((2, 6, 15), totals, strict=True))
    assert mean_tokens(published, 32, 576) == pytest.approx(mean, abs=0.01)
    stages = SparseVLM().stages(32, 576, budget)
    assert [stage.layer for stage in stages] == [2, 6, 15]
    assert all(0 <= total - stage.num_tokens <= 1 for stage, total in zip(stages, totals, strict=True))


def test_a_shallow_decoder_has_fewer_stages() -> None:
    assert FastV().stages(3, 256, 200) == (Stage(2, 88, 1),)
    assert PyramidDrop().stages(3, 256, 256) == ()
    assert [stage.layer for stage in PyramidDrop().stages(3, 256, 128)] == [1, 2]
    assert [stage.layer for stage in SparseVLM().stages(3, 256, 128)] == [1]
    with pytest.raises(UnsupportedBudgetError, match="mean over the decoder's layers"):
        FastV().stages(3, 256, 77)


@pytest.mark.parametrize(
    ("reducer", "setting"),
    [(FastV(layer=32), "fastv.layer 32"), (PyramidDrop(first_layer=40), "pyramid_drop.first_layer")],
)
def test_a_first_layer_beyond_the_decoder_is_refused(reducer: InDecoderReducer, setting: str) -> None:
    with pytest.raises(UserError, match=rf"{setting}.* is not a layer of this decoder of 32 layers; choose 1 to 31\."):
        reducer.stages(32, 576, 570)
    with pytest.raises(UserError, match=setting):
        reducer.budgets_of(576, Depths(23, 32))
    assert FastV(layer=31).stages(32, 576, 570) == (Stage(31, 384, 30),)


def _view(attention: Tensor, valid: Tensor | None = None) -> PromptView:
    batch, _, text, visual = attention.shape
    generator = torch.Generator().manual_seed(2)
    valid = torch.ones(batch, text, dtype=torch.bool) if valid is None else valid
    return PromptView(
        torch.randn(batch, text, 6, generator=generator),
        valid,
        torch.randn(batch, visual, 6, generator=generator),
        lambda layer: attention,
        num_layers=4,
        grid_side=2,
    )


@pytest.fixture
def attention() -> Tensor:
    return torch.rand(2, 3, 5, 40, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(4))


def _best(scores: Any, count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda token: -float(scores[token]))[:count])


@pytest.mark.parametrize("reducer", [FastV(), PyramidDrop(), Saliency(definition="last_text")], ids=repr)
def test_the_last_word_ranks_the_tokens(reducer: Any, attention: Tensor, tokens: Tensor) -> None:
    result = reducer(tokens, num_visual_tokens=7, context=ReductionContext(prompt=_view(attention)))
    for prompt in range(2):
        assert result.position_ids_BK[prompt].tolist() == _best(attention[prompt].mean(0)[-1], 7)


def test_all_words_but_no_padding_rank_the_tokens(attention: Tensor, tokens: Tensor) -> None:
    valid = torch.tensor([[False, False, True, True, True], [True] * 5])
    context = ReductionContext(prompt=_view(attention, valid))
    mean, largest = (
        Saliency(definition=definition)(tokens, num_visual_tokens=7, context=context).position_ids_BK
        for definition in ("mean_text", "max_text")
    )
    for prompt in range(2):
        rows = attention[prompt].mean(0)[valid[prompt]]
        assert mean[prompt].tolist() == _best(rows.mean(0), 7)
        assert largest[prompt].tolist() == _best(rows.amax(0), 7)


def test_mmtok_covers_words_and_tokens(attention: Tensor, tokens: Tensor) -> None:
    valid = torch.tensor([[False, False, True, True, True], [True] * 5])
    view = _view(attention, valid)
    result = MMTok()(tokens, num_visual_tokens=9, context=ReductionContext(prompt=view))
    for prompt in range(2):
        patches = _unit(tokens[prompt].double().numpy())
        words = _unit(view.embeddings_BTL[prompt][valid[prompt]].double().numpy())
        rows = [_softmax([float(word @ patch) / 0.02 for patch in patches]) / len(words) for word in words]
        rows += [0.5 * _softmax([float(other @ patch) / 0.2 for patch in patches]) / 40 for other in patches]
        kept: list[int] = []
        while len(kept) < 9:
            rest = [token for token in range(40) if token not in kept]
            kept.append(max(rest, key=lambda token: sum(max(row[each] for each in [*kept, token]) for row in rows)))
        assert result.position_ids_BK[prompt].tolist() == sorted(kept)


def _unit(values: Any) -> Any:
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def _softmax(values: list[float]) -> Any:
    exponentials = np.exp(np.array(values) - max(values))
    return exponentials / exponentials.sum()


def test_windows_apply_to_each_image_of_a_prompt(attention: Tensor, tokens: Tensor) -> None:
    # Ten images of 2 x 2 patches, one window each.
    result = Saliency(definition="last_text", window=2)(
        tokens, num_visual_tokens=20, context=ReductionContext(prompt=_view(attention))
    )
    for prompt in range(2):
        scores = attention[prompt].mean(0)[-1]
        expected = [4 * image + token for image in range(10) for token in _best(scores[4 * image : 4 * image + 4], 2)]
        assert result.position_ids_BK[prompt].tolist() == expected


def test_a_layer_outside_the_decoder_is_refused(attention: Tensor, tokens: Tensor) -> None:
    with pytest.raises(UserError, match=r"saliency\.layer 9 is not a layer of this decoder of 4 layers; choose 0 to 3"):
        Saliency(definition="last_text", layer=9)(
            tokens, num_visual_tokens=7, context=ReductionContext(prompt=_view(attention))
        )


def test_raters_are_the_words_above_the_mean(attention: Tensor) -> None:
    valid = torch.tensor([[False, True, True, True, True], [True] * 5])
    view = _view(attention, valid)
    result = raters(view)
    for prompt in range(2):
        words = [word for word in range(5) if valid[prompt, word]]
        shares = np.zeros(5)
        for visual in range(40):
            logits = {
                word: float(view.visual_BVL[prompt, visual].double() @ view.embeddings_BTL[prompt, word].double())
                for word in words
            }
            total = sum(math.exp(value) for value in logits.values())
            for word in words:
                shares[word] += math.exp(logits[word]) / total / 40
        mean = sum(shares[word] for word in words) / len(words)
        assert [bool(each) for each in result[prompt]] == [word in words and shares[word] >= mean for word in range(5)]


@pytest.mark.parametrize("num_words", [2, 3, 7, 11, 37])
def test_equal_words_include_a_rater(num_words: int) -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(1, 1, 64, generator=generator).expand(1, num_words, -1).contiguous()
    for num_visual in range(250, 262):
        visual = torch.randn(1, num_visual, 64, generator=generator)
        view = PromptView(
            embeddings,
            torch.ones(1, num_words, dtype=torch.bool),
            visual,
            lambda layer: embeddings,
            num_layers=4,
            grid_side=2,
        )
        assert raters(view).any()


def test_recycling_keeps_the_count_and_merges_the_best_of_the_dropped(tokens: Tensor) -> None:
    scores = torch.rand(2, 40, generator=torch.Generator().manual_seed(5))
    result = recycled(tokens, scores, 6)
    # 4 kept and 36 dropped, int(0.3 * 36) + 1 = 11 of them recycled, in int(11 / 10) + 1 = 2 clusters.
    assert result.tokens_BKD.shape == (2, 6, 6)
    for prompt in range(2):
        kept = _best(scores[prompt], 4)
        assert result.position_ids_BK[prompt, :4].tolist() == kept
        rest = sorted(
            (token for token in range(40) if token not in kept), key=lambda token: -float(scores[prompt, token])
        )[:11]
        merged = [
            [token for token in range(40) if int(result.assignment_BN[prompt, token]) == cluster] for cluster in (4, 5)
        ]
        assert sorted(merged[0] + merged[1]) == sorted(rest)
        for number, members in enumerate(merged):
            assert torch.allclose(result.tokens_BKD[prompt, 4 + number], tokens[prompt][members].mean(0), atol=1e-5)
            assert int(result.sizes_BK[prompt, 4 + number]) == len(members)
    assert recycled(tokens, scores, 1).tokens_BKD.shape == (2, 1, 6)
    assert recycled(tokens, scores, 39).tokens_BKD.shape == (2, 39, 6)


@pytest.mark.parametrize("num_clusters", [1, 2, 4, 9])
def test_density_peaks_match_the_released_code(num_clusters: int, tokens: Tensor) -> None:
    # The density uses as many nearest neighbours as there are clusters, each token being its own nearest one. Two
    # tokens that are each other's nearest have the same density, so that their order decides.
    centres, cluster = density_peaks(tokens, num_clusters)
    for image in range(2):
        values = tokens[image].double().numpy()
        distance = [[float(np.linalg.norm(a - b)) / math.sqrt(6) for b in values] for a in values]
        density = [math.exp(-sum(each**2 for each in sorted(row)[:num_clusters]) / num_clusters) for row in distance]
        gap = []
        for i in range(40):
            denser = [distance[i][j] for j in range(40) if (density[j], -j) > (density[i], -i)]
            gap.append(min(denser) if denser else max(max(row) for row in distance))
        expected = sorted(range(40), key=lambda i: -density[i] * gap[i])[:num_clusters]
        assert centres[image].tolist() == expected
        for i in range(40):
            assert int(cluster[image, i]) == (
                expected.index(i) if i in expected else min(range(num_clusters), key=lambda c: distance[i][expected[c]])
            )


@pytest.mark.parametrize(
    ("dropped", "recycled_tokens", "clusters"), [(29, 9, 1), (31, 10, 2), (276, 83, 9), (510, 154, 16)]
)
def test_recycling_counts_are_those_of_the_released_code(dropped: int, recycled_tokens: int, clusters: int) -> None:
    result = recycled(torch.randn(1, 576, 4), torch.rand(1, 576), 576 - dropped + clusters)
    assert int(result.sizes_BK[0, -clusters:].sum()) == recycled_tokens
    assert int((result.assignment_BN < 0).sum()) == dropped - recycled_tokens
