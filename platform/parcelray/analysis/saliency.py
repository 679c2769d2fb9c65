"""Tests whether saliency depends on the prompt, and what else it depends on (arXiv 2504.17892, questions 3 and 4).

The visual tokens are ranked by attention. The rankings are compared between prompts about one image (with averaged
heads, and per head), between layers, and between heads. As a control, they are compared between images with the same
prompt: if these agree as well, the ranking depends on positions and not on the content. All intervals are t
intervals over images.

Shapes: I images, P prompts, L layers, H heads, N visual tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from parcelray.analysis.attention_maps import AttentionMaps, Floats
from parcelray.evaluation.scoring.intervals import Interval, mean_interval

_TOP = 0.11
"""Share of the tokens that are in the top set: 64 of 576."""


class Overlap(NamedTuple):
    """The agreement of rankings, averaged over pairs."""

    spearman: Interval
    jaccard: Interval
    """Jaccard index of the top 11 % of the tokens; by chance 0.058."""


class Agreement(NamedTuple):
    """The agreement of rankings, averaged over pairs, with Kendall's coefficient."""

    spearman: Interval
    kendall: Interval
    """Kendall's tau-b."""
    jaccard: Interval


@dataclass(frozen=True)
class SaliencyReport:
    """The results for one definition of saliency; sequences are by layer."""

    between_prompts: Sequence[Agreement]
    """Agreement between prompts about one image, with averaged heads."""
    by_head: Sequence[Sequence[Overlap]]
    """Agreement between prompts about one image, for each head of each layer."""
    between_images: Sequence[Agreement]
    """Control: agreement between images for the same prompt."""
    between_layers: Sequence[Sequence[Overlap]]
    """Agreement between each pair of layers, with averaged heads, for the same image and prompt."""
    between_heads: Sequence[Overlap]
    """Agreement between two heads of a layer, for the same image and prompt."""
    with_class_attention: Sequence[Interval]
    """Spearman correlation with the attention in the vision tower; empty if the tower has no attention."""
    drawn_by: Mapping[str, Sequence[Interval]]
    """Spearman correlation of the mean over the prompts with properties of the token and of its position."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON-serialisable data."""
        return {
            "between_prompts": [_as_dict(each) for each in self.between_prompts],
            "by_head": [[_as_dict(each) for each in heads] for heads in self.by_head],
            "between_images": [_as_dict(each) for each in self.between_images],
            "between_layers": [[_as_dict(each) for each in row] for row in self.between_layers],
            "between_heads": [_as_dict(each) for each in self.between_heads],
            "with_class_attention": [each._asdict() for each in self.with_class_attention],
            "drawn_by": {name: [each._asdict() for each in layers] for name, layers in self.drawn_by.items()},
        }


def saliency_reports(maps: AttentionMaps) -> dict[str, SaliencyReport]:
    """Compares the rankings by the attention of the last word, and by the mean over all words of the prompt.

    Args:
        maps: attention maps of at least two images with at least two prompts each.
    """
    return {
        "last word": saliency_report(maps.last_word_IPLHN, maps),
        "mean of words": saliency_report(maps.mean_word_IPLHN, maps),
    }


def saliency_report(attention_IPLHN: Floats, maps: AttentionMaps) -> SaliencyReport:
    """Compares the rankings of one definition of saliency.

    Args:
        attention_IPLHN: attention by which the tokens are ranked.
        maps: attention maps of the same images, for the properties of their tokens.
    """
    mean_IPLN = attention_IPLHN.mean(axis=3)
    num_prompts, num_layers, num_heads = attention_IPLHN.shape[1:4]
    layers, heads = range(num_layers), range(num_heads)
    averaged, single = _Ranked.of(mean_IPLN), _Ranked.of(attention_IPLHN)
    prompt_pairs = list(combinations(range(num_prompts), 2))
    head_pairs = list(combinations(heads, 2)) or [(0, 0)]
    by_head = _mean_overlap(
        [single.overlap(single, np.s_[:, first], np.s_[:, second]) for first, second in prompt_pairs]
    )
    between_heads = _mean_overlap(
        [single.overlap(single, np.s_[:, :, :, first], np.s_[:, :, :, second]) for first, second in head_pairs]
    )
    previous = np.roll(mean_IPLN, 1, axis=0)
    overall_ILN = mean_IPLN.mean(axis=1)
    return SaliencyReport(
        between_prompts=[
            _agree([(mean_IPLN[:, first, layer], mean_IPLN[:, second, layer]) for first, second in prompt_pairs])
            for layer in layers
        ],
        by_head=[[_overlap(by_head, np.s_[:, layer, head]) for head in heads] for layer in layers],
        between_images=[
            _agree([(mean_IPLN[:, prompt, layer], previous[:, prompt, layer]) for prompt in range(num_prompts)])
            for layer in layers
        ],
        between_layers=[
            [
                _overlap(averaged.overlap(averaged, np.s_[:, :, first], np.s_[:, :, second]), np.s_[:])
                for second in layers
            ]
            for first in layers
        ],
        between_heads=[_overlap(between_heads, np.s_[:, :, layer]) for layer in layers],
        with_class_attention=(
            []
            if maps.class_attention_IN is None
            else [_correlation(overall_ILN[:, layer], maps.class_attention_IN) for layer in layers]
        ),
        drawn_by={
            name: [_correlation(overall_ILN[:, layer], values_IN) for layer in layers]
            for name, values_IN in _properties(maps).items()
        },
    )


class _Ranked(NamedTuple):
    """Attention maps as standardised ranks, so that the correlation of any two is a mean of products."""

    ranks: Floats
    """Ranks with mean 0 and variance 1 over the tokens; zeros if all values are equal."""
    top: NDArray[np.bool_]
    """Whether the token is among the top 11 %."""

    @classmethod
    def of(cls, maps: Floats) -> "_Ranked":
        ranks = stats.rankdata(maps, axis=-1)
        centred = ranks - ranks.mean(axis=-1, keepdims=True)
        spread = ranks.std(axis=-1, keepdims=True)
        top = np.zeros(maps.shape, dtype=bool)
        np.put_along_axis(
            top, np.argsort(-maps, axis=-1, kind="stable")[..., : _top_count(maps.shape[-1])], True, axis=-1
        )
        return cls(np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 0).astype(np.float32), top)

    def overlap(self, other: "_Ranked", mine: Any, theirs: Any) -> tuple[Floats, Floats]:
        """Computes the Spearman correlation and the Jaccard index of selected maps, over the last axis."""
        shared = (self.top[mine] & other.top[theirs]).sum(axis=-1)
        either = 2 * _top_count(self.top.shape[-1]) - shared
        return (self.ranks[mine] * other.ranks[theirs]).mean(axis=-1), shared / either


def _top_count(count: int) -> int:
    return max(1, round(_TOP * count))


def _mean_overlap(pairs: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    spearman, jaccards = zip(*pairs, strict=True)
    return np.mean(spearman, axis=0), np.mean(jaccards, axis=0)


def _overlap(measured: tuple[Floats, Floats], where: Any) -> Overlap:
    """Averages over all axes but the images, with intervals over images."""
    spearman, jaccards = (each[where].reshape(len(each), -1).mean(axis=1).tolist() for each in measured)
    return Overlap(_over_images(spearman), _over_images(jaccards))


def jaccard(first_N: Floats, second_N: Floats, share: float = _TOP) -> float:
    """Computes the Jaccard index (intersection over union) of the tokens with the highest values."""
    count = max(1, round(share * len(first_N)))
    a, b = (set(np.argsort(-values, kind="stable")[:count].tolist()) for values in (first_N, second_N))
    return len(a & b) / len(a | b)


def _properties(maps: AttentionMaps) -> dict[str, Floats]:
    """Token properties that could attract attention independently of the prompt: [I, N] each."""
    images, count, _ = maps.tokens_INW.shape
    rows, columns = np.divmod(np.arange(count), maps.grid_size)
    middle = (maps.grid_size - 1) / 2
    # The largest deviation of a token's channel from that channel's mean, in standard deviations over the image.
    scores = (maps.tokens_INW - maps.tokens_INW.mean(axis=1, keepdims=True)) / (
        maps.tokens_INW.std(axis=1, keepdims=True) + 1e-9
    )
    positions = {"row": rows, "column": columns, "distance to the middle": np.hypot(rows - middle, columns - middle)}
    return {
        "norm": np.linalg.norm(maps.tokens_INW, axis=2),
        "outlier channel": np.abs(scores).max(axis=2),
        "difference from the mean token": np.linalg.norm(
            maps.tokens_INW - maps.tokens_INW.mean(axis=1, keepdims=True), axis=2
        ),
        "contrast of the pixels": maps.contrast_IN,
        **{name: np.broadcast_to(values, (images, count)).astype(np.float32) for name, values in positions.items()},
    }


def _agree(pairs: Sequence[tuple[Floats, Floats]]) -> Agreement:
    """Averages the agreement over pairs of maps [I, N] of each image, with intervals over images."""
    images = range(len(pairs[0][0]))
    return Agreement(
        _over_images([float(np.mean([_spearman(a[image], b[image]) for a, b in pairs])) for image in images]),
        _over_images(
            [float(np.mean([stats.kendalltau(a[image], b[image]).statistic for a, b in pairs])) for image in images]
        ),
        _over_images([float(np.mean([jaccard(a[image], b[image]) for a, b in pairs])) for image in images]),
    )


def _correlation(first_IN: Floats, second_IN: Floats) -> Interval:
    return _over_images([_spearman(a, b) for a, b in zip(first_IN, second_IN, strict=True)])


def _spearman(first_N: Floats, second_N: Floats) -> float:
    # The correlation with constant values is undefined; it counts as 0.
    if np.ptp(first_N) == 0 or np.ptp(second_N) == 0:
        return 0.0
    return float(stats.spearmanr(first_N, second_N).statistic)


def _over_images(values: Sequence[float]) -> Interval:
    return mean_interval(values)


def _as_dict(agreement: Agreement | Overlap) -> dict[str, Any]:
    return {name: interval._asdict() for name, interval in agreement._asdict().items()}
