"""Tests of the input policy: the endpoint chooses the same budgets as the predictor offline, and reports them."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from openai import OpenAI

from parcelray.config.reducer import ClusterAggregateConfig
from parcelray.config.serve import EngineConfig, InputPolicyConfig, ServedBudgets
from parcelray.datasets.sample import Sample
from parcelray.errors import UserError
from parcelray.evaluation.adaptive.budget_predictor import BudgetPredictor, fit_predictor
from parcelray.evaluation.adaptive.budget_signals import SignalReader
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.checkpoint import MINI_BASE, resolve_checkpoint
from parcelray.models.vlm import load_vlm
from parcelray.serving.app import replica_settings
from parcelray.serving.engine.budget_chooser import BudgetChooser, load_predictor
from parcelray.serving.engine.continuous_engine import ContinuousEngine
from parcelray.serving.engine.engine import EngineRefusal, answer_all
from parcelray.serving.plan import pin
from parcelray.serving.replica.load import load_chooser
from tests.serving.conftest import Asker
from tests.serving.http.test_api import message
from tests.serving.local import PATIENCE_S, endpoint, job_of

BUDGETS = (16, 64, 256)
CLEAR = 1e-3
"""Minimum difference in worth of the two best budgets for a sample to be compared.

Rounding depends on kernels and batches and is below 1e-4; closer budgets may be swapped by it.
"""


@pytest.fixture(scope="module")
def signals(model: ElasticVLM, processor: ElasticProcessor, samples: list[Sample]) -> Any:
    return SignalReader(model, processor).read(samples)


@pytest.fixture(scope="module")
def predictor(model: ElasticVLM, processor: ElasticProcessor, signals: Any) -> BudgetPredictor:
    """A predictor fitted on random outcomes, so that it chooses each budget for some samples."""
    right = np.random.default_rng(0).random((len(signals), len(BUDGETS))) < (0.4, 0.5, 0.7)
    names = SignalReader(model, processor).names
    return replace(fit_predictor(signals, right, budgets=BUDGETS, names=names, reads_answer=False), price=0.001)


def is_clear(
    predictor: BudgetPredictor, signals: list[float], price: float | None = None, among: tuple[int, ...] = BUDGETS
) -> bool:
    (worth,) = predictor._worth(np.array([signals]), price)
    *_, second, best = sorted(worth[BUDGETS.index(budget)] for budget in among)
    return bool(best - second > CLEAR)


def test_the_engine_chooses_the_same_budgets_as_the_offline_predictor(
    model: ElasticVLM,
    processor: ElasticProcessor,
    samples: list[Sample],
    predictor: BudgetPredictor,
    signals: Any,
    ask: Asker,
) -> None:
    for price, floor in ((None, 16), (0.003, 16), (0.003, 64)):
        chooser = BudgetChooser(predictor, model, processor, price=price)
        config = EngineConfig(max_running=8, kv_tokens=4096, vision_batch=8)
        engine = ContinuousEngine(model, processor, config, chooser=chooser)
        choices = tuple(budget for budget in BUDGETS if budget >= floor)
        some = [
            index for index in range(0, len(samples), 2) if is_clear(predictor, signals[index].tolist(), price, choices)
        ]
        assert len(some) > 15
        selected = [samples[index] for index in some]
        answers = answer_all(engine, [replace(ask(sample, 256), choices=choices) for sample in selected])
        expected = [predictor.choose(signals[index].tolist(), price=price, among=choices) for index in some]
        assert [each.num_visual_tokens for each in answers] == expected
        assert min(expected) == floor
        if floor == 16:
            assert expected == [BUDGETS[index] for index in predictor.choose_all(signals[some], price=price)]
            assert len(set(expected)) > 1, "the test is meaningful only if choices differ"
        # The answer at a budget is the same whether it was chosen or requested.
        assert [each.text for each in answers] == [
            each.text
            for each in answer_all(
                engine, [ask(sample, budget) for sample, budget in zip(selected, expected, strict=True)]
            )
        ]
        assert engine.stats().kv_tokens_used == 0
        engine.close()


def test_a_budget_that_does_not_fit_is_not_chosen(
    model: ElasticVLM, processor: ElasticProcessor, samples: list[Sample], predictor: BudgetPredictor, ask: Asker
) -> None:
    chooser = BudgetChooser(predictor, model, processor, price=0.0)
    engine = ContinuousEngine(model, processor, EngineConfig(kv_tokens=128), chooser=chooser)
    one = [sample for sample in samples if len(sample.images) == 1]
    assert {
        each.num_visual_tokens
        for each in answer_all(engine, [replace(ask(sample, 256), choices=BUDGETS) for sample in one])
    } <= {16, 64}
    with pytest.raises(EngineRefusal, match="may hold 128"):
        engine.submit(replace(ask(one[0], 256), choices=(256,)), lambda _: None)
    engine.close()
    plain = ContinuousEngine(model, processor)
    with pytest.raises(EngineRefusal, match="has no budget predictor; set visual_tokens"):
        plain.submit(replace(ask(one[0], 256), choices=BUDGETS), lambda _: None)
    plain.close()


def test_budgets_are_chosen_for_a_model_with_a_reducer(
    processor: ElasticProcessor, samples: list[Sample], predictor: BudgetPredictor, signals: Any, ask: Asker
) -> None:
    # The patch features, and hence the signals, are those of the model with pooled patches.
    vanilla = load_vlm(resolve_checkpoint(MINI_BASE).path).eval()
    chooser = BudgetChooser(predictor, vanilla, processor)
    some = [index for index in range(0, len(samples), 4) if is_clear(predictor, signals[index].tolist())]
    expected = [predictor.choose(signals[index].tolist()) for index in some]
    assert len(set(expected)) > 1, "the test is meaningful only if choices differ"
    engine = ContinuousEngine(vanilla, processor, chooser=chooser, reducer=ClusterAggregateConfig())
    answers = answer_all(engine, [replace(ask(samples[index], 256), choices=BUDGETS) for index in some])
    engine.close()
    assert [each.num_visual_tokens for each in answers] == expected


def test_header_usage_metrics_and_log_hold_the_chosen_budget(
    model: ElasticVLM,
    processor: ElasticProcessor,
    samples: list[Sample],
    predictor: BudgetPredictor,
    signals: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    predictor.save(tmp_path)
    some = [index for index in range(len(samples)) if is_clear(predictor, signals[index].tolist())][:12]
    expected = [predictor.choose(signals[index].tolist()) for index in some]
    caplog.set_level("INFO", logger="parcelray.requests")
    policy = {"type": "input", "predictor": str(tmp_path)}
    chooser = BudgetChooser(predictor, model, processor)
    with endpoint(model, processor, chooser=chooser, budgets={"offered": BUDGETS, "policy": policy}) as (url, _, _):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        for number, (sample, budget) in enumerate(zip([samples[index] for index in some], expected, strict=True)):
            arguments: dict[str, Any] = {"model": "mini", "messages": message(sample), "max_tokens": 8}
            if number % 2:
                raw = client.chat.completions.with_raw_response.create(
                    **arguments, stream=True, stream_options={"include_usage": True}
                )
                usage = list(raw.parse())[-1].usage
            else:
                raw = client.chat.completions.with_raw_response.create(**arguments)
                usage = raw.parse().usage
            assert raw.headers["x-visual-tokens"] == str(budget)
            assert usage is not None
            assert usage.model_extra == {"visual_tokens": budget}
            assert usage.prompt_tokens_details.model_dump()["image_tokens"] == budget * len(sample.images)
        # Requested budgets are used: a number, or the smallest one.
        named = client.chat.completions.with_raw_response.create(
            model="mini", messages=message(samples[0]), extra_body={"visual_tokens": 64}
        )
        assert named.headers["x-visual-tokens"] == "64"
        low = client.chat.completions.with_raw_response.create(model="mini", messages=message(samples[0], detail="low"))
        assert low.headers["x-visual-tokens"] == "16"
        with urlopen(f"{url}/metrics", timeout=PATIENCE_S) as response:
            lines = response.read().decode().splitlines()
    for budget, count in Counter(expected).items():
        assert (
            f'parcel:budget_decisions_total{{asked="auto",model_name="mini",visual_tokens="{budget}"}} {count:.1f}'
            in lines
        )
    records = [record.__dict__["request"] for record in caplog.records if record.name == "parcelray.requests"]
    assert [record["visual_tokens"] for record in records][: len(expected)] == expected


def test_an_unusable_predictor_is_refused_with_an_explanation(
    model: ElasticVLM, processor: ElasticProcessor, predictor: BudgetPredictor, tmp_path: Path
) -> None:
    def policy(folder: str, **changes: Any) -> InputPolicyConfig:
        replace(predictor, **changes).save(tmp_path / folder)
        return InputPolicyConfig(predictor=str(tmp_path / folder), floor=64)

    assert load_predictor(policy("good"), BUDGETS).budgets == BUDGETS
    with pytest.raises(UserError, match="needs the answer at 16 visual tokens, which would require a second pass"):
        load_predictor(policy("after", reads_answer=True), BUDGETS)
    with pytest.raises(UserError, match=r"can choose 64 visual tokens, but budgets\.offered is 16, 256"):
        load_predictor(policy("good"), (16, 256))
    with pytest.raises(UserError, match="holds no budget predictor"):
        load_predictor(InputPolicyConfig(predictor=str(tmp_path / "none")), BUDGETS)
    with pytest.raises(UserError, match="serve the checkpoint that it was fitted on"):
        BudgetChooser(replace(predictor, signals=predictor.signals[1:]), model, processor)
    with pytest.raises(ValueError, match="belongs to one checkpoint, but canary adds a second one"):
        job_of(budgets={"policy": {"type": "input", "predictor": "p"}}, canary={"model": {}})
    with pytest.raises(UserError, match="holds no budget predictor"):
        pin(job_of(budgets={"offered": BUDGETS, "policy": {"type": "input", "predictor": str(tmp_path / "none")}}))
    with pytest.raises(ValueError, match="floor of the policy is 32, which is not in offered"):
        ServedBudgets(offered=BUDGETS, policy=InputPolicyConfig(predictor="p", floor=32))


def test_a_replica_loads_its_predictor_from_any_working_directory(
    model: ElasticVLM,
    processor: ElasticProcessor,
    predictor: BudgetPredictor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    predictor.save(tmp_path / "predictor")
    monkeypatch.chdir(tmp_path)
    job = job_of(budgets={"offered": BUDGETS, "policy": {"type": "input", "predictor": "predictor", "price": 0.5}})
    settings = replica_settings(job, job.model, resolve_checkpoint(MINI_BASE))
    monkeypatch.chdir("/")
    assert isinstance(load_chooser(settings, model, processor), BudgetChooser)
    assert load_chooser(settings.model_copy(update={"policy": None}), model, processor) is None
