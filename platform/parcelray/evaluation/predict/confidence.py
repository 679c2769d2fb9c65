"""How sure a model was of an answer, read off the logits that decoding has anyway.

Shapes: B answers of a batch, S tokens of the longest, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Confidence(NamedTuple):
    """Of one answer."""

    mean_log_prob: float | None
    """Mean log-probability of its tokens and of the end after them, nats; None: the search keeps none (beams)."""
    entropy: float | None
    """Of the distribution of its first token, nats; where one of several choices is taken by likelihood, of the distribution over the choices."""


UNKNOWN = Confidence(None, None)


class LogitsWatch:
    """Keeps of every step of a greedy search the chosen token's log-probability, and of the first step the entropy.

    `generate` takes it as a logits processor. To keep all logits instead would cost B x S x V numbers.
    """

    def __init__(self) -> None:
        self._entropy_B: Tensor | None = None
        self._log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """As transformers' logits processors; changes nothing."""
        self.see(scores)
        return scores

    def see(self, logits_BV: Tensor) -> None:
        """Notes one step."""
        logs_BV = logits_BV.float().log_softmax(-1)
        if self._entropy_B is None:
            self._entropy_B = entropy(logs_BV)
        self._log_probs.append(logs_BV.amax(-1))

    def of(self, lengths: Sequence[int]) -> list[Confidence]:
        """The confidence of each answer; what was decoded after an answer's length does not count.

        Args:
            lengths: tokens of each answer, its end included.
        """
        assert self._entropy_B is not None
        logs_BS = torch.stack(self._log_probs, dim=1).tolist()
        return [
            Confidence(sum(logs[:length]) / length, float(each))
            for logs, length, each in zip(logs_BS, lengths, self._entropy_B.tolist(), strict=True)
        ]


def entropy(logs: Tensor) -> Tensor:
    """Entropy of distributions given as log-probabilities along the last dimension, nats."""
    return -(logs.exp() * logs).nan_to_num().sum(-1)
