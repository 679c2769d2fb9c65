"""Failure signs of training-free reduction, said in sentences (arXiv 2504.17892 and its critics: what to look at before a method is believed)."""

from collections.abc import Iterator, Mapping, Sequence

from parcelray.cluster.reduction_methods import METHODS
from parcelray.evaluation.aggregate import Frontier, difference
from parcelray.evaluation.paired import two_sided
from parcelray.evaluation.summary import Summary

_TEXT_FAMILIES = ("resolution",)
_SMALL, _BROKEN = 0.05, 0.5
"""Share of the tokens, and of the full score below which text is said to have dropped sharply."""
_WIDE = 2.0
"""Standard deviation of random sampling over its seeds, points."""
_LEVEL = 0.05
_SALIENCY = ("attention of the vision tower", "attention of the decoder")


def failure_signs(found: Mapping[str, Summary], frontier: Frontier, full: int, spreads: Mapping[tuple[str, int], float]) -> list[str]:
    """What speaks against the methods or the experiment; empty: none of the known signs.

    Args:
        found: the evaluation of each method.
        frontier: of all of them.
        full: all tokens.
        spreads: standard deviation over seeds by random baseline and budget, points.
    """
    return [*_text_drops(frontier, full), *_losers_to_spatial(found), *_wide_spreads(spreads)]


def _text_drops(frontier: Frontier, full: int) -> Iterator[str]:
    reference = next(point for point in frontier.points if point.method == frontier.reference)
    for family in _TEXT_FAMILIES:
        base = reference.families.get(family)
        points = [point for point in frontier.points if 0 < point.num_visual_tokens <= max(1, round(_SMALL * full)) and family in point.families]
        dropped = [point.method for point in points if base is not None and base.value > 0 and point.families[family].value < _BROKEN * base.value]
        if dropped:
            share = f"{len(dropped)} of {len(points)} methods"
            yield f"At {_SMALL:.0%} of the tokens {family} falls below half of its full score under {share}: {', '.join(dropped)}."


def _losers_to_spatial(found: Mapping[str, Summary]) -> Iterator[str]:
    spatial = found.get("spatial")
    if spatial is None:
        return
    for name, summary in found.items():
        if METHODS[name].group not in _SALIENCY:
            continue
        for budget in sorted(set(summary.budgets) & set(spatial.budgets)):
            gap = difference(summary.mean_score(budget), spatial.mean_score(budget))
            if gap.value < 0 and two_sided(gap) < _LEVEL:
                yield f"{name} loses to spatial sampling at {budget} tokens by {-gap.value:.1f} points (p = {two_sided(gap):.3f})."


def _wide_spreads(spreads: Mapping[tuple[str, int], float]) -> Iterator[str]:
    for (name, budget), spread in spreads.items():
        if spread > _WIDE:
            yield f"{name} at {budget} tokens varies by {spread:.1f} points (standard deviation) over its seeds: one seed says little."


def describe(signs: Sequence[str]) -> str:
    """For people."""
    return "Failure signs:\n" + "\n".join(f"- {sign}" for sign in signs) if signs else "Failure signs: none of those that are looked for."
