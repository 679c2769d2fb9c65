"""Fixtures: the packaged base model at several budgets, with pooled patches, which needs no connector weights."""

import itertools
from collections.abc import Iterator

import pytest

from parcelray.config.connector import M3ConnectorConfig
from parcelray.config.serve import EngineConfig
from parcelray.datasets.images import decode_image
from parcelray.datasets.mini import FAMILIES, family_samples
from parcelray.datasets.sample import Sample
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.checkpoint import MINI_BASE, resolve_checkpoint
from parcelray.models.vlm import load_processor, load_vlm, use_sdpa_where_exact
from parcelray.serving.engine.continuous_engine import ContinuousEngine
from parcelray.serving.engine.engine import GenerateRequest, PromptBuilder, Sampling


@pytest.fixture(scope="session")
def model() -> ElasticVLM:
    model = load_vlm(resolve_checkpoint(MINI_BASE).path, connector=M3ConnectorConfig())
    use_sdpa_where_exact(model)
    model.eval()
    return model


@pytest.fixture(scope="session")
def processor() -> ElasticProcessor:
    return load_processor(resolve_checkpoint(MINI_BASE).path)


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    """Fifty samples of the mini suite with one to four images each."""
    return [sample for family in FAMILIES for sample in family_samples("test", family, 13)][:50]


@pytest.fixture
def engine(model: ElasticVLM, processor: ElasticProcessor) -> Iterator[ContinuousEngine]:
    engine = ContinuousEngine(
        model, processor, EngineConfig(max_running=24, max_waiting=256, kv_tokens=8192, vision_batch=16)
    )
    yield engine
    engine.close()


class Asker:
    """Builds engine requests from samples."""

    def __init__(self, processor: ElasticProcessor) -> None:
        self._builder = PromptBuilder(processor)
        self._numbers = itertools.count()

    def __call__(
        self,
        sample: Sample,
        budget: int,
        *,
        timeout_s: float = 60.0,
        stream: bool = False,
        urgent: bool = False,
        **sampling: object,
    ) -> GenerateRequest:
        images = [self._builder.pixels(decode_image(image)) for image in sample.images] if budget else []
        settings = Sampling(**{"max_new_tokens": 8, **sampling})  # type: ignore[arg-type]
        return self._builder.request(
            f"r{next(self._numbers)}",
            sample.prompt,
            images,
            num_visual_tokens=budget,
            sampling=settings,
            timeout_s=timeout_s,
            stream=stream,
            urgent=urgent,
        )


@pytest.fixture(scope="session")
def ask(processor: ElasticProcessor) -> Asker:
    return Asker(processor)


@pytest.fixture
def never_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines built after this have no end token, so answers have their maximum length."""
    monkeypatch.setattr("parcelray.serving.engine.continuous_engine.end_token_ids", lambda *_: frozenset())
