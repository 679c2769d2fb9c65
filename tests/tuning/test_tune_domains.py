"""Ray Tune draws from a search space what the space itself could draw."""

import numpy as np

from parcelray.config.search_space import SearchSpace
from parcelray.tuning.search_space import assignment_of, tune_domains


def test_tune_draws_the_whole_range_and_nothing_else() -> None:
    space = SearchSpace.model_validate(
        {
            "kind": "search_space",
            "name": "s",
            "job": "j.yaml",
            "parameters": {
                "a": {"type": "choice", "values": [[1], [2]]},
                "b": {"type": "integer", "low": 2, "high": 4, "when": {"a": [[1]]}},
                "c": {"type": "integer", "low": 4, "high": 10, "step": 3},
                "d": {"type": "integer", "low": 1, "high": 3, "log": True},
                "e": {"type": "real", "low": 0.5, "high": 1.5},
                "f": {"type": "real", "low": 1e-3, "high": 1.0, "log": True},
            },
        }
    )
    domains = tune_domains(space)
    drawn = {name: domain.sample(size=400, random_state=0) for name, domain in domains.items()}
    assert {tuple(value) for value in drawn["a"]} == {(1,), (2,)}
    assert set(drawn["b"]) == {2, 3, 4}
    assert set(drawn["d"]) == {1, 2, 3}
    assert all(0.5 <= value <= 1.5 for value in drawn["e"])
    assert all(1e-3 <= value <= 1 for value in drawn["f"])
    assert float(np.median(drawn["f"])) < 0.1
    trial = {name: values[0] for name, values in drawn.items()}
    assert ("b" in assignment_of(space, trial | {"a": [1]}), "b" in assignment_of(space, trial | {"a": [2]})) == (True, False)
