"""Builds a replica's engine from its settings, warms it up, and probes whether it still answers."""

import asyncio
import itertools
import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from parcelray.config.reducer import ReducerConfig
from parcelray.config.serve import ServedModelConfig
from parcelray.errors import UnsupportedBudgetError
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.model_reducer import ModelReducer
from parcelray.models.vlm import load_processor, load_vlm, use_sdpa_where_exact
from parcelray.serving.engine.budget_chooser import BudgetChooser, load_predictor
from parcelray.serving.engine.continuous_engine import ContinuousEngine
from parcelray.serving.engine.engine import (
    Engine,
    GenerateRequest,
    ImagePixels,
    PromptBuilder,
    Sampling,
    answer_all,
    events,
    last_event,
)
from parcelray.serving.replica import ReplicaSettings
from parcelray.tracking.opening import model_folder

logger = logging.getLogger("ray.serve")
_TIMEOUT_S = 20.0
"""Time after which an engine without an answer to a health check counts as dead, seconds."""
_WARM_UP_TIMEOUT_S = 600.0
_WARM_UP_IMAGES = 3
"""Number of warm-up requests per budget, enough to form a batch."""
_WARM_UP_TOKENS = 4


def load_model(
    path: str | Path, config: ServedModelConfig, budgets: Iterable[int], reducer: ReducerConfig | None = None
) -> ElasticVLM:
    """Loads a served model, in evaluation mode on its device.

    Args:
        path: folder of the checkpoint.
        config: connector, data type and device; its reference is not resolved again.
        budgets: visual-token budgets that the model must support.
        reducer: training-free reducer of the model; None: none.

    Raises:
        UnsupportedBudgetError: the model does not support a budget.
        UserError: the checkpoint cannot be loaded, or already compresses and has a reducer.
    """
    model = load_vlm(path, connector=config.connector, dtype=getattr(torch, config.dtype))
    name, legal = model.connector.name, model.supported_budgets
    if reducer is not None:
        name, legal = reducer.type, ModelReducer(model, reducer).supported_budgets
    for budget in budgets:
        if budget not in legal:
            raise UnsupportedBudgetError(budget, legal, name)
    use_sdpa_where_exact(model)
    return model.to(config.device).eval()


def load_chooser(settings: ReplicaSettings, model: ElasticVLM, processor: ElasticProcessor) -> BudgetChooser | None:
    """Loads the budget chooser of a replica, or None if the replica chooses no budgets.

    Raises:
        UserError: the predictor does not exist, or does not match the model and its budgets.
    """
    if settings.policy is None:
        return None
    return BudgetChooser(
        load_predictor(settings.policy, settings.budgets), model, processor, price=settings.policy.price
    )


def load_engine(settings: ReplicaSettings, name: str) -> tuple[Engine, "HealthProbe"]:
    """Returns the warmed-up engine of a replica and its health probe.

    Args:
        settings: settings of the replica.
        name: name of the engine in its statistics.

    Raises:
        UnsupportedBudgetError: the model does not support an offered budget.
        UserError: the checkpoint or the predictor cannot be loaded.
    """
    started = time.perf_counter()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    folder = model_folder(settings.pin, logger.info)
    model = load_model(folder, settings.model, settings.budgets, settings.reducer)
    processor = load_processor(folder)
    logger.info("parcelray: model loaded in %.1f s", time.perf_counter() - started)
    probe = HealthProbe(PromptBuilder(processor), settings.budgets)
    engine = ContinuousEngine(
        model,
        processor,
        settings.engine,
        urgent_tokens=probe.num_tokens,
        name=name,
        chooser=load_chooser(settings, model, processor),
        reducer=settings.reducer,
    )
    probe.warm_up(engine)
    return engine, probe


class HealthProbe:
    """Sends requests with an image to an engine, past its queue and its cache, to check that it answers.

    Args:
        prompts: prompt builder of the engine's checkpoint.
        budgets: offered visual-token budgets.
        timeout_s: seconds after which the engine counts as dead.
    """

    def __init__(
        self,
        prompts: PromptBuilder,
        budgets: Sequence[int],
        *,
        timeout_s: float = _TIMEOUT_S,
    ) -> None:
        self._prompts = prompts
        self._budgets = tuple(sorted(budgets))
        self._timeout_s = timeout_s
        self._numbers = itertools.count()
        self._checking: asyncio.Task[None] | None = None

    @property
    def num_tokens(self) -> int:
        """Number of KV tokens that one check needs."""
        smallest = self._budgets[0]
        request = self._request(smallest, 0, 1, self._timeout_s)
        return request.tokens_at(smallest).total + 1

    async def check(self, engine: Engine) -> None:
        """Returns once the engine has answered. Concurrent callers share one check.

        Raises:
            EngineRefusal: the engine rejected or aborted the request.
            TimeoutError: the engine did not answer in time.
        """
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._check(engine))
        # A cancelled caller must not cancel the check of the others.
        await asyncio.shield(self._checking)

    async def _check(self, engine: Engine) -> None:
        async with asyncio.timeout(self._timeout_s):
            await last_event(events(engine, self._request(self._budgets[0], 0, 1, self._timeout_s)))

    def warm_up(self, engine: Engine) -> None:
        """Generates answers at every budget, so that no client's request includes the slow first run.

        Raises:
            EngineRefusal: the engine cannot answer.
        """
        for budget in self._budgets:
            started = time.perf_counter()
            requests = [
                self._request(budget, index, _WARM_UP_TOKENS, _WARM_UP_TIMEOUT_S) for index in range(_WARM_UP_IMAGES)
            ]
            answer_all(engine, requests)
            logger.info("parcelray: %d visual tokens warmed up in %.2f s", budget, time.perf_counter() - started)

    def _request(self, budget: int, shade: int, max_new_tokens: int, timeout_s: float) -> GenerateRequest:
        side = self._prompts.image_size
        image = ImagePixels(f"probe-{shade}", side, bytes([64 * shade]) * (3 * side * side), use_cache=False)
        sampling = Sampling(max_new_tokens=max_new_tokens)
        name = f"probe-{next(self._numbers)}"
        return self._prompts.request(
            name, "ready", [image], num_visual_tokens=budget, sampling=sampling, timeout_s=timeout_s, urgent=True
        )
