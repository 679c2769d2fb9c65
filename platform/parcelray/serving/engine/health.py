"""Whether an engine answers: one token through all that a request goes through, with an image, past every cache."""

import asyncio
import itertools
import logging
import time
from collections.abc import Sequence

from parcelray.serving.engine.engine import Engine, GenerateRequest, ImagePixels, Sampling
from parcelray.serving.engine.waiting import answer, answer_all
from parcelray.serving.ingress.prompting import PromptBuilder

logger = logging.getLogger("ray.serve")
_TIMEOUT_S = 20.0
"""An engine that makes no token in this time is replaced."""
_WARM_UP_TIMEOUT_S = 600.0
_WARM_UP_IMAGES = 3
"""So many that a batch is one."""
_WARM_UP_TOKENS = 4


class HealthProbe:
    """Asks an engine as requests do.

    Args:
        prompts: of the engine's checkpoint.
        budgets: that are offered.
        timeout_s: after which the engine counts as dead.
    """

    def __init__(self, prompts: PromptBuilder, budgets: Sequence[int], *, timeout_s: float = _TIMEOUT_S) -> None:
        self._prompts = prompts
        self._budgets = tuple(sorted(budgets))
        self._timeout_s = timeout_s
        self._numbers = itertools.count()
        self._checking: asyncio.Task[None] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that one check holds."""
        return self._request(self._budgets[0], 0, 1, self._timeout_s).num_prompt_tokens + 1

    async def check(self, engine: Engine) -> None:
        """Returns once an answer came. Those who ask at the same time wait for the same answer.

        Raises:
            EngineRefusal: the engine refused or gave up.
            TimeoutError: it says nothing.
        """
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._check(engine))
        # One who stops waiting takes nothing from the others.
        await asyncio.shield(self._checking)

    async def _check(self, engine: Engine) -> None:
        async with asyncio.timeout(self._timeout_s):
            await answer(engine, self._request(self._budgets[0], 0, 1, self._timeout_s))

    def warm_up(self, engine: Engine) -> None:
        """Answers at every budget, so that no request is the first.

        Raises:
            EngineRefusal: the engine cannot give one.
        """
        for budget in self._budgets:
            started = time.perf_counter()
            requests = [
                self._request(budget, number, _WARM_UP_TOKENS, _WARM_UP_TIMEOUT_S) for number in range(_WARM_UP_IMAGES)
            ]
            answer_all(engine, requests)
            logger.info("parcelray: %d visual tokens warmed up in %.2f s", budget, time.perf_counter() - started)

    def _request(self, budget: int, shade: int, max_new_tokens: int, timeout_s: float) -> GenerateRequest:
        side = self._prompts.image_size
        image = ImagePixels(f"probe-{shade}", side, bytes([64 * shade]) * (3 * side * side), kept=False)
        sampling = Sampling(max_new_tokens=max_new_tokens)
        name = f"probe-{next(self._numbers)}"
        return self._prompts.request(
            name, "ready", [image], num_visual_tokens=budget, sampling=sampling, timeout_s=timeout_s, urgent=True
        )
