"""Reducers that read the vision tower, compared with slow references that follow their definitions token by token."""

import math
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from parcelray.errors import UnsupportedBudgetError, UserError
from parcelray.models.backbones import ElasticVLM
from parcelray.models.token_reduction.base import Reduction, ReductionContext, TokenReducer
from parcelray.models.token_reduction.encoder_view import EncoderView
from parcelray.models.token_reduction.prumerge import PruMerge, spacing
from parcelray.models.token_reduction.prunesid import PruneSID
from parcelray.models.token_reduction.restore import Restore
from parcelray.models.token_reduction.saliency import Saliency
from parcelray.models.token_reduction.scope import Scope
from parcelray.models.token_reduction.tome import ToMe, _Tower, merge, merge_counts
from parcelray.models.token_reduction.visionzip import VisionZip
from parcelray.models.token_reduction.vispruner import VisPruner

from .conftest import Model, pixels, projected

Floats = NDArray[np.float64]
REDUCERS: list[TokenReducer] = [
    Saliency(),
    Saliency(merge_rest=True),
    Saliency(window=4),
    VisionZip(),
    ToMe(),
    PruMerge(),
    PruMerge(spatial=True),
    Scope(),
    VisPruner(),
    PruneSID(),
    Restore(),
    Restore(base="class_attention"),
]
EACH = pytest.mark.parametrize("reducer", REDUCERS, ids=repr)
TOWERS = pytest.mark.parametrize("tower", ["paligemma", "clip", "siglip"])


def _numpy(values: torch.Tensor) -> Floats:
    return np.asarray(values.detach().double().numpy())


def _unit(values: Floats) -> Floats:
    return np.asarray(values / np.linalg.norm(values, axis=-1, keepdims=True))


def _project(view: EncoderView, features: Floats) -> Floats:
    with torch.no_grad():
        return _numpy(view.project(torch.tensor(features, dtype=torch.float32)[None])[0])


@TOWERS
@EACH
@pytest.mark.parametrize("budget", [32, 64, 100])
def test_every_reduction_is_consistent(
    reducer: TokenReducer, tower: str, budget: int, views: dict[str, EncoderView]
) -> None:
    view = views[tower]
    tokens = projected(view)
    if isinstance(reducer, ToMe) and tower == "paligemma" and budget < 64:
        # Two layers can halve 256 tokens to 64 at the least.
        with pytest.raises(UnsupportedBudgetError, match="tome does not support 32 visual tokens"):
            reducer(tokens, num_visual_tokens=budget, context=ReductionContext(encoder=view))
        return
    with torch.no_grad():
        result = reducer(tokens, num_visual_tokens=budget, context=ReductionContext(encoder=view))
        alone = reducer(
            tokens[1:2],
            num_visual_tokens=budget,
            context=ReductionContext(encoder=EncoderView(view.model, view.pixel_values_ICHW[1:2])),
        )
    assert result.tokens_BKD.shape == (3, budget, tokens.shape[2])
    assert result.tokens_BKD.isfinite().all()
    for image in range(3):
        members = torch.bincount(result.assignment_BN[image][result.assignment_BN[image] >= 0], minlength=budget)
        # The class token, which VisionZip and PruneSID keep, has no position in the grid.
        class_token = isinstance(reducer, VisionZip | PruneSID) and view.class_features_ID is not None
        assert members.tolist()[int(class_token) :] == result.sizes_BK[image].tolist()[int(class_token) :]
    assert _share_in_common(alone, Reduction(*(each[1:2] for each in result))) >= 0.9


def _share_in_common(one: Reduction, other: Reduction) -> float:
    """Returns the share of the first reduction's tokens that are also in the second one; both are of one image.

    Random weights have near ties, which kernels for another batch size may round differently. A patch then moves to
    another token, or its neighbour in the ranking replaces it, and all later tokens have other indices. If a reducer
    itself depended on the batch, most tokens would change.
    """
    gaps_KK = (one.tokens_BKD[0, :, None] - other.tokens_BKD[0]).abs().amax(dim=2)
    return float((gaps_KK.amin(dim=1) < 1e-4).float().mean())


@EACH
def test_the_full_budget_and_the_smallest_are_legal(reducer: TokenReducer, views: dict[str, EncoderView]) -> None:
    tokens, context = projected(views["clip"]), ReductionContext(encoder=views["clip"])
    with torch.no_grad():
        assert torch.equal(reducer(tokens, num_visual_tokens=256, context=context).tokens_BKD, tokens)
        assert reducer(tokens, num_visual_tokens=255, context=context).tokens_BKD.shape[1] == 255
        if isinstance(reducer, ToMe):
            with pytest.raises(UnsupportedBudgetError, match="tome does not support 31 visual tokens"):
                reducer(tokens, num_visual_tokens=31, context=context)
        else:
            for budget in (1, 2):
                assert reducer(tokens, num_visual_tokens=budget, context=context).tokens_BKD.isfinite().all()


@pytest.mark.parametrize("reducer", [each for each in REDUCERS if each.reads == "encoder"], ids=repr)
def test_a_convolutional_tower_is_refused(reducer: TokenReducer, views: dict[str, EncoderView]) -> None:
    with pytest.raises(UserError, match="a convolutional tower has none"):
        reducer(projected(views["convnext"]), num_visual_tokens=64, context=ReductionContext(encoder=views["convnext"]))


@TOWERS
def test_attention_and_keys_equal_those_of_the_eager_tower(
    tower: str, models: dict[str, Model], views: dict[str, EncoderView]
) -> None:
    model, processor = models[tower]
    vision, layers = model.model.vision_tower, model.model.vision_tower.encoder.layers
    kept: dict[str, Any] = {}
    hook = layers[-1].self_attn.k_proj.register_forward_hook(lambda module, inputs, output: kept.update(keys=output))
    vision.config._attn_implementation = "eager"
    try:
        with torch.no_grad():
            weights = vision(pixels(processor), output_attentions=True).attentions[-1]
    finally:
        vision.config._attn_implementation = "sdpa"
        hook.remove()
    view = views[tower]
    start = int(tower == "clip")
    expected = weights[:, :, 0, 1:] if start else weights.mean(dim=2)
    assert torch.allclose(view.attention_IHN, expected, atol=1e-5)
    heads = view.keys_IHND.shape[1]
    # Keys reach 7, and both runs round them in three layers with different attention kernels.
    assert torch.allclose(view.keys_IHND.transpose(1, 2).flatten(2), kept["keys"][:, start:], atol=1e-4)
    assert heads == layers[-1].self_attn.num_heads
    with torch.no_grad():
        assert torch.equal(view.patch_features_IND, model.model.encode_patches(pixels(processor)))


@TOWERS
@pytest.mark.parametrize("budget", [1, 13, 64])
def test_visionzip(tower: str, budget: int, views: dict[str, EncoderView]) -> None:
    view = views[tower]
    with torch.no_grad():
        result = VisionZip()(projected(view), num_visual_tokens=budget, context=ReductionContext(encoder=view))
    for image in range(3):
        features, scores = _numpy(view.patch_features_IND[image]), _numpy(view.attention_IHN[image].sum(0))
        keys = _unit(_numpy(view.keys_IHND[image].mean(0)))
        has_class = view.class_features_ID is not None
        num_contextual = round(budget * 10 / 64)
        dominant = sorted(
            sorted(range(256), key=lambda patch: (-scores[patch], patch))[: budget - num_contextual - has_class]
        )
        rest = [patch for patch in range(256) if patch not in dominant]
        rows = [features[patch] for patch in dominant]
        if view.class_features_ID is not None:
            rows.insert(0, _numpy(view.class_features_ID[image]))
        targets = rest[:: max(1, len(rest) // max(1, num_contextual))][:num_contextual]
        joined: dict[int, list[int]] = {target: [] for target in targets}
        for patch in rest:
            if targets and patch not in targets:
                joined[max(targets, key=lambda target: keys[patch] @ keys[target])].append(patch)
        rows += [features[target] + (features[joined[target]].mean(0) if joined[target] else 0) for target in targets]
        assert np.allclose(_numpy(result.tokens_BKD[image]), _project(view, np.array(rows)), atol=1e-4)


@TOWERS
@pytest.mark.parametrize("spatial", [False, True])
def test_prumerge(tower: str, spatial: bool, views: dict[str, EncoderView]) -> None:
    view, budget = views[tower], 21
    with torch.no_grad():
        result = PruMerge(spatial=spatial)(
            projected(view), num_visual_tokens=budget, context=ReductionContext(encoder=view)
        )
    for image in range(3):
        features, attention = _numpy(view.patch_features_IND[image]), _numpy(view.joint_attention_IN[image])
        keys = _unit(_numpy(view.joint_keys_IND[image]))
        falling = sorted(range(256), key=lambda patch: (-attention[patch], patch))
        kept = falling[:20]
        if spatial:
            # 5 attended patches have the step int(256 / 5) = 51 and the stride 17: the 15 patches 0, 17, ..., 238.
            attended = 5
            while attended + len(set(range(0, 255, 17)) - set(falling[:attended])) < 20:
                attended += 1
            kept = falling[:attended] + [patch for patch in range(0, 255, 17) if patch not in falling[:attended]]
        rows = []
        for patch in kept:
            near = sorted(
                (other for other in range(256) if other != patch), key=lambda other: -float(keys[patch] @ keys[other])
            )[:32]
            rows.append(features[patch] + sum(attention[other] * features[other] for other in near))
        pruned = [patch for patch in range(256) if patch not in kept]
        rows.append(sum(attention[patch] * features[patch] for patch in pruned))
        assert np.allclose(_numpy(result.tokens_BKD[image]), _project(view, np.array(rows)), atol=1e-4)


@pytest.mark.parametrize(
    ("num_tokens", "count", "stride"),
    [
        # 16 attended patches have the step 36, the stride 12 and 48 spaced patches, one too many; 15 fit.
        (576, 63, 12),
        (576, 64, 12),
        # 48 attended patches have the stride 4 and 144 spaced ones. From 49 on, the stride is 3: 192 spaced ones.
        (576, 199, 4),
        (576, 241, 3),
        # One attended patch alone has three spaced ones.
        (256, 4, 85),
        (256, 3, None),
    ],
)
def test_prumerge_plus_has_the_stride_of_the_release(num_tokens: int, count: int, stride: int | None) -> None:
    assert spacing(num_tokens, count) == stride


@TOWERS
def test_joint_attention_uses_the_whole_width(tower: str, views: dict[str, EncoderView]) -> None:
    view = views[tower]
    layer = view.model.vision_tower.encoder.layers[-1]
    entering = layer.layer_norm1(view._inputs[len(view.model.vision_tower.encoder.layers) - 1])
    queries, keys = (_numpy(projection(entering)[0]) for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj))
    logits = queries @ keys.T / math.sqrt(keys.shape[1])
    weights = np.exp(logits - logits.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    expected = weights[0, 1:] if tower == "clip" else weights.mean(0)
    assert np.allclose(_numpy(view.joint_attention_IN[0]), expected, atol=1e-5)


def test_scope(views: dict[str, EncoderView]) -> None:
    view = views["clip"]
    result = Scope()(projected(view), num_visual_tokens=12, context=ReductionContext(encoder=view))
    for image in range(3):
        unit, weight = _unit(_numpy(view.patch_features_IND[image])), _numpy(view.attention_IHN[image].mean(0))
        cosine, covered, kept = unit @ unit.T, np.zeros(256), list[int]()
        for _ in range(12):
            gain = np.maximum(0, cosine - covered[:, None]).sum(0) * weight
            kept.append(max((j for j in range(256) if j not in kept), key=lambda j: gain[j]))
            covered = np.maximum(covered, cosine[:, kept[-1]])
        assert result.position_ids_BK[image].tolist() == sorted(kept)


@pytest.mark.parametrize("important", [0, 1])
def test_vispruner_can_select_all_tokens_by_attention_or_none(important: int, views: dict[str, EncoderView]) -> None:
    view, context = views["clip"], ReductionContext(encoder=views["clip"])
    result = VisPruner(important=important)(projected(view), num_visual_tokens=20, context=context)
    by_attention = Saliency()(projected(view), num_visual_tokens=20, context=context)
    assert torch.equal(result.position_ids_BK, by_attention.position_ids_BK) == bool(important)
    assert [len(set(positions)) for positions in result.position_ids_BK.tolist()] == [20] * 3


def test_vispruner(views: dict[str, EncoderView]) -> None:
    view = views["clip"]
    result = VisPruner()(projected(view), num_visual_tokens=41, context=ReductionContext(encoder=view))
    for image in range(3):
        unit, score = _unit(_numpy(view.patch_features_IND[image])), _numpy(view.attention_IHN[image].mean(0))
        falling = sorted(range(256), key=lambda patch: (-score[patch], patch))
        important, rest = falling[:20], falling[20:]
        while len(rest) > 21:
            first, second = rest[::2], rest[1::2]
            alike = {patch: max(float(unit[patch] @ unit[other]) for other in second) for patch in first}
            rest = sorted(first, key=lambda patch: -alike[patch])[min(8, len(rest) - 21) :] + second
        assert result.position_ids_BK[image].tolist() == sorted(important + rest)


@TOWERS
@pytest.mark.parametrize("budget", [1, 3, 20, 64, 200])
def test_prunesid(tower: str, budget: int, views: dict[str, EncoderView]) -> None:
    view = views[tower]
    with torch.no_grad():
        result = PruneSID()(projected(view), num_visual_tokens=budget, context=ReductionContext(encoder=view))
    class_token = view.class_features_ID is not None
    for image in range(3):
        features, score = _numpy(view.patch_features_IND[image]), _numpy(view.attention_IHN[image].sum(0))
        columns = (1 / (1 + np.exp(-features))).T
        loadings = np.abs(
            np.linalg.svd(columns - columns.mean(0), full_matrices=False)[2][
                : max(1, min(budget // 4, len(columns) - 1))
            ]
        )
        groups = [
            [patch for patch in range(256) if int(loadings[:, patch].argmax()) == number]
            for number in range(len(loadings))
        ]
        cosine = _unit(features) @ _unit(features).T
        threshold = budget / 32 * np.mean([cosine[i, j] for i in range(256) for j in range(i)])
        left, ranked = [], []
        for group in groups:
            by_score, survivors = sorted(group, key=lambda patch: -score[patch]), list[int]()
            for patch in by_score:
                if all(cosine[patch, better] <= threshold for better in survivors):
                    survivors.append(patch)
            left.append(len(survivors))
            ranked.append(survivors + [patch for patch in by_score if patch not in survivors])
        most = [min(5 * math.ceil(budget / 64), count) for count in left]
        while sum(most) < budget:
            most = [min(limit + 1, len(group)) for limit, group in zip(most, groups, strict=True)]
        wanted = budget - class_token
        quotas = [min(1, len(group), wanted) for group in groups]
        rest, before, spent = wanted - sum(quotas), 0, 0
        for number, count in enumerate(left):
            before += count
            part = round(rest * before / sum(left)) - spent
            spent += part
            quotas[number] = min(quotas[number] + part, most[number])
        for number in sorted(range(len(groups)), key=lambda number: -left[number]):
            quotas[number] += min(most[number] - quotas[number], wanted - sum(quotas))
        kept = [patch for quota, group in zip(quotas, ranked, strict=True) for patch in group[:quota]]
        assert result.position_ids_BK[image].tolist() == [0] * class_token + kept
        rows = (
            features[kept]
            if view.class_features_ID is None
            else np.vstack([_numpy(view.class_features_ID[image]), features[kept]])
        )
        assert np.allclose(_numpy(result.tokens_BKD[image]), _project(view, rows), atol=1e-4)


@pytest.mark.parametrize("budget", [1, 2, 30])
def test_restore(budget: int, views: dict[str, EncoderView]) -> None:
    view = views["clip"]
    tokens = projected(view)
    result = Restore(base="class_attention")(tokens, num_visual_tokens=budget, context=ReductionContext(encoder=view))
    for image in range(3):
        values, score = _numpy(tokens[image]), _numpy(view.attention_IHN[image].mean(0))
        chosen = sorted(range(256), key=lambda patch: (-score[patch], patch))[: min(budget // 2, budget - 1)]
        rest = [patch for patch in range(256) if patch not in chosen]
        unit = _unit(values[rest])
        cosine = unit @ unit.T
        density = cosine.sum(1)
        value = []
        for i in range(len(rest)):
            denser = [cosine[i, j] for j in range(len(rest)) if density[j] > density[i]]
            value.append(density[i] * (1 - max(denser)) if denser else math.inf)
        anchors = sorted(range(len(rest)), key=lambda i: -value[i])[: budget - len(chosen)]
        groups: dict[int, list[int]] = {anchor: [] for anchor in anchors}
        for i in range(len(rest)):
            groups[i if i in anchors else max(anchors, key=lambda anchor: cosine[i, anchor])].append(i)
        merged = {rest[anchor]: values[[rest[i] for i in members]].mean(0) for anchor, members in groups.items()}
        expected = merged | {patch: values[patch] for patch in chosen}
        assert result.position_ids_BK[image].tolist() == sorted(expected)
        assert np.allclose(
            _numpy(result.tokens_BKD[image]), np.array([expected[patch] for patch in sorted(expected)]), atol=1e-4
        )
        assert int(result.sizes_BK[image].sum()) == 256


def test_saliency_by_class_attention_and_with_the_rest_merged(views: dict[str, EncoderView]) -> None:
    view, tokens = views["clip"], projected(views["clip"])
    context = ReductionContext(encoder=view)
    plain, merged = (
        Saliency(merge_rest=merge_rest)(tokens, num_visual_tokens=9, context=context) for merge_rest in (False, True)
    )
    for image in range(3):
        score, values = _numpy(view.attention_IHN[image].sum(0)), _numpy(tokens[image])
        kept = sorted(sorted(range(256), key=lambda patch: (-score[patch], patch))[:9])
        assert plain.position_ids_BK[image].tolist() == merged.position_ids_BK[image].tolist() == kept
        unit = _unit(values)
        groups: dict[int, list[int]] = {patch: [] for patch in kept}
        for patch in range(256):
            groups[patch if patch in kept else max(kept, key=lambda other: float(unit[patch] @ unit[other]))].append(
                patch
            )
        assert np.allclose(
            _numpy(merged.tokens_BKD[image]), [values[groups[patch]].mean(0) for patch in kept], atol=1e-4
        )
    norms = Saliency(definition="norm")(tokens, num_visual_tokens=9)
    assert norms.position_ids_BK[0].tolist() == sorted(tokens[0].norm(dim=1).topk(9).indices.tolist())


@pytest.mark.parametrize("after_class", [False, True])
def test_tome_merges_as_in_the_released_code(after_class: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens, keys = torch.randn(2, 11, 5, generator=generator), torch.randn(2, 11, 3, generator=generator)
    sizes = torch.randint(1, 5, (2, 11), generator=generator).float()
    merged, new_sizes, owner = merge(tokens, keys, sizes, 4, after_class=after_class)
    # A class token at position 0 of the sequence moves the patches by one.
    first, second = (range(1, 11, 2), range(0, 11, 2)) if after_class else (range(0, 11, 2), range(1, 11, 2))
    for image in range(2):
        unit = _unit(_numpy(keys[image]))
        edges = []
        for a in first:
            b = max(second, key=lambda other: float(unit[a] @ unit[other]))
            edges.append((float(unit[a] @ unit[b]), a, b))
        groups: dict[int, list[int]] = {patch: [patch] for patch in range(11)}
        edges.sort(reverse=True)
        for _, a, b in edges[:4]:
            groups[b] += groups.pop(a)
        staying = [a for _, a, _ in edges[4:]]
        for number, patch in enumerate([*(sorted(staying) if after_class else staying), *second]):
            members, weight = groups[patch], _numpy(sizes[image][groups[patch]])
            assert float(new_sizes[image, number]) == weight.sum()
            assert np.allclose(
                _numpy(merged[image, number]),
                (_numpy(tokens[image][members]) * weight[:, None]).sum(0) / weight.sum(),
                atol=1e-5,
            )
            assert {int(owner[image, member]) for member in members} == {number}


@TOWERS
def test_tome_without_merging_equals_the_tower(tower: str, views: dict[str, EncoderView]) -> None:
    view = views[tower]
    tower_run = _Tower(view)
    with torch.no_grad():
        features, owner = tower_run.run([0] * tower_run.num_layers)
    assert torch.allclose(features, view.patch_features_IND, atol=1e-5)
    assert owner[0].tolist() == list(range(256))


@pytest.fixture
def tower_without_positions(models: dict[str, Model]) -> Iterator[ElasticVLM]:
    """A vision tower without positions, in which all patches of one colour are equal."""
    model, _ = models["siglip"]
    embedding = model.model.vision_tower.embeddings.position_embedding.weight
    before = embedding.detach().clone()
    with torch.no_grad():
        embedding.zero_()
        yield model
        embedding.copy_(before)


@TOWERS
def test_merged_patches_have_the_weight_of_their_size_in_the_attention(
    tower: str, models: dict[str, Model], views: dict[str, EncoderView]
) -> None:
    """Proportional attention per head: softmax(q k / sqrt(d) + log size).

    Computed in double precision, so that rounding cannot hide a wrong step.
    """
    model, first = deepcopy(models[tower][0]).double(), int(tower == "clip")
    vision = model.model.vision_tower
    view = EncoderView(model.model, views[tower].pixel_values_ICHW.double())
    run = _Tower(view)
    counts = [100, *[20] * (run.num_layers - 1)]
    with torch.no_grad():
        result, owner = run.run(counts)
        hidden = vision.embeddings(view.pixel_values_ICHW)
        hidden = vision.pre_layrnorm(hidden) if tower == "clip" else hidden
        sizes = torch.ones(3, hidden.shape[1] - first)
        for layer, count in zip(vision.encoder.layers[: run.num_layers], counts, strict=True):
            attention, normed = layer.self_attn, layer.layer_norm1(hidden)
            queries, keys, values = (
                projection(normed).chunk(attention.num_heads, 2)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            weigh = torch.cat([torch.ones(3, first), sizes], dim=1).log()[:, None]
            heads = [
                (q @ k.mT / q.shape[2] ** 0.5 + weigh).softmax(2) @ v
                for q, k, v in zip(queries, keys, values, strict=True)
            ]
            hidden = hidden + attention.out_proj(torch.cat(heads, dim=2))
            mean_keys = torch.stack(keys).mean(0)[:, first:]
            merged, sizes, _ = merge(hidden[:, first:], mean_keys, sizes, count, after_class=first == 1)
            hidden = torch.cat([hidden[:, :first], merged], dim=1)
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        expected = (vision.post_layernorm(hidden) if view.model.features_are_normed else hidden)[:, first:]
        single, single_owner = _Tower(views[tower]).run(counts)
    assert torch.allclose(result, expected, rtol=0, atol=1e-12)
    # In single precision, the same patches merge. Without a last norm, features reach 7 after three layers, and the
    # largest error is 2e-5.
    assert torch.equal(single_owner, owner)
    # The relative error is 1.5e-6 with every kernel tried; a wrong step would cause more than 1e-3.
    assert float((single - expected).norm() / expected.norm()) < 1e-5


def test_tome_computes_no_attention_map_of_the_plain_run(views: dict[str, EncoderView]) -> None:
    view = views["clip"].without_maps()
    ToMe()(projected(view), num_visual_tokens=90, context=ReductionContext(encoder=view))
    assert "attention_IHN" not in vars(view)


@EACH
def test_equal_tokens_are_reduced_to_equal_tokens(reducer: TokenReducer, tower_without_positions: ElasticVLM) -> None:
    view = EncoderView(tower_without_positions.model, torch.full((2, 3, 64, 64), 0.3))
    tokens = view.project(view.patch_features_IND)
    result = reducer(tokens, num_visual_tokens=64, context=ReductionContext(encoder=view))
    assert result.tokens_BKD.isfinite().all()
    if not isinstance(reducer, VisionZip | PruMerge):
        # These two add features, so their tokens differ from the input.
        assert torch.allclose(result.tokens_BKD, tokens[:, :64], atol=1e-4)


MERGES = [(576, 72, 24, [21] * 24), (256, 32, 3, [128, 64, 32]), (256, 31, 3, None), (10, 10, 2, [0, 0])]


@pytest.mark.parametrize(("tokens", "budget", "layers", "expected"), MERGES)
def test_merges_are_spread_evenly_over_the_layers(
    tokens: int, budget: int, layers: int, expected: list[int] | None
) -> None:
    assert merge_counts(tokens, budget, layers) == expected
