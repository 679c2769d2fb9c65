"""The reduced decoder compared with transformers' own `forward` and `generate`, with dropped tokens masked there."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from parcelray.config.model import MiniLlavaModelConfig
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.decoder_attention import rotary_decay
from parcelray.models.mini import build_config, build_model, build_processor
from parcelray.models.mini_llava import build
from parcelray.models.reduced_decoder import ReducedDecoder, VisualTokens, encode_prompts
from parcelray.models.token_reduction.fastv import FastV
from parcelray.models.token_reduction.in_decoder import InDecoderReducer
from parcelray.models.token_reduction.mmtok import MMTok
from parcelray.models.token_reduction.pyramid_drop import PyramidDrop
from parcelray.models.token_reduction.saliency import Saliency
from parcelray.models.token_reduction.sparsevlm import SparseVLM

from .conftest import CONFIG, CORPUS, MINI_LLAVA, random_images

PROMPTS = ["what color is the circle", "how many", "which image has more red 47"]
NEW_TOKENS = 6
Case = tuple[ElasticVLM, ElasticProcessor, VisualTokens]


@pytest.fixture(scope="module", params=["paligemma", "gemma2_soft_capped", "llava"])
def case(request: pytest.FixtureRequest) -> Case:
    """A model, and the visual tokens of three images."""
    model: ElasticVLM
    processor: ElasticProcessor
    if request.param == "llava":
        config = MiniLlavaModelConfig(**MINI_LLAVA.model_dump() | {"text_layers": 6})
        model, processor = build(config, CORPUS, None, seed=0)
    else:
        mini = CONFIG.model_copy(update={"text_layers": 6})
        paligemma_processor = build_processor(mini, CORPUS)
        full = build_config(mini, paligemma_processor)
        if request.param == "gemma2_soft_capped":
            full.text_config.attn_logit_softcapping, full.text_config.final_logit_softcapping = 5.0, 2.0
            full._attn_implementation = "eager"
        model, processor = build_model(full, 0), paligemma_processor
    return _case_of(model, processor)


def _case_of(model: ElasticVLM, processor: ElasticProcessor) -> Case:
    model.eval()
    with torch.no_grad():
        # With random weights, attention is nearly uniform, and tied embeddings repeat the last word; both are adjusted.
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight.mul_(8)
        model.get_input_embeddings().get_parameter("weight").mul_(0.2)
        pixels = processor.image_processor(random_images(len(PROMPTS)), return_tensors="pt")["pixel_values"]
        tokens = model.model.compress(model.model.encode_patches(pixels), num_visual_tokens=256)
    position_ids = torch.arange(256).expand(len(PROMPTS), -1)
    return model, processor, VisualTokens(tokens, position_ids, torch.ones_like(position_ids))


def _generate(case: Case, decoder: ReducedDecoder, rows: slice = slice(None), **kwargs: Any) -> Tensor:
    _, processor, visual = case
    prompts = encode_prompts(processor, PROMPTS[rows], None, "cpu")
    # The id -1 is no token, so no answer ends early.
    return decoder.generate(
        prompts,
        VisualTokens(*(each[rows] for each in visual)),
        max_new_tokens=NEW_TOKENS,
        end_ids=frozenset(),
        pad_token_id=0,
        **kwargs,
    )


def test_without_reduction_answers_equal_those_of_transformers(case: Case) -> None:
    model, processor, visual = case
    inputs = processor.prompts(PROMPTS, 1, num_visual_tokens=256)
    expected = model.generate(
        **inputs,
        **model.image_inputs(visual.tokens_BVL),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    assert torch.equal(_generate(case, ReducedDecoder(model)), expected[:, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("positions", ["contiguous", "image_calibrated"])
def test_an_answer_may_be_one_token(case: Case, positions: Any) -> None:
    model, processor, visual = case
    prompts, decoder = encode_prompts(processor, PROMPTS, None, "cpu"), ReducedDecoder(model, positions)
    one = decoder.generate(prompts, visual, max_new_tokens=1, end_ids=frozenset(), pad_token_id=0)
    assert torch.equal(one, _generate(case, decoder)[:, :1])


def test_a_sliding_window_applies_to_the_answer_only() -> None:
    processor = build_processor(CONFIG, CORPUS)
    config = build_config(CONFIG, processor)
    config.text_config.sliding_window = 32
    config.text_config.layer_types = ["sliding_attention"] * CONFIG.text_layers
    model = build_model(config, 0).eval()
    test_without_reduction_answers_equal_those_of_transformers(_case_of(model, processor))


@pytest.mark.parametrize("positions", ["contiguous", "image", "image_size_bias"])
def test_logits_equal_those_of_transformers(case: Case, positions: Any) -> None:
    model, processor, visual = case
    answers = ["red", "blue 47", "4"]
    inputs = processor.prompts(PROMPTS, 1, num_visual_tokens=256, answers=answers)
    prompts = encode_prompts(processor, PROMPTS, answers, "cpu")
    with torch.no_grad():
        stock = model(**inputs, **model.image_inputs(visual.tokens_BVL)).logits
    result = ReducedDecoder(model, positions).logits(prompts, visual)
    for row in range(len(PROMPTS)):
        # With padding removed, the text after the images is the end of the stock sequence.
        kept = stock[row, : int(inputs["attention_mask"][row].sum())][-int(prompts.valid_BT[row].sum()) :]
        assert torch.allclose(result[row, prompts.valid_BT[row]], kept, atol=2e-4)


REDUCERS: list[Any] = [
    FastV(layer=2),
    PyramidDrop(),
    PyramidDrop(positions="image"),
    SparseVLM(),
    SparseVLM(positions="image_size_bias"),
    SparseVLM(positions="image_calibrated"),
]


BEFORE_THE_LAYERS = [
    Saliency(definition="last_text", layer=3),
    Saliency(definition="mean_text", layer=0, merge_rest=True),
    MMTok(),
]


@pytest.mark.parametrize("reducer", [*REDUCERS, *BEFORE_THE_LAYERS], ids=repr)
def test_a_prompt_gets_the_same_answer_alone_and_in_a_batch(case: Case, reducer: Any) -> None:
    decoder = ReducedDecoder(case[0], reducer.positions)
    together = _generate(case, decoder, reducer=reducer, budget=140)
    for row in range(len(PROMPTS)):
        assert torch.equal(
            _generate(case, decoder, slice(row, row + 1), reducer=reducer, budget=140), together[row : row + 1]
        )


@pytest.mark.parametrize("reducer", REDUCERS, ids=repr)
def test_the_cache_does_not_change_the_answers(case: Case, reducer: InDecoderReducer) -> None:
    """Each new token from a cache with different lengths equals that from the whole answer so far."""
    model, processor, visual = case
    decoder = ReducedDecoder(model, reducer.positions)
    result = _generate(case, decoder, slice(0, 1), reducer=reducer, budget=140)[0]
    first = VisualTokens(*(each[:1] for each in visual))
    prompts = encode_prompts(processor, PROMPTS[:1], None, "cpu")
    for length in range(1, NEW_TOKENS):
        answer = result[None, :length]
        longer = prompts._replace(
            after_BT=torch.cat([prompts.after_BT, answer], dim=1),
            valid_BT=torch.cat([prompts.valid_BT, torch.ones_like(answer, dtype=torch.bool)], dim=1),
            answer_BT=torch.cat([prompts.answer_BT, torch.ones_like(answer, dtype=torch.bool)], dim=1),
        )
        logits = decoder.logits(longer, first, reducer=reducer, budget=140)
        assert int(logits[0, -1].argmax()) == int(result[length])


@pytest.mark.parametrize("layer", [1, 2, 4])
def test_fastv_is_the_stock_decoder_with_the_dropped_tokens_masked(case: Case, layer: int) -> None:
    """With image positions, dropping a token after a layer equals masking it in all later layers."""
    model, processor, visual = case
    prompts = encode_prompts(processor, PROMPTS, None, "cpu")
    stages = FastV(layer=layer).stages(6, 256, 200)
    result = ReducedDecoder(model, "image").logits(prompts, visual, reducer=FastV(layer=layer), budget=200)
    rows = ReducedDecoder(model).attention(prompts, visual, [layer - 1])[0].mean(dim=1)[:, -1]
    kept = rows.topk(stages[0].num_tokens, dim=1).indices
    dropped = torch.ones(len(PROMPTS), 256, dtype=torch.bool).scatter(1, kept, False)

    inputs = processor.prompts(PROMPTS, 1, num_visual_tokens=256)
    starts = inputs["input_ids"].eq(model.config.image_token_id).int().argmax(dim=1)
    hooks = []
    for index, module in enumerate(model.model.language_model.layers):
        if index >= layer:
            hooks.append(module.register_forward_pre_hook(_mask_out(dropped, starts), with_kwargs=True))
    try:
        with torch.no_grad():
            stock = model(**inputs, **model.image_inputs(visual.tokens_BVL), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    for row in range(len(PROMPTS)):
        length = int(prompts.valid_BT[row].sum())
        assert torch.allclose(result[row, -length:], stock[row, -length:], atol=2e-3)


def _mask_out(dropped: Tensor, starts: Tensor) -> Any:
    def change(
        module: torch.nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        mask, length = kwargs["attention_mask"], args[0].shape[1]
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool).tril().expand(len(starts), 1, -1, -1)
        mask = mask.clone()
        for row, start in enumerate(starts.tolist()):
            columns = start + dropped[row].nonzero().flatten()
            mask[row, :, :, columns] = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return args, kwargs | {"attention_mask": mask}

    return change


def test_a_token_of_size_two_is_two_equal_tokens(case: Case) -> None:
    """Proportional attention: merging equal tokens at one position to a token of size 2 changes nothing for others."""
    model, processor, visual = case
    prompts = encode_prompts(processor, PROMPTS[:1], None, "cpu")
    twice = visual.tokens_BVL[:1, :4].repeat_interleave(2, dim=1)
    position_ids = torch.zeros(1, 8, dtype=torch.int64)
    decoder = ReducedDecoder(model, "image_size_bias")
    pairs = decoder.logits(prompts, VisualTokens(twice, position_ids, torch.ones_like(position_ids)))
    merged = decoder.logits(prompts, VisualTokens(twice[:, ::2], position_ids[:, ::2], torch.full((1, 4), 2)))
    plain = ReducedDecoder(model, "image").logits(
        prompts, VisualTokens(twice[:, ::2], position_ids[:, ::2], torch.full((1, 4), 2))
    )
    if model.reads_both_ways:
        assert torch.allclose(pairs, merged, atol=2e-4)
        assert not torch.allclose(pairs, plain, atol=2e-4)
    else:
        # With causal attention, the first of two equal tokens does not attend to the second.
        assert float((pairs - merged).norm()) < float((pairs - plain).norm())


def test_the_calibration_is_that_of_restore(case: Case) -> None:
    model = case[0]
    decay = rotary_decay(model.model.language_model, 300)
    width = model.model.language_model.rotary_emb.inv_freq.shape[0] * 2
    theta = [10_000 ** (-2 * index / width) for index in range(width // 2)]
    assert float(decay[0]) == 1
    expected = 2 / width * sum(float(torch.tensor(37 * angle).cos()) for angle in theta)
    assert float(decay[37]) == pytest.approx(expected, abs=1e-4)


def test_the_calibration_is_in_the_logits(case: Case) -> None:
    """Calibrated attention equals image positions plus log(size * (2 - D)), added by hand to the visual keys."""
    model, processor, visual = case
    prompts = encode_prompts(processor, PROMPTS[:1], None, "cpu")
    position_ids = torch.arange(0, 256, 4)[None]
    sizes = torch.randint(1, 9, (1, 64), generator=torch.Generator().manual_seed(0))
    few = VisualTokens(visual.tokens_BVL[:1, ::4], position_ids, sizes)
    at, length = processor.visual_offset, prompts.after_BT.shape[1]
    positions = [*range(at), *(at + position_ids[0]).tolist(), *range(at + 256, at + 256 + length)]
    width = model.model.language_model.rotary_emb.inv_freq.shape[0] * 2
    bias = torch.zeros(len(positions), len(positions))
    for row, here in enumerate(positions):
        for key in range(at, at + 64):
            decay = (
                2
                / width
                * sum(
                    math.cos(abs(here - positions[key]) * 10_000 ** (-2 * index / width)) for index in range(width // 2)
                )
            )
            bias[row, key] = math.log(int(sizes[0, key - at]) * (2 - decay))

    def add(
        module: torch.nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        return args, kwargs | {"attention_mask": kwargs["attention_mask"] + bias}

    result, plain = (ReducedDecoder(model, kind).logits(prompts, few) for kind in ("image_calibrated", "image"))
    hooks = [layer.register_forward_pre_hook(add, with_kwargs=True) for layer in model.model.language_model.layers]
    try:
        expected = ReducedDecoder(model, "image").logits(prompts, few)
    finally:
        for hook in hooks:
            hook.remove()
    assert torch.allclose(result, expected, atol=2e-3)
    assert not torch.allclose(result, plain, atol=2e-3)


def test_pyramid_drop_is_the_stock_decoder_with_more_tokens_masked_per_stage(case: Case) -> None:
    """The stock model's attention, with dropped tokens masked, selects the tokens of each stage."""
    model, processor, visual = case
    prompts = encode_prompts(processor, PROMPTS[:1], None, "cpu")
    first = VisualTokens(*(each[:1] for each in visual))
    reducer = PyramidDrop(positions="image")
    stages = reducer.stages(6, 256, 140)
    assert len(stages) == 3
    result = ReducedDecoder(model, "image").logits(prompts, first, reducer=reducer, budget=140)
    inputs = processor.prompts(PROMPTS[:1], 1, num_visual_tokens=256)
    start = inputs["input_ids"].eq(model.config.image_token_id).int().argmax(dim=1)
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation("eager")
    hooks: list[Any] = []
    dropped = torch.zeros(1, 256, dtype=torch.bool)
    try:
        for stage in stages:
            with torch.no_grad():
                maps = model(
                    **inputs, **model.image_inputs(first.tokens_BVL), output_attentions=True, use_cache=False
                ).attentions
            scores = maps[stage.layer][:, :, -1, int(start) : int(start) + 256].mean(dim=1).masked_fill(dropped, -1)
            dropped = torch.ones_like(dropped).scatter(1, scores.topk(stage.num_tokens, dim=1).indices, False)
            layers = model.model.language_model.layers[stage.layer :]
            hooks += [layer.register_forward_pre_hook(_mask_out(dropped, start), with_kwargs=True) for layer in layers]
        with torch.no_grad():
            stock = model(**inputs, **model.image_inputs(first.tokens_BVL), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)
    length = prompts.after_BT.shape[1]
    assert torch.allclose(result[0], stock[0, -length:], atol=2e-3)


def test_sparsevlm_matches_its_definition_layer_by_layer(case: Case) -> None:
    """Runs one prompt through the stock layers and applies each stage by a slow reference."""
    model, processor, visual = case
    text, at = model.model.language_model, processor.visual_offset
    for row, budget in ((0, 140), (1, 70), (2, 200)):
        prompts = encode_prompts(processor, PROMPTS[row : row + 1], None, "cpu")
        stages = SparseVLM().stages(6, 256, budget)
        assert [stage.layer for stage in stages] == ([3] if budget == 200 else [1, 3])
        result = ReducedDecoder(model).logits(
            prompts, VisualTokens(*(each[row : row + 1] for each in visual)), reducer=SparseVLM(), budget=budget
        )
        before = model.config.text_config._attn_implementation
        model.set_attn_implementation("eager")
        try:
            with torch.no_grad():
                embed = model.get_input_embeddings()
                hidden = torch.cat([embed(prompts.before_O), visual.tokens_BVL[row], embed(prompts.after_BT[0])])[None]
                words, num_visual = hidden[0, at + 256 :], 256
                rating = _raters(visual.tokens_BVL[row], words)
                assert 0 < len(rating) < len(words)
                for index, layer in enumerate(text.layers):
                    for stage in stages:
                        if stage.layer == index:
                            inputs = _inputs(model, hidden)
                            inputs.pop("position_ids")
                            weights = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **inputs)[1][0].mean(
                                dim=0
                            )
                            scores = [
                                sum(float(weights[at + num_visual + word, at + patch]) for word in rating)
                                for patch in range(num_visual)
                            ]
                            fewer = _pruned(hidden[0, at : at + num_visual], scores, stage.num_tokens)
                            hidden = torch.cat([hidden[0, :at], fewer, hidden[0, at + num_visual :]])[None]
                            num_visual = len(fewer)
                            assert num_visual == stage.num_tokens
                    hidden = layer(hidden, **_inputs(model, hidden))
                logits = model.lm_head(text.norm(hidden[0, at + num_visual :]))
        finally:
            model.set_attn_implementation(before)
        softcap = getattr(model.config.text_config, "final_logit_softcapping", None)
        assert torch.allclose(result[0], logits if softcap is None else softcap * (logits / softcap).tanh(), atol=2e-3)


def _inputs(model: ElasticVLM, hidden: Tensor) -> dict[str, Any]:
    """Returns consecutive positions, and a mask that is causal unless the model's attention is bidirectional."""
    length = hidden.shape[1]
    positions = torch.arange(length)[None]
    mask = (
        torch.zeros(length, length)
        if model.reads_both_ways
        else torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
    )
    return {
        "attention_mask": mask[None, None],
        "position_ids": positions,
        "position_embeddings": model.model.language_model.rotary_emb(hidden, positions),
    }


def _raters(visual: Tensor, words: Tensor) -> list[int]:
    """Returns the words whose softmax share, averaged over the visual tokens, is above the mean."""
    shares = [0.0] * len(words)
    for token in visual.double():
        weights = [math.exp(float(token @ word)) for word in words.double()]
        shares = [share + weight / sum(weights) / len(visual) for share, weight in zip(shares, weights, strict=True)]
    return [word for word, share in enumerate(shares) if share > 1 / len(words)]


def _pruned(hidden: Tensor, scores: list[float], count: int) -> Tensor:
    """Returns the best tokens in order, then the means of clusters of the best 30 % of the others.

    The number of kept tokens is the largest that leaves room for the clusters.
    """
    order = sorted(range(len(hidden)), key=lambda patch: -scores[patch])
    for num_kept in range(count, 0, -1):
        num_recycled = int(0.3 * (len(hidden) - num_kept)) + 1
        num_clusters = min(num_recycled // 10 + 1, num_kept - 1)
        if num_kept + num_clusters <= count:
            break
    pruned = order[num_kept : num_kept + num_recycled]
    distance = {
        (i, j): float((hidden[i].double() - hidden[j].double()).norm()) / hidden.shape[1] ** 0.5
        for i in pruned
        for j in pruned
    }
    # The nearest neighbours include the token itself. Equal densities are ordered by score.
    density = {
        i: math.exp(-sum(sorted(distance[i, j] ** 2 for j in pruned)[:num_clusters]) / max(1, num_clusters))
        for i in pruned
    }
    falling = sorted(pruned, key=lambda i: -density[i])
    gap = {
        i: min((distance[i, j] for j in falling[: falling.index(i)]), default=max(distance.values(), default=0))
        for i in pruned
    }
    centres = sorted(pruned, key=lambda i: -density[i] * gap[i])[:num_clusters]
    members: dict[int, list[int]] = {centre: [] for centre in centres}
    for i in pruned:
        members[min(centres, key=lambda centre: distance[i, centre])].append(i)
    return torch.stack(
        [hidden[i] for i in sorted(order[:num_kept])] + [hidden[each].mean(dim=0) for each in members.values()]
    )


def test_attention_equals_that_of_the_eager_decoder(case: Case) -> None:
    model, processor, visual = case
    prompts = encode_prompts(processor, PROMPTS[:1], None, "cpu")
    first = VisualTokens(*(each[:1] for each in visual))
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        inputs = processor.prompts(PROMPTS[:1], 1, num_visual_tokens=256)
        with torch.no_grad():
            stock = model(**inputs, **model.image_inputs(first.tokens_BVL), output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    at, length = processor.visual_offset, prompts.after_BT.shape[1]
    for layer, result in zip([0, 5], ReducedDecoder(model).attention(prompts, first, [0, 5]), strict=True):
        assert torch.allclose(result, stock[layer][:, :, -length:, at : at + 256], atol=2e-3)
