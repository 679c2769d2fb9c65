"""The confidence of a model in its answers, computed from the logits of decoding.

Shapes: B answers in a batch, S tokens of the longest answer, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Confidence(NamedTuple):
    """The confidence in one answer."""

    mean_log_prob: float | None
    """Mean log-probability of the answer's tokens and its end token, nats; None: unknown (beam search)."""
    entropy: float | None
    """Entropy of the distribution of the first token, nats; None: unknown.

    Where the likeliest of several choices is taken, it is the entropy of the distribution over the choices.
    """


UNKNOWN = Confidence(None, None)


class ConfidenceRecorder:
    """Records every step of decoding: the likeliest token's log-probability, and the entropy of the first step.

    Keeping all logits instead would need B x S x V numbers. In a beam search, rows are beams, most of which are dropped
    later, so only whether their scores are finite is known of an answer.

    Args:
        num_beams: number of rows per answer.
    """

    def __init__(self, num_beams: int = 1) -> None:
        self._num_beams = num_beams
        self._entropy_B: Tensor | None = None
        self._log_probs: list[Tensor] = []

    def record(self, logits_BV: Tensor) -> None:
        """Records the logits or log-probabilities of one step."""
        logs_BV = logits_BV.float().log_softmax(-1)
        if self._entropy_B is None:
            self._entropy_B = entropy(logs_BV)
        self._log_probs.append(logs_BV.amax(-1))

    def confidences(self, lengths: Sequence[int]) -> list[Confidence | None]:
        """Returns the confidence in each answer, or None where logits were not finite; later tokens are ignored.

        Args:
            lengths: number of tokens of each answer, including the end token.
        """
        assert self._entropy_B is not None
        logs_BS = torch.stack(self._log_probs, dim=1)
        if self._num_beams > 1:
            finite_B = logs_BS.isfinite().view(len(lengths), -1).all(1)
            return [UNKNOWN if finite else None for finite in finite_B.tolist()]
        return [
            Confidence(sum(logs[:length]) / length, first) if all(map(math.isfinite, logs[:length])) else None
            for logs, length, first in zip(logs_BS.tolist(), lengths, self._entropy_B.tolist(), strict=True)
        ]


def entropy(logs: Tensor) -> Tensor:
    """Computes the entropy of distributions given as log-probabilities along the last dimension, nats."""
    return -(logs.exp() * logs).nan_to_num().sum(-1)
