"""Failure signs of training-free reduction, said in sentences (arXiv 2504.17892 and its critics: what to look at before a method is believed)."""

from collections.abc import Iterator, Mapping, Sequence

from parcelray.evaluation.scoring.aggregate import Frontier
from parcelray.studies.reduction.breaks import READS_TEXT, FinePoint
from parcelray.studies.reduction.comparisons import Against

_SMALL, _BROKEN = 0.05, 50.0
"""Share of the tokens, and percent of the full score below which text is said to have dropped sharply."""
_SEEING = 0.8
"""Share of the full score from which on a blind model is said to be close to it."""
_WIDE = 2.0
"""Standard deviation of random sampling over its seeds, points."""
_LEVEL = 0.05


def failure_signs(
    frontier: Frontier,
    fine: Sequence[FinePoint],
    against_spatial: Sequence[Against],
    saliency: Sequence[str],
    spreads: Mapping[tuple[str, int], float],
) -> list[str]:
    """What speaks against the methods or the experiment; empty: none of the known signs.

    Args:
        frontier: of all methods, with the blind model and the full one.
        fine: retention by kind of questions.
        against_spatial: each method against spatial sampling.
        saliency: names of the methods that select by attention.
        spreads: standard deviation over seeds by random baseline and budget, points.
    """
    return [
        *_blind_is_close(frontier),
        *_text_drops(frontier, fine),
        *_losers_to_spatial(against_spatial, saliency),
        *_wide_spreads(spreads),
    ]


def _blind_is_close(frontier: Frontier) -> Iterator[str]:
    full = next(point for point in frontier.points if point.method == frontier.reference)
    blind = next((point for point in frontier.points if not point.num_visual_tokens), None)
    for family, score in full.families.items() if blind is not None else ():
        guessed = blind.families.get(family) if blind is not None else None
        if guessed is not None and guessed.value >= _SEEING * score.value:
            yield (
                f"{family} measures language more than vision: without any image the model scores {guessed.value:.1f},"
                f" with all tokens {score.value:.1f}."
            )


def _text_drops(frontier: Frontier, fine: Sequence[FinePoint]) -> Iterator[str]:
    full = next(point.num_visual_tokens for point in frontier.points if point.method == frontier.reference)
    for kind in READS_TEXT:
        points = [
            point for point in fine if point.kind == kind and point.num_visual_tokens <= max(1, round(_SMALL * full))
        ]
        dropped = [point.method for point in points if point.retention.value < _BROKEN]
        if dropped:
            share = f"{len(dropped)} of {len(points)} methods"
            yield (
                f"At {_SMALL:.0%} of the tokens {kind} falls below half of its full score under {share}:"
                f" {'; '.join(dropped)}."
            )


def _losers_to_spatial(against_spatial: Sequence[Against], saliency: Sequence[str]) -> Iterator[str]:
    for each in against_spatial:
        if each.method in saliency and each.difference.value < 0 and each.p_holm < _LEVEL:
            gap, p_value = -each.difference.value, each.p_holm
            yield (
                f"{each.method} loses to spatial sampling at {each.num_visual_tokens} tokens by {gap:.1f} points (p ="
                f" {p_value:.3f}, corrected)."
            )


def _wide_spreads(spreads: Mapping[tuple[str, int], float]) -> Iterator[str]:
    for (name, budget), spread in spreads.items():
        if spread > _WIDE:
            yield (
                f"{name} at {budget} tokens varies by {spread:.1f} points (standard deviation) over its seeds: one seed"
                " says little."
            )


def describe(signs: Sequence[str]) -> str:
    """For people."""
    return (
        "Failure signs:\n" + "\n".join(f"- {sign}" for sign in signs)
        if signs
        else "Failure signs: none of those that are looked for."
    )
