"""One training step: losses against the model's own, micro-batches, optimiser groups, learning-rate schedule."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parcelray.config.connector import ParcelConnectorConfig
from parcelray.config.model import MiniModelConfig
from parcelray.config.optimizer import AdamWConfig, ScheduleConfig, SgdConfig
from parcelray.config.train import TrainingConfig
from parcelray.datasets.collator import IGNORED, Collator
from parcelray.datasets.mini.suite import MiniSuite
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.paligemma_processor import ElasticPaliGemmaProcessor
from parcelray.models.mini import build_config, build_model, build_processor
from parcelray.models.training_attention import training_kernels
from parcelray.models.vlm import use_sdpa_where_exact
from parcelray.training.accelerator import pass_precision
from parcelray.training.step import (
    Losses,
    TensorBatch,
    build_optimizer,
    distillation_sum,
    learning_rate_factor,
    losses,
    parameter_groups,
    to_tensors,
    with_placeholders,
)

from .conftest import TINY

MODEL = MiniModelConfig.model_validate(TINY["model"])
# Named by the modules of PARCEL's local start.
UNDECAYED = {f"model.connector.query_path.{name}" for name in ("bank.weight", "place_code.offset")}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def processor() -> ElasticPaliGemmaProcessor:
    """Processor of the tiny model."""
    return build_processor(MODEL, MiniSuite(split="train").texts(200))


@pytest.fixture
def model(processor: ElasticPaliGemmaProcessor) -> ElasticVLM:
    """A tiny PARCEL model with seeded random weights."""
    config = build_config(MODEL, processor)
    config.connector = ParcelConnectorConfig(num_heads=2).model_dump(mode="json")
    return build_model(config, 0)


def _batch(
    processor: ElasticPaliGemmaProcessor, group: str = "single", count: int = 5, *, label_patches: bool = False
) -> TensorBatch:
    suite = MiniSuite(split="train")
    return to_tensors(
        Collator(processor, label_patches=label_patches)([suite.get(group, index) for index in range(count)]),
        CPU,
        processor,
    )


def _sum(model: ElasticVLM, batch: TensorBatch, budget: int) -> torch.Tensor:
    return losses(model, batch, num_visual_tokens=budget, image_token_id=model.config.image_token_id).answer_sum


@pytest.mark.parametrize(("group", "budget"), [("single", 16), ("single", 256), ("pair", 40)])
def test_the_loss_equals_the_models_own_loss(
    model: ElasticVLM, processor: ElasticPaliGemmaProcessor, group: str, budget: int
) -> None:
    batch = _batch(processor, group)
    inputs = with_placeholders(batch, budget, model.config.image_token_id)
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    labels[:, -batch.labels_BS.shape[1] :] = batch.labels_BS
    with torch.no_grad():
        # The model's own loss is a mean over tokens; with one prompt it is that prompt's mean.
        images = inputs["pixel_values"].unflatten(0, (batch.num_prompts, -1))
        alone = [
            model(
                pixel_values=images[row],
                num_visual_tokens=budget,
                labels=labels[row : row + 1],
                **{key: inputs[key][row : row + 1] for key in ("input_ids", "token_type_ids", "attention_mask")},
            ).loss
            for row in range(batch.num_prompts)
        ]
        expected = torch.stack(alone).sum()
        actual = _sum(model, batch, budget)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_computing_only_text_logits_gives_the_same_answer_loss(
    model: ElasticVLM, processor: ElasticPaliGemmaProcessor
) -> None:
    labelled = _batch(processor, count=8, label_patches=True)
    with torch.no_grad():
        whole = losses(model, labelled, num_visual_tokens=256, image_token_id=model.config.image_token_id)
        text_only = _sum(model, _batch(processor, count=8), 256)
    assert whole.patch_sum is not None
    torch.testing.assert_close(whole.answer_sum, text_only, atol=1e-4, rtol=1e-5)


def test_patches_have_a_loss_only_if_each_visual_token_is_one_patch(
    model: ElasticVLM, processor: ElasticPaliGemmaProcessor
) -> None:
    batch = _batch(processor, count=8, label_patches=True)
    with torch.no_grad():
        assert losses(model, batch, num_visual_tokens=64, image_token_id=model.config.image_token_id).patch_sum is None
        inputs = with_placeholders(batch, 256, model.config.image_token_id)
        logits = model(**inputs, num_visual_tokens=256).logits[:, :256]
        actual = losses(model, batch, num_visual_tokens=256, image_token_id=model.config.image_token_id).patch_sum
    assert batch.patch_labels_BN is not None
    chosen = batch.patch_labels_BN != IGNORED
    rows = [row for row in range(batch.num_prompts) if bool(chosen[row].any())]
    assert 0 < len(rows) < batch.num_prompts
    expected = -sum(
        logits[row].log_softmax(-1)[chosen[row]].gather(1, batch.patch_labels_BN[row][chosen[row]][:, None]).mean()
        for row in rows
    )
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_the_divergence_is_the_mean_over_the_answer_tokens_of_each_prompt() -> None:
    student = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    # Probabilities of 3/4 and 1/4, and twice of 1/2.
    teacher = torch.tensor([[np.log(3.0), 0.0], [2.0, 2.0], [1.0, 1.0]], dtype=torch.float32)
    labels = torch.tensor([[IGNORED, 1, 0], [IGNORED, 0, IGNORED]])
    expected = 0.5 * (0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5))
    assert distillation_sum(student, teacher, labels).item() == pytest.approx(expected, rel=1e-5)
    # The second prompt has one answer token.
    assert distillation_sum(student, teacher[[1, 2, 0]], labels).item() == pytest.approx(2 * expected, rel=1e-5)


def test_the_objective_weighs_labels_teacher_and_patches() -> None:
    answers, patches, divergence = (torch.tensor(value) for value in (4.0, 3.0, 8.0))
    assert Losses(answers, None, None, None).objective(2.0, 0.25) == 4
    assert Losses(answers, patches, divergence, None).objective(2.0, 0.25) == 0.75 * 4 + 0.25 * 8 + 2 * 3


def test_a_teacher_with_the_same_logits_has_no_gradient(
    model: ElasticVLM, processor: ElasticPaliGemmaProcessor
) -> None:
    batch = _batch(processor)
    settings = {"image_token_id": model.config.image_token_id}
    teacher = losses(model, batch, num_visual_tokens=40, keep_logits=True, **settings).answer_logits_AV
    assert teacher is not None
    assert teacher.shape == (int((batch.labels_BS[:, 1:] != IGNORED).sum()), model.config.text_config.vocab_size)
    assert not teacher.requires_grad
    divergences = {}
    for budget in (40, 16):
        result = losses(model, batch, num_visual_tokens=budget, teacher_logits_AV=teacher, **settings)
        assert result.distillation_sum is not None
        model.zero_grad()
        result.distillation_sum.backward()
        norm = torch.nn.utils.get_total_norm([each.grad for each in model.parameters() if each.grad is not None])
        divergences[budget] = (result.distillation_sum.item(), norm.item())
    assert divergences[40] == pytest.approx((0, 0), abs=1e-4)
    assert min(divergences[16]) > 100 * max(map(abs, divergences[40]))


def test_distributed_training_sums_gradients_of_parameters_that_its_last_pass_does_not_use(
    model: ElasticVLM, processor: ElasticPaliGemmaProcessor, tmp_path: Path
) -> None:
    """With distillation, the largest budget comes first and the queries may be unused in the pass that synchronises."""
    batch = _batch(processor, count=2)
    for budget in (40, 16):
        _sum(model, batch, budget).backward()
    expected = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        settings = {"image_token_id": model.config.image_token_id}
        with wrapped.no_sync():
            losses(wrapped, batch, num_visual_tokens=40, **settings).answer_sum.backward()
        losses(wrapped, batch, num_visual_tokens=16, **settings).answer_sum.backward()
    finally:
        torch.distributed.destroy_process_group()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-5)
    assert any("query" in name and bool(gradient.any()) for name, gradient in expected.items())


@pytest.mark.parametrize(
    ("group", "parts", "by_tokens", "mean"),
    [
        ("single", 2, False, "prompts"),
        ("single", 5, True, "tokens"),
        ("pair", 3, True, "prompts"),
        ("single", 3, False, "tokens"),
    ],
)
def test_the_gradients_of_micro_batches_add_up_to_those_of_the_batch(
    model: ElasticVLM, processor: ElasticPaliGemmaProcessor, group: str, parts: int, by_tokens: bool, mean: str
) -> None:
    batch = _batch(processor, group)
    answers_B = (batch.labels_BS != IGNORED).sum(1)
    assert len(set(answers_B.tolist())) > 1, "answers have different lengths"
    weight = batch.num_prompts / answers_B.sum() if mean == "tokens" else None
    settings: Any = {"num_visual_tokens": 40, "image_token_id": model.config.image_token_id, "token_weight": weight}
    losses(model, batch, **settings).answer_sum.backward()
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    slices = batch.micro_batches(parts, by_tokens=by_tokens)
    assert len(slices) == parts
    assert sum(part.num_prompts for part in slices) == batch.num_prompts
    for part in slices:
        losses(model, part, **settings).answer_sum.backward()
    for name, parameter in model.named_parameters():
        if name in whole:
            assert parameter.grad is not None
            assert torch.allclose(parameter.grad, whole[name], atol=1e-4, rtol=1e-4), name


def test_the_mean_over_tokens_is_that_of_torch(model: ElasticVLM, processor: ElasticPaliGemmaProcessor) -> None:
    batch = _batch(processor)
    inputs = with_placeholders(batch, 16, model.config.image_token_id)
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    labels[:, -batch.labels_BS.shape[1] :] = batch.labels_BS
    weight = torch.tensor(batch.num_prompts / batch.num_answer_tokens)
    with torch.no_grad():
        # The model's own loss is a mean over all answer tokens.
        expected = model(**inputs, num_visual_tokens=16, labels=labels).loss
        found = losses(
            model, batch, num_visual_tokens=16, image_token_id=model.config.image_token_id, token_weight=weight
        ).answer_sum
    torch.testing.assert_close(found / batch.num_prompts, expected, atol=1e-5, rtol=1e-5)


def test_micro_batches_by_tokens_have_less_padding_and_all_samples(processor: ElasticPaliGemmaProcessor) -> None:
    batch = _batch(processor, count=12)
    parts = batch.micro_batches(4, by_tokens=True)
    lengths = [part.attention_mask_BS.shape[1] for part in parts]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1] == batch.attention_mask_BS.shape[1]
    assert all(int(part.attention_mask_BS.sum(1).max()) == length for part, length in zip(parts, lengths, strict=True))

    def prompts(each: TensorBatch) -> list[list[int]]:
        return [ids[mask == 1].tolist() for ids, mask in zip(each.input_ids_BS, each.attention_mask_BS, strict=True)]

    assert sorted(prompt for part in parts for prompt in prompts(part)) == sorted(prompts(batch))


def test_a_micro_batch_keeps_each_prompts_images_and_labels(processor: ElasticPaliGemmaProcessor) -> None:
    batch = _batch(processor, "pair", label_patches=True)
    part = batch.micro_batches(2)[1]
    assert part.pixel_values_ICHW.shape[0] == 4
    assert torch.equal(part.pixel_values_ICHW, batch.pixel_values_ICHW[[2, 3, 6, 7]])
    assert torch.equal(part.input_ids_BS, batch.input_ids_BS[[1, 3]])
    assert part.patch_labels_BN is not None
    assert batch.patch_labels_BN is not None
    assert torch.equal(part.patch_labels_BN, batch.patch_labels_BN[[1, 3]])


def test_the_groups_cover_every_trainable_parameter_once(model: ElasticVLM) -> None:
    model.model.vision_tower.requires_grad_(False)
    groups = parameter_groups(model, AdamWConfig(learning_rate=0.01, connector_multiplier=5, weight_decay=0.1))
    names = {parameter: name for name, parameter in model.named_parameters()}
    grouped: list[str] = []
    for group in groups:
        members = group["params"]
        assert isinstance(members, list)
        for parameter in members:
            name = names[parameter]
            grouped.append(name)
            assert group["lr"] == pytest.approx(0.05 if ".connector." in name else 0.01), name
            assert group["weight_decay"] == (0.1 if parameter.ndim >= 2 and name not in UNDECAYED else 0.0), name
    assert len(groups) == 4
    assert sorted(grouped) == sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_the_optimizer_is_the_configured_one(model: ElasticVLM) -> None:
    adamw = build_optimizer(model, AdamWConfig(beta1=0.8, beta2=0.9, epsilon=1e-6))
    assert isinstance(adamw, torch.optim.AdamW)
    assert {(group["betas"], group["eps"]) for group in adamw.param_groups} == {((0.8, 0.9), 1e-6)}
    sgd = build_optimizer(model, SgdConfig(momentum=0.5))
    assert isinstance(sgd, torch.optim.SGD)
    assert {group["momentum"] for group in sgd.param_groups} == {0.5}


@pytest.mark.parametrize(
    ("shape", "factors"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.5, 1, 1, 0.8828427, 0.6, 0.3171573, 0.2]),
    ],
)
def test_the_learning_rate_warms_up_and_decays_to_its_final_fraction(shape: str, factors: list[float]) -> None:
    config = ScheduleConfig.model_validate({"type": shape, "warmup_steps": 2, "final_fraction": 0.2})
    assert [learning_rate_factor(step, 7, config) for step in range(7)] == pytest.approx(factors, abs=1e-6)


def test_warm_up_can_be_off_or_longer_than_the_run() -> None:
    assert learning_rate_factor(0, 7, ScheduleConfig(warmup_steps=0)) == 1
    assert [learning_rate_factor(step, 2, ScheduleConfig(warmup_steps=4)) for step in range(2)] == [0.25, 0.5]


def test_the_loss_of_a_repeated_batch_halves_in_25_steps(
    model: ElasticVLM, processor: ElasticPaliGemmaProcessor
) -> None:
    batch = _batch(processor, count=4)
    optimizer = build_optimizer(model, AdamWConfig(learning_rate=0.01))
    curve = []
    for _ in range(25):
        loss = _sum(model, batch, 16) / batch.num_prompts
        curve.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert curve[-1] < 0.5 * curve[0], np.round(curve, 2)


@pytest.mark.parametrize(("dtype", "cosine"), [(None, 0.9999), (torch.bfloat16, 0.99)])
def test_gradients_with_training_kernels_agree_with_those_of_stock_kernels(
    model: ElasticVLM, processor: ElasticPaliGemmaProcessor, dtype: torch.dtype | None, cosine: float
) -> None:
    """Cosine of each parameter's gradients, in fp32 and under bf16 autocast, against stock kernels in fp32."""
    use_sdpa_where_exact(model)
    batch = _batch(processor)

    def gradients(kernels: AbstractContextManager[None], autocast: torch.dtype | None) -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None), kernels:
            loss = _sum(model, batch, 80)
        loss.backward()
        found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    expected, actual = gradients(nullcontext(), None), gradients(training_kernels(model), dtype)
    assert actual.keys() == expected.keys()
    # The bias of keys has no gradient but rounding errors: it adds the same to all logits of a query.
    largest = max(float(each.norm()) for each in expected.values())
    for name, each in expected.items():
        if float(each.norm()) > 1e-3 * largest:
            similarity = torch.nn.functional.cosine_similarity(actual[name].flatten(), each.flatten(), dim=0)
            assert float(similarity) >= cosine, name


def test_training_kernels_leave_later_passes_unchanged(model: ElasticVLM, processor: ElasticPaliGemmaProcessor) -> None:
    use_sdpa_where_exact(model)
    batch = _batch(processor)
    with torch.no_grad():
        before = _sum(model, batch, 16)
        with training_kernels(model):
            _sum(model, batch, 16)
        assert torch.equal(_sum(model, batch, 16), before)


@pytest.mark.parametrize(
    ("isa", "amx", "precision", "expected"),
    [
        (None, True, "bf16", "bf16"),
        ("AVX512_CORE", True, "bf16", "no"),
        ("AVX512_CORE_AMX", True, "bf16", "bf16"),
        (None, False, "bf16", "no"),
        (None, False, "fp16", "fp16"),
        (None, True, "fp32", "no"),
    ],
)
def test_bf16_passes_need_matrix_instructions_on_a_cpu(
    isa: str | None, amx: bool, precision: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if isa is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    training = TrainingConfig(steps=1, precision=precision)
    assert pass_precision(training, cpu_only=True) == expected
    assert pass_precision(training, cpu_only=False) == ("no" if precision == "fp32" else precision)
    stock = TrainingConfig(steps=1, precision=precision, kernels="stock")
    assert pass_precision(stock, cpu_only=True) == ("no" if precision == "fp32" else precision)
