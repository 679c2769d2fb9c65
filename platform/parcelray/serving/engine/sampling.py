"""The next token of every request of a step: the likeliest, or one drawn with its request's own random number.

Drawing is the inverse of the cumulative distribution, for all rows together, where the logits are. Without `top_p` that
needs no order. With it only the likeliest tokens of a row are sorted, and more of them where the nucleus does not
provably end among these.

Shapes: B requests, R of them drawn, V vocabulary, K tokens that are sorted.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from parcelray.serving.engine.engine import Sampling

_COLDEST = 1e-5
"""Temperatures below it choose the likeliest token: in single precision the logits over it would be infinite, or all but one so."""
_SORTED = (256, 8192)
"""Likeliest tokens of a row that are sorted, and if they are too few; then all of them."""


class TopTokens(NamedTuple):
    """The chosen token's log-probability and the likeliest tokens at its place."""

    logprob: float
    ids: list[int]
    logprobs: list[float]


def generator_of(sampling: Sampling) -> torch.Generator | None:
    """The generator of one request; None where nothing is drawn."""
    if sampling.temperature < _COLDEST:
        return None
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def choose(logits_BV: Tensor, samplings: list[Sampling], generators: list[torch.Generator | None]) -> list[int | None]:
    """Token ids, one a row; None: its logits are no numbers.

    A row's draw depends on nothing but its own logits and generator.
    """
    largest_B, likeliest_B = logits_BV.max(dim=1)
    chosen: list[int | None] = likeliest_B.tolist()
    for row, largest in enumerate(largest_B.tolist()):
        if not math.isfinite(largest):
            chosen[row] = None
    rows = [row for row, generator in enumerate(generators) if generator is not None and chosen[row] is not None]
    if rows:
        drawn = _draw(
            logits_BV[rows],
            [samplings[row] for row in rows],
            [generator for row in rows if (generator := generators[row]) is not None],
        )
        for row, token in zip(rows, drawn, strict=True):
            chosen[row] = token
    return chosen


def logprobs_of(logits_V: Tensor, token_id: int, top: int) -> TopTokens:
    """Log-probabilities at one place, before temperature and `top_p`."""
    logs_V = logits_V.log_softmax(dim=0)
    best = logs_V.topk(top) if top else None
    return TopTokens(
        float(logs_V[token_id]),
        [] if best is None else best.indices.tolist(),
        [] if best is None else best.values.tolist(),
    )


def _draw(logits_RV: Tensor, samplings: list[Sampling], generators: list[torch.Generator]) -> list[int]:
    device = logits_RV.device
    temperature_R = torch.tensor([sampling.temperature for sampling in samplings], device=device)
    uniform_R = torch.tensor(
        [float(torch.rand((), generator=generator, dtype=torch.float64)) for generator in generators],
        dtype=torch.float64,
        device=device,
    )
    # The largest is taken off first: divided by a small temperature it could be infinite.
    mass_RV = ((logits_RV - logits_RV.amax(dim=1, keepdim=True)) / temperature_R[:, None]).exp_()
    tokens_R = torch.empty(len(samplings), dtype=torch.int64, device=device)
    whole = [row for row, sampling in enumerate(samplings) if sampling.top_p >= 1.0]
    if whole:
        tokens_R[whole] = _inverse(mass_RV[whole], uniform_R[whole])
    rows = [row for row, sampling in enumerate(samplings) if sampling.top_p < 1.0]
    for count in (*_SORTED, mass_RV.shape[1]):
        if not rows:
            break
        top_p_R = torch.tensor([samplings[row].top_p for row in rows], dtype=torch.float64, device=device)
        drawn_R, certain_R = _draw_nucleus(mass_RV[rows], top_p_R, uniform_R[rows], min(count, mass_RV.shape[1]))
        tokens_R[rows] = drawn_R
        rows = [row for row, certain in zip(rows, certain_R.tolist(), strict=True) if not certain]
    return list(map(int, tokens_R.tolist()))


def _draw_nucleus(mass_RV: Tensor, top_p_R: Tensor, uniform_R: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Draws [R] from the nucleus, and whether it ends among the `count` likeliest tokens of its row [R]; only then the draw counts."""
    if count == mass_RV.shape[1]:
        sorted_RK, ids_RK = mass_RV.sort(dim=1, descending=True, stable=True)
    else:
        sorted_RK, ids_RK = mass_RV.topk(count, dim=1)
        # `topk` leaves open in which order equal ones come.
        ids_RK, order_RK = ids_RK.sort(dim=1)
        sorted_RK, again_RK = sorted_RK.gather(1, order_RK).sort(dim=1, descending=True, stable=True)
        ids_RK = ids_RK.gather(1, again_RK)
    goal_R = top_p_R * mass_RV.sum(dim=1, dtype=torch.float64)
    sums_RK = sorted_RK.cumsum(dim=1, dtype=torch.float64)
    # A token is in the nucleus if those before it have not yet the mass: the first always is.
    last_R = (sums_RK < goal_R[:, None]).sum(dim=1).clamp_(max=count - 1)
    inside_RK = torch.arange(count, device=mass_RV.device)[None] <= last_R[:, None]
    drawn_R = ids_RK.gather(1, _inverse(sorted_RK * inside_RK, uniform_R)[:, None]).squeeze(1)
    # Of tokens as likely as the last one that was sorted, others may have been left out.
    certain_R = (sorted_RK.gather(1, last_R[:, None]).squeeze(1) > sorted_RK[:, -1]) | (count == mass_RV.shape[1])
    return drawn_R, certain_R


def _inverse(mass_RK: Tensor, uniform_R: Tensor) -> Tensor:
    """The place [R] at which the cumulative mass passes a share of the whole."""
    sums_RK = mass_RK.cumsum(dim=1, dtype=torch.float64)
    # The last place with any mass bounds it: a share that rounds to the whole must not fall behind it.
    goal_R1 = torch.minimum(
        uniform_R[:, None] * sums_RK[:, -1:], torch.nextafter(sums_RK[:, -1:], torch.zeros_like(sums_RK[:, -1:]))
    )
    return torch.searchsorted(sums_RK, goal_R1, right=True).squeeze(1)
