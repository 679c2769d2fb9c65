"""Coverage of the intervals by simulation: a small version of `parcelray bench intervals`."""

import json

import numpy as np
import pytest

from parcelray.bench.intervals import PROBABILITIES, Setting, _Simulation, bench_intervals, cluster_sizes, parse_model
from parcelray.errors import UserError

REPLICATES = 1000
# A coverage of 95 % over 1,000 replicates has a standard error of 0.7 points; 2 points are three of them.
TOLERANCE = 2.0


def _percent(kind: str, setting: Setting, model: str = "beta") -> float:
    simulation = _Simulation(setting, REPLICATES, parse_model(model), np.random.default_rng(0))
    return 100 * float(np.mean(getattr(simulation, kind)()))


@pytest.mark.parametrize("probability", PROBABILITIES)
@pytest.mark.parametrize(
    ("cluster_size", "correlation"), [(1.0, 0.0), (3.5, 0.1), (10.0, 0.5)], ids=["alone", "small clusters", "clusters"]
)
@pytest.mark.parametrize("kind", ["share", "partial", "consistency", "difference"])
def test_intervals_cover_the_truth(kind: str, cluster_size: float, correlation: float, probability: float) -> None:
    for samples in (100, 300):
        setting = Setting(samples, cluster_size, correlation, probability)
        assert _percent(kind, setting) > 93 - TOLERANCE


@pytest.mark.parametrize("model", ["beta", "copies"])
def test_true_nulls_are_rejected_at_the_level(model: str) -> None:
    # McNemar's test, which ignores clusters, rejects about 20 % with clusters of six.
    for correlation in (0.0, 0.1, 0.5):
        rejected = _percent("null", Setting(300, 6.0, correlation, 0.5), model)
        assert 5 - 1.5 * TOLERANCE < rejected < 5 + TOLERANCE


def test_clusters_are_sized_as_described() -> None:
    assert cluster_sizes(10, 1).tolist() == [1] * 10
    assert cluster_sizes(25, 10).tolist() == [10, 10, 5]
    assert cluster_sizes(25, 3.5).tolist() == [1, 2, 3, 4, 5, 6, 1, 2, 1]


def test_simulated_answers_have_the_probability_and_the_correlation() -> None:
    for model in ("beta", "copies"):
        simulation = _Simulation(Setting(100, 10.0, 0.5, 0.1), 4000, parse_model(model), np.random.default_rng(0))
        shares_RK = simulation._correct(0.1) / 10
        assert shares_RK.mean() == pytest.approx(0.1, abs=0.005)
        # Variance of the share of a cluster: p (1 - p) / 10 x (1 + 9 x 0.5).
        assert shares_RK.var() == pytest.approx(0.09 / 10 * 5.5, rel=0.05)


def test_the_bench_reports_every_kind() -> None:
    table = bench_intervals(100, samples=(30,))
    data = json.loads(json.dumps(table.to_dict()))
    assert len(data["measures"]) == 7 * 21
    assert {measure["unit"] for measure in data["measures"]} == {"%"}
    assert data["machine"]["replicates"] == 100
    with pytest.raises(UserError, match="--clusters is 'x'; choose one of beta, copies"):
        parse_model("x")
