"""NLVR's consistency: the share of sentences whose images are all answered right (Suhr et al., ACL 2017)."""

from collections.abc import Iterable


def consistency(scores: Iterable[tuple[str, float]]) -> float:
    """Share of sentences with all their images right.

    Args:
        scores: (sentence, score of one of its images), in any order.

    Returns:
        0 to 1; NaN without scores.
    """
    worst: dict[str, float] = {}
    for sentence, value in scores:
        worst[sentence] = min(value, worst.get(sentence, 1.0))
    return sum(value == 1.0 for value in worst.values()) / len(worst) if worst else float("nan")
