"""The supernet is trained for the splits at which the search evaluates it."""

from pathlib import Path

import pytest

from parcelray.config.loader import load_job_of
from parcelray.config.space_checks import load_search_space
from parcelray.config.train import TrainJob, WeightedBudgets
from parcelray.models.connectors import build_connector
from parcelray.training.budget_sampling import BudgetSampler

ROOT = Path(__file__).resolve().parents[2]


def test_every_split_of_the_space_is_equally_likely_and_is_trained() -> None:
    job = load_job_of(TrainJob, ROOT / "jobs" / "train" / "supernet.yaml")
    budget = job.budget
    assert isinstance(budget, WeightedBudgets)
    assert budget.anchor_grids is not None
    shares: dict[tuple[int, int], float] = {}
    for tokens, weight in zip(budget.values(), budget.weights, strict=True):
        fitting = [side for side in budget.anchor_grids if side * side <= tokens]
        shares |= {(side, tokens): weight / sum(budget.weights) / len(fitting) for side in fitting}
    splits = {
        (point["anchor_grid"], point["budgets"][0])
        for point in load_search_space(ROOT / "search_spaces" / "anchor_query_split.yaml").grid()
    }
    assert shares == {split: pytest.approx(1 / 63) for split in splits}
    assert job.connector is not None
    connector = build_connector(job.connector, hidden_size=24, grid_size=16, mlp_width=32)
    sampler = BudgetSampler(budget, job.seed, connector)
    drawn = [
        (sampler.anchor_grid(step, 0, tokens), tokens)
        for step in range(job.training.steps)
        for tokens in sampler.budgets(step)
    ]
    assert {drawn.count(split) > 0 for split in ((4, 16), (8, 64), (16, 256))} == {True}, (
        "including splits of anchors only"
    )
