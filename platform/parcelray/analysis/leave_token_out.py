"""Tests whether tokens with high attention are needed for the answer (arXiv 2504.17892, statistical validation).

For each image-question pair, every visual token is left out in turn, with unchanged positions of the others, and the
loss of the answer's log-likelihood is measured. The Spearman correlation of the loss with each importance measure is
computed over the tokens of a pair and averaged over pairs, with a t interval over pairs and a permutation test.
Attention and losses are smooth over the image, so neighbouring tokens are not independent. A permutation therefore
shifts the whole map of losses by a random number of rows and columns, with wrap-around, and may flip it. All p-values
are corrected together (Holm).

Shapes: N visual tokens in a square grid, R permutations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from parcelray.evaluation.inputs import Pair
from parcelray.evaluation.scoring.intervals import Interval, mean_interval
from parcelray.evaluation.scoring.paired import holm
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.reduced_decoder import ReducedDecoder, VisualTokens, encode_prompts
from parcelray.models.token_reduction.base import grid_side
from parcelray.models.token_reduction.encoder_view import EncoderView

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Validity:
    """The agreement of an importance measure with the loss when a token is left out."""

    correlation: Interval
    """Mean Spearman correlation over image-question pairs."""
    p_value: float
    """Share of permutations with a mean correlation as far from 0; at least 1 / (1 + number of permutations)."""
    p_holm: float
    """p-value, corrected for all measures."""
    mass: Interval
    """Share of the total loss that falls on the top 11 % of the tokens by the measure (by chance: 0.11)."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the values as JSON-serialisable data."""
        return {
            "correlation": self.correlation._asdict(),
            "p_value": self.p_value,
            "p_holm": self.p_holm,
            "mass": self.mass._asdict(),
        }


@torch.inference_mode()
def leave_one_out(
    model: ElasticVLM, processor: ElasticProcessor, pair: Pair, *, batch_size: int = 64, seed: int = 0
) -> tuple[Floats, dict[str, Floats]]:
    """Measures the loss without each token of a pair, and the importance measures of the tokens.

    Args:
        model: model without compression, in evaluation mode.
        processor: processor of the same checkpoint.
        pair: image, question and answer.
        batch_size: number of prompts per batch.
        seed: seed of the random measure.

    Returns:
        The decrease of the answer's log-likelihood without each token [N], and the importance measures [N] by name.
    """
    device = next(model.parameters()).device
    view = EncoderView(
        model.model,
        processor.pixel_values([pair.image]).to(device, model.dtype),
    )
    tokens_1NL = view.project(view.patch_features_IND)
    count = tokens_1NL.shape[1]
    decoder = ReducedDecoder(model, "image")
    all_positions_N = torch.arange(count, device=device)
    whole = _log_likelihood(decoder, processor, pair, tokens_1NL, all_positions_N[None])
    losses = []
    for start in range(0, count, batch_size):
        left_out = all_positions_N[start : start + batch_size]
        # The positions of all tokens but one, one row per token that is left out.
        others_BM = all_positions_N.expand(len(left_out), -1)[all_positions_N[None] != left_out[:, None]].view(
            len(left_out), count - 1
        )
        losses.append(whole - _log_likelihood(decoder, processor, pair, tokens_1NL, others_BM))
    text = encode_prompts(processor, [pair.prompt], None, device)
    maps = decoder.attention(
        text,
        VisualTokens(tokens_1NL, all_positions_N[None], torch.ones_like(all_positions_N[None])),
        list(range(decoder.num_layers)),
    )
    measures = {f"last word, layer {layer}": each[0, :, -1].mean(0) for layer, each in enumerate(maps)}
    measures |= {
        f"mean of words, layer {layer}": each[0][:, text.valid_BT[0]].mean((0, 1)) for layer, each in enumerate(maps)
    }
    measures["norm"] = torch.linalg.vector_norm(tokens_1NL[0].float(), dim=1)
    if model.model.feature_layer is not None:
        measures["vision tower"] = view.attention_IHN.sum(1)[0]
    found = {name: values.double().cpu().numpy() for name, values in measures.items()}
    found["random"] = np.random.default_rng(seed).random(count)
    return torch.cat(losses).double().cpu().numpy(), found


def validity(
    losses: Sequence[Floats], measures: Sequence[Mapping[str, Floats]], *, permutations: int = 1000, seed: int = 0
) -> dict[str, Validity]:
    """Computes the correlation, its significance and the share of the loss of each measure.

    Args:
        losses: losses of the tokens of each pair, in the row-major order of their grid.
        measures: importance measures of the tokens of the same pairs, by name.
        permutations: number of permutations of the test.
        seed: seed of the permutations.
    """
    rng = np.random.default_rng(seed)
    each: dict[str, list[float]] = {name: [] for name in measures[0]}
    chance = {name: np.zeros(permutations) for name in measures[0]}
    for loss_N, values in zip(losses, measures, strict=True):
        lost_N = _standardised(loss_N)
        # All measures share the permutations of a pair; the test of each measure remains valid.
        moved_RN = lost_N[shifted_positions(len(lost_N), permutations, rng)]
        for name, measure_N in values.items():
            ranks_N = _standardised(measure_N)
            each[name].append(float(lost_N @ ranks_N) / len(lost_N))
            chance[name] += moved_RN @ ranks_N / len(lost_N) / len(losses)
    observed = {name: float(np.mean(found)) for name, found in each.items()}
    p_values = [(1 + int(np.sum(np.abs(chance[name]) >= abs(observed[name])))) / (1 + permutations) for name in each]
    mass = {
        name: [_mass(loss_N, values[name]) for loss_N, values in zip(losses, measures, strict=True)] for name in each
    }
    return {
        name: Validity(mean_interval(each[name]), p_value, corrected, mean_interval(mass[name]))
        for name, p_value, corrected in zip(each, p_values, holm(p_values), strict=True)
    }


def shifted_positions(num_tokens: int, permutations: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draws random shifts with wrap-around and flips of the token grid: the source index of each position, [R, N].

    Raises:
        UserError: the number of tokens is not a square.
    """
    side = grid_side(num_tokens)
    rows_N, columns_N = np.divmod(np.arange(num_tokens), side)
    (down_R1, right_R1), (up_R1, left_R1) = (
        rng.integers(side, size=(2, permutations, 1)),
        rng.choice((-1, 1), size=(2, permutations, 1)),
    )
    positions_RN: NDArray[np.int64] = (up_R1 * rows_N + down_R1) % side * side + (left_R1 * columns_N + right_R1) % side
    return positions_RN


def _log_likelihood(
    decoder: ReducedDecoder,
    processor: ElasticProcessor,
    pair: Pair,
    tokens_1NL: torch.Tensor,
    positions_BM: torch.Tensor,
) -> torch.Tensor:
    """Computes the log-likelihood [B] of the answer and its end token, with the tokens at some positions only."""
    batch = len(positions_BM)
    prompts = encode_prompts(processor, [pair.prompt] * batch, [pair.answer] * batch, tokens_1NL.device)
    logits_BTV = decoder.logits(
        prompts, VisualTokens(tokens_1NL[0][positions_BM], positions_BM, torch.ones_like(positions_BM))
    ).float()
    logs_BT = logits_BTV[:, :-1].log_softmax(-1).gather(2, prompts.after_BT[:, 1:, None]).squeeze(2)
    return logs_BT.where((prompts.answer_BT & prompts.valid_BT)[:, 1:], 0.0).sum(1)


def _standardised(values_N: Floats) -> Floats:
    """Ranks with mean 0 and variance 1; zeros where all values are equal."""
    ranks = stats.rankdata(values_N)
    spread = ranks.std()
    return np.asarray((ranks - ranks.mean()) / spread if spread > 0 else np.zeros_like(ranks))


def _mass(loss_N: Floats, measure_N: Floats) -> float:
    positive = np.clip(loss_N, 0, None)
    total = positive.sum()
    top = np.argsort(-measure_N, kind="stable")[: max(1, round(0.11 * len(measure_N)))]
    return float(positive[top].sum() / total) if total > 0 else 0.11
