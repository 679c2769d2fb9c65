"""What a member of a population tries after it has taken over a better one's model: a point near that one's, inside the space."""

import random
from typing import Any

from parcelray.config.search_space import Assignment, ChoiceDomain, Domain, IntegerDomain, SearchSpace

RESAMPLE = 0.25
"""Probability that a parameter is drawn anew instead of changed a little (Jaderberg et al., 2017, as in Ray Tune)."""
FACTORS = (0.8, 1.2)
_TRIES = 200


def explore(space: SearchSpace, assignment: Assignment, rng: random.Random) -> Assignment:
    """A legal point near another: a neighbour in a list of values, numbers scaled and kept in their range.

    A parameter that becomes active with the new values is drawn. Where no try keeps the constraints, the point stays as
    it is.

    Args:
        space: the space.
        assignment: the point to start from.
        rng: of the draws.
    """
    for _ in range(_TRIES):
        moved = {
            name: (
                _move(domain, assignment[name], rng)
                if name in assignment and rng.random() >= RESAMPLE
                else domain.draw(rng)
            )
            for name, domain in space.parameters.items()
        }
        found = space.active(moved)
        if space.allows(found):
            return found
    return dict(assignment)


def _move(domain: Domain, value: Any, rng: random.Random) -> Any:
    if isinstance(domain, ChoiceDomain):
        place = domain.values.index(value) + rng.choice((-1, 1))
        return domain.values[min(max(place, 0), len(domain.values) - 1)]
    factor = rng.choice(FACTORS)
    if isinstance(domain, IntegerDomain):
        # At least one step away, or small numbers would never move.
        steps = max(1, round(abs(value * factor - value) / domain.step))
        moved = value + (steps if factor > 1 else -steps) * domain.step
        return min(max(moved, domain.low), domain.steps[-1])
    return min(max(value * factor, domain.low), domain.high)
