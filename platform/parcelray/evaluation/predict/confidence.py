"""The confidence of a model in its answers, computed from the logits of decoding.

Shapes: B answers in a batch, S tokens of the longest answer, V vocabulary.
"""

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
    """Records the chosen token's log-probability at every step of greedy decoding, and the entropy of the first step.

    `generate` accepts it as a logits processor. Keeping all logits instead would need B x S x V numbers.
    """

    def __init__(self) -> None:
        self._entropy_B: Tensor | None = None
        self._log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Records one step and returns the scores unchanged, as a logits processor of transformers."""
        self.record(scores)
        return scores

    def record(self, logits_BV: Tensor) -> None:
        """Records the logits of one step."""
        logs_BV = logits_BV.float().log_softmax(-1)
        if self._entropy_B is None:
            self._entropy_B = entropy(logs_BV)
        self._log_probs.append(logs_BV.amax(-1))

    def confidences(self, lengths: Sequence[int]) -> list[Confidence]:
        """Returns the confidence in each answer; tokens after the length of an answer are ignored.

        Args:
            lengths: number of tokens of each answer, including the end token.
        """
        assert self._entropy_B is not None
        logs_BS = torch.stack(self._log_probs, dim=1).tolist()
        return [
            Confidence(sum(logs[:length]) / length, float(each))
            for logs, length, each in zip(logs_BS, lengths, self._entropy_B.tolist(), strict=True)
        ]


def entropy(logs: Tensor) -> Tensor:
    """Computes the entropy of distributions given as log-probabilities along the last dimension, nats."""
    return -(logs.exp() * logs).nan_to_num().sum(-1)
