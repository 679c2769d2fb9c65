"""Chooses the next token of every request of a step: the most likely one, or a sample with the request's own generator.

Sampling inverts the cumulative distribution of all rows together, on the device of the logits. Without `top_p` no order
is needed. With `top_p` only the most likely tokens of a row are sorted, and more of them if the nucleus does not
provably end among these.

Shapes: B requests, R of them sampled, V vocabulary, K sorted tokens.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from parcelray.serving.engine.engine import Sampling

_MIN_TEMPERATURE = 1e-5
"""Lower temperatures take the most likely token, because logits divided by them overflow single precision."""
_SORTED = (256, 8192)
"""Number of most likely tokens of a row that are sorted: first attempt and second attempt; then all are sorted."""


class TopTokens(NamedTuple):
    """Log-probability of the chosen token, and the most likely tokens at its position."""

    logprob: float
    ids: list[int]
    logprobs: list[float]


def generator_of(sampling: Sampling) -> torch.Generator | None:
    """Returns the random generator of one request, or None if it takes the most likely tokens."""
    if sampling.temperature < _MIN_TEMPERATURE:
        return None
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def choose(logits_BV: Tensor, samplings: list[Sampling], generators: list[torch.Generator | None]) -> list[int | None]:
    """Returns one token id per row, or None where the logits are not finite.

    The sample of a row depends only on its own logits and generator.
    """
    largest_B, best_B = logits_BV.max(dim=1)
    chosen: list[int | None] = best_B.tolist()
    for row, largest in enumerate(largest_B.tolist()):
        if not math.isfinite(largest):
            chosen[row] = None
    rows = [row for row, generator in enumerate(generators) if generator is not None and chosen[row] is not None]
    if rows:
        sampled = _sample(
            logits_BV[rows],
            [samplings[row] for row in rows],
            [generator for row in rows if (generator := generators[row]) is not None],
        )
        for row, token in zip(rows, sampled, strict=True):
            chosen[row] = token
    return chosen


def logprobs_of(logits_V: Tensor, token_id: int, top: int) -> TopTokens:
    """Returns the log-probabilities at one position, before temperature and `top_p`."""
    logs_V = logits_V.log_softmax(dim=0)
    best = logs_V.topk(top) if top else None
    return TopTokens(
        float(logs_V[token_id]),
        [] if best is None else best.indices.tolist(),
        [] if best is None else best.values.tolist(),
    )


def _sample(logits_RV: Tensor, samplings: list[Sampling], generators: list[torch.Generator]) -> list[int]:
    device = logits_RV.device
    temperature_R = torch.tensor([sampling.temperature for sampling in samplings], device=device)
    uniform_R = torch.tensor(
        [float(torch.rand((), generator=generator, dtype=torch.float64)) for generator in generators],
        dtype=torch.float64,
        device=device,
    )
    # The maximum is subtracted first: divided by a small temperature, it could overflow.
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
        sampled_R, certain_R = _sample_nucleus(mass_RV[rows], top_p_R, uniform_R[rows], min(count, mass_RV.shape[1]))
        tokens_R[rows] = sampled_R
        rows = [row for row, certain in zip(rows, certain_R.tolist(), strict=True) if not certain]
    return list(map(int, tokens_R.tolist()))


def _sample_nucleus(mass_RV: Tensor, top_p_R: Tensor, uniform_R: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Samples [R] from the nucleus among the `count` most likely tokens of each row.

    Returns:
        The samples, and whether the nucleus ends among these tokens [R]; if not, the sample is not valid.
    """
    if count == mass_RV.shape[1]:
        sorted_RK, ids_RK = mass_RV.sort(dim=1, descending=True, stable=True)
    else:
        sorted_RK, ids_RK = mass_RV.topk(count, dim=1)
        # `topk` does not define the order of equal values.
        ids_RK, order_RK = ids_RK.sort(dim=1)
        sorted_RK, stable_RK = sorted_RK.gather(1, order_RK).sort(dim=1, descending=True, stable=True)
        ids_RK = ids_RK.gather(1, stable_RK)
    goal_R = top_p_R * mass_RV.sum(dim=1, dtype=torch.float64)
    sums_RK = sorted_RK.cumsum(dim=1, dtype=torch.float64)
    # A token is in the nucleus if the tokens before it do not reach the mass; so the first token always is.
    last_R = (sums_RK < goal_R[:, None]).sum(dim=1).clamp_(max=count - 1)
    inside_RK = torch.arange(count, device=mass_RV.device)[None] <= last_R[:, None]
    sampled_R = ids_RK.gather(1, _inverse(sorted_RK * inside_RK, uniform_R)[:, None]).squeeze(1)
    # There may be more tokens with the same probability as the last sorted one.
    certain_R = (sorted_RK.gather(1, last_R[:, None]).squeeze(1) > sorted_RK[:, -1]) | (count == mass_RV.shape[1])
    return sampled_R, certain_R


def _inverse(mass_RK: Tensor, uniform_R: Tensor) -> Tensor:
    """Returns the index [R] at which the cumulative mass exceeds a share of the total."""
    sums_RK = mass_RK.cumsum(dim=1, dtype=torch.float64)
    # The bound keeps a share that rounds to the total at the last index with any mass.
    goal_R1 = torch.minimum(
        uniform_R[:, None] * sums_RK[:, -1:], torch.nextafter(sums_RK[:, -1:], torch.zeros_like(sums_RK[:, -1:]))
    )
    return torch.searchsorted(sums_RK, goal_R1, right=True).squeeze(1)
