"""Does saliency follow the prompt, and if not, what does it follow? After arXiv 2504.17892, questions 3 and 4.

Rankings of the visual tokens by attention are compared between prompts about one image, between layers and between heads; as a control, between
different images under one prompt: where that agrees, too, the ranking is of places and not of what is seen. All intervals are bootstraps over
images.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from parcelray.analysis.attention_maps import AttentionMaps, Floats
from parcelray.evaluation.intervals import Interval, bootstrap_mean

_TOP = 0.11
"""Share of the tokens whose overlap is counted: 64 of 576."""


class Agreement(NamedTuple):
    """How alike rankings are, means over pairs."""

    spearman: Interval
    kendall: Interval
    """Tau-b."""
    jaccard: Interval
    """Of the top 11 % of the tokens; by chance 0.058."""


@dataclass(frozen=True)
class SaliencyReport:
    """What was found; by layer where a sequence."""

    between_prompts: Sequence[Agreement]
    between_images: Sequence[Agreement]
    """The control: the same prompt, another image."""
    between_layers: NDArray[np.float64]
    """Jaccard [L, L] of the top tokens, mean over images and prompts."""
    between_heads: Sequence[Interval]
    """Jaccard of the top tokens of two heads of a layer."""
    with_class_attention: Sequence[Interval]
    """Spearman with what the vision tower looks at; empty without attention there."""
    drawn_by: Mapping[str, Sequence[Interval]]
    """Spearman of the mean over the prompts with properties of the token and of its place."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "between_prompts": [_agreement(each) for each in self.between_prompts],
            "between_images": [_agreement(each) for each in self.between_images],
            "between_layers": self.between_layers.tolist(),
            "between_heads": [each._asdict() for each in self.between_heads],
            "with_class_attention": [each._asdict() for each in self.with_class_attention],
            "drawn_by": {name: [each._asdict() for each in layers] for name, layers in self.drawn_by.items()},
        }


def saliency_report(maps: AttentionMaps) -> SaliencyReport:
    """Compares the rankings of the last word's attention, heads averaged.

    Args:
        maps: of at least two images with at least two prompts each.
    """
    layers_IPLN = maps.last_word_IPLHN.mean(axis=3)
    images, prompts, num_layers = layers_IPLN.shape[:3]
    layers = range(num_layers)
    drawn_by = {name: [_correlation(layers_IPLN[:, :, layer].mean(axis=1), values_IN) for layer in layers] for name, values_IN in _properties(maps).items()}
    return SaliencyReport(
        between_prompts=[_agree([list(_pairs(layers_IPLN[image, :, layer])) for image in range(images)]) for layer in layers],
        between_images=[
            _agree([[(layers_IPLN[image, prompt, layer], layers_IPLN[image - 1, prompt, layer]) for prompt in range(prompts)] for image in range(images)])
            for layer in layers
        ],
        between_layers=np.array([[_mean_jaccard(layers_IPLN[:, :, first], layers_IPLN[:, :, second]) for second in layers] for first in layers]),
        between_heads=[
            _over_images(
                [
                    float(np.mean([jaccard(a, b) for prompt in range(prompts) for a, b in _pairs(maps.last_word_IPLHN[image, prompt, layer])] or [1.0]))
                    for image in range(images)
                ]
            )
            for layer in layers
        ],
        with_class_attention=[]
        if maps.class_attention_IN is None
        else [_correlation(layers_IPLN[:, :, layer].mean(axis=1), maps.class_attention_IN) for layer in layers],
        drawn_by=drawn_by,
    )


def jaccard(first_N: Floats, second_N: Floats, share: float = _TOP) -> float:
    """Overlap of the highest values of two rankings: intersection over union of the sets."""
    count = max(1, round(share * len(first_N)))
    a, b = (set(np.argsort(-values, kind="stable")[:count].tolist()) for values in (first_N, second_N))
    return len(a & b) / len(a | b)


def _properties(maps: AttentionMaps) -> dict[str, Floats]:
    """What could draw attention whatever the prompt: [I, N] each."""
    images, count, _ = maps.tokens_INW.shape
    rows, columns = np.divmod(np.arange(count), maps.grid_size)
    middle = (maps.grid_size - 1) / 2
    # How far a token's most unusual channel is from that channel's mean, in standard deviations over the image.
    scores = (maps.tokens_INW - maps.tokens_INW.mean(axis=1, keepdims=True)) / (maps.tokens_INW.std(axis=1, keepdims=True) + 1e-9)
    places = {"row": rows, "column": columns, "distance to the middle": np.hypot(rows - middle, columns - middle)}
    return {
        "norm": np.linalg.norm(maps.tokens_INW, axis=2),
        "outlier channel": np.abs(scores).max(axis=2),
        "difference from the mean token": np.linalg.norm(maps.tokens_INW - maps.tokens_INW.mean(axis=1, keepdims=True), axis=2),
        "contrast of the pixels": maps.contrast_IN,
        **{name: np.broadcast_to(values, (images, count)).astype(np.float32) for name, values in places.items()},
    }


def _pairs(maps_PN: Floats) -> Iterator[tuple[Floats, Floats]]:
    return combinations(maps_PN, 2)


def _agree(pairs: Sequence[Sequence[tuple[Floats, Floats]]]) -> Agreement:
    """Means over the pairs of each image, with intervals over images."""
    return Agreement(
        _over_images([float(np.mean([_spearman(a, b) for a, b in each])) for each in pairs]),
        _over_images([float(np.mean([stats.kendalltau(a, b).statistic for a, b in each])) for each in pairs]),
        _over_images([float(np.mean([jaccard(a, b) for a, b in each])) for each in pairs]),
    )


def _correlation(first_IN: Floats, second_IN: Floats) -> Interval:
    return _over_images([_spearman(a, b) for a, b in zip(first_IN, second_IN, strict=True)])


def _spearman(first_N: Floats, second_N: Floats) -> float:
    # A ranking of equal values says nothing.
    if np.ptp(first_N) == 0 or np.ptp(second_N) == 0:
        return 0.0
    return float(stats.spearmanr(first_N, second_N).statistic)


def _mean_jaccard(first_IPN: Floats, second_IPN: Floats) -> float:
    pairs = zip(first_IPN.reshape(-1, first_IPN.shape[-1]), second_IPN.reshape(-1, second_IPN.shape[-1]), strict=True)
    return float(np.mean([jaccard(a, b) for a, b in pairs]))


def _over_images(values: Sequence[float]) -> Interval:
    return bootstrap_mean(list(values), [str(index) for index in range(len(values))])


def _agreement(agreement: Agreement) -> dict[str, Any]:
    return {name: interval._asdict() for name, interval in agreement._asdict().items()}
