"""The next token of every request of a step: the likeliest, or one drawn from its request's own generator.

Shapes: B requests, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from parcelray.serving.engine import Sampling


class TopTokens(NamedTuple):
    """The chosen token's log-probability and the likeliest tokens at its place."""

    logprob: float
    ids: list[int]
    logprobs: list[float]


def generator_of(sampling: Sampling) -> torch.Generator | None:
    """The generator of one request; None where nothing is drawn."""
    if sampling.temperature == 0.0:
        return None
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def choose(logits_BV: Tensor, samplings: list[Sampling], generators: list[torch.Generator | None]) -> list[int]:
    """Token ids, one a row. A row's draw depends on nothing but its own logits and generator."""
    chosen: list[int] = logits_BV.argmax(dim=1).tolist()
    for row, (sampling, generator) in enumerate(zip(samplings, generators, strict=True)):
        if generator is not None:
            chosen[row] = _draw(logits_BV[row].cpu(), sampling, generator)
    return chosen


def _draw(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    # The largest is taken off first: divided by a tiny temperature it would be infinite.
    probabilities_V = ((logits_V - logits_V.max()) / sampling.temperature).softmax(dim=0)
    if sampling.top_p < 1.0:
        sorted_V, order_V = probabilities_V.sort(descending=True, stable=True)
        # A token stays if those before it have not yet the mass: at least one does.
        outside_V = sorted_V.cumsum(dim=0) - sorted_V >= sampling.top_p
        outside_V[0] = False
        probabilities_V = probabilities_V.index_fill(0, order_V[outside_V], 0.0)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))


def logprobs_of(logits_V: Tensor, token_id: int, top: int) -> TopTokens:
    """Log-probabilities at one place, before temperature and `top_p`."""
    logs_V = logits_V.log_softmax(dim=0)
    best = logs_V.topk(top) if top else None
    return TopTokens(float(logs_V[token_id]), [] if best is None else best.indices.tolist(), [] if best is None else best.values.tolist())
