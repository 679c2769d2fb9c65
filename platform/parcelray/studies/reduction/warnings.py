"""Warnings about the methods or the experiment of the reduction study, each in one sentence.

They are known signs that a result of a training-free method is not reliable (arXiv 2504.17892 and its critics).
"""

from collections.abc import Iterator, Mapping, Sequence

from parcelray.evaluation.scoring.aggregate import Frontier
from parcelray.studies.reduction.breakpoints import READS_TEXT, FinePoint
from parcelray.studies.reduction.comparisons import PairwiseResult

_FEW_TOKENS = 0.05
"""Share of the tokens at which the retention of text is checked."""
_TEXT_RETENTION = 50.0
"""Retention of text at that share below which a method gets a warning, percent."""
_BLIND_SHARE = 0.8
"""Share of the full score from which on the score of the blind model gets a warning."""
_MAX_SPREAD = 2.0
"""Standard deviation of random sampling over its seeds above which there is a warning, points."""
_LEVEL = 0.05
"""Significance level of the corrected p-values."""


def warnings_of(
    frontier: Frontier,
    fine: Sequence[FinePoint],
    against_spatial: Sequence[PairwiseResult],
    saliency: Sequence[str],
    spreads: Mapping[tuple[str, int], float],
) -> list[str]:
    """Returns the warnings about the methods or the experiment; empty if no check fails.

    Args:
        frontier: frontier of all methods, with the blind and the full model.
        fine: retention by kind of question.
        against_spatial: tests of each method against spatial sampling.
        saliency: names of the methods that select tokens by attention.
        spreads: standard deviation over seeds by random baseline and budget, points.
    """
    return [
        *_blind_is_close(frontier),
        *_text_drops(frontier, fine),
        *_worse_than_spatial(against_spatial, saliency),
        *_wide_spreads(spreads),
    ]


def _blind_is_close(frontier: Frontier) -> Iterator[str]:
    full = next(point for point in frontier.points if point.method == frontier.reference)
    blind = next((point for point in frontier.points if not point.num_visual_tokens), None)
    for family, score in full.families.items() if blind is not None else ():
        guessed = blind.families.get(family) if blind is not None else None
        if guessed is not None and guessed.value >= _BLIND_SHARE * score.value:
            yield (
                f"{family} measures language more than vision: without any image the model scores {guessed.value:.1f},"
                f" with all tokens {score.value:.1f}."
            )


def _text_drops(frontier: Frontier, fine: Sequence[FinePoint]) -> Iterator[str]:
    full = next(point.num_visual_tokens for point in frontier.points if point.method == frontier.reference)
    for kind in READS_TEXT:
        points = [
            point
            for point in fine
            if point.kind == kind and point.num_visual_tokens <= max(1, round(_FEW_TOKENS * full))
        ]
        dropped = [point.method for point in points if point.retention.value < _TEXT_RETENTION]
        if dropped:
            share = f"{len(dropped)} of {len(points)} methods"
            yield (
                f"At {_FEW_TOKENS:.0%} of the tokens {kind} falls below half of its full score under {share}:"
                f" {'; '.join(dropped)}."
            )


def _worse_than_spatial(against_spatial: Sequence[PairwiseResult], saliency: Sequence[str]) -> Iterator[str]:
    for each in against_spatial:
        if each.method in saliency and each.difference.value < 0 and each.p_holm < _LEVEL:
            gap, p_value = -each.difference.value, each.p_holm
            yield (
                f"{each.method} is worse than spatial sampling at {each.num_visual_tokens} tokens by {gap:.1f} points"
                f" (corrected p = {p_value:.3f})."
            )


def _wide_spreads(spreads: Mapping[tuple[str, int], float]) -> Iterator[str]:
    for (name, budget), spread in spreads.items():
        if spread > _MAX_SPREAD:
            yield (
                f"{name} at {budget} tokens varies by {spread:.1f} points (standard deviation) over its seeds; do not"
                " rely on a single seed."
            )


def describe(warnings: Sequence[str]) -> str:
    """Returns the warnings as a list with a heading, or a sentence that there are none."""
    return (
        "Warnings:\n" + "\n".join(f"- {warning}" for warning in warnings)
        if warnings
        else "Warnings: none; all checks passed."
    )
