"""NLVR's consistency: the share of sentences whose images are all answered right (Suhr et al., ACL 2017)."""

from collections.abc import Iterable


def consistency(scores: Iterable[tuple[str, float]]) -> float:
    """Share of sentences with all their images right.

    Args:
        scores: (sentence, score of one of its images), in any order; a NaN is not right.

    Returns:
        0 to 1; NaN without scores.
    """
    right: dict[str, bool] = {}
    for sentence, value in scores:
        right[sentence] = right.get(sentence, True) and value == 1.0
    return sum(right.values()) / len(right) if right else float("nan")
