"""`parcelray plan` and the dry run with a named GPU."""

import json
from typing import Any

import pytest

MINI = ("--set", "tracking.uri=null")


@pytest.mark.nightly
def test_plan_of_a_training(run: Any) -> None:
    arguments = ("plan", "jobs/train/quickstart.yaml", *MINI, "--rows", "40", "--set", "budget.budgets=[16,256]")
    found = run(*arguments, "--json")
    assert found.code == 0, found.err
    plan = json.loads(found.out)
    (data,) = plan["data"]
    small, large = data["budgets"]
    assert (small["budget"], large["budget"]) == (16, 256)
    for each in (small, large):
        for name in ("visual", "text", "total"):
            assert sum(rows for _, _, rows in each[name]) == data["rows_read"]
    first, *_ = data["longest"]
    text = first["num_prompt_tokens"] + first["num_answer_tokens"]
    assert large["longest"] == first["num_images"] * 256 + text
    assert plan["memory"][0]["above_bytes"] < plan["memory"][1]["above_bytes"]
    assert plan["memory"][0]["fits"] > plan["memory"][1]["fits"] > 0
    assert plan["largest_budget"] == 256
    tight = json.loads(run(*arguments, "--json", "--memory-gib", "0.01").out)
    assert tight["largest_budget"] is None


def test_plan_of_an_evaluation(run: Any) -> None:
    found = run("plan", "jobs/evaluate/mini.yaml", *MINI, "--rows", "5")
    assert found.code == 0, found.err
    assert "blind" in found.out
    assert "largest budget that fits: 256" in found.out


def test_plan_of_an_endpoint(run: Any) -> None:
    found = run("plan", "jobs/serve/mini.yaml", *MINI, "--set", "engine.kv_tokens=1024", "--json")
    assert found.code == 0, found.err
    plan = json.loads(found.out)
    assert [each["fits"] for each in plan["memory"]] == sorted((each["fits"] for each in plan["memory"]), reverse=True)
    assert "requests with more are refused" in plan["notes"][0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan", "jobs/promote/mini.yaml"), ("kind is promote", "train, evaluate and serve")),
        (("plan", "jobs/serve/mini.yaml", *MINI, "--gpu", "h1000"), ("h1000", "legal", "h100")),
    ],
)
def test_a_plan_that_is_not_possible(run: Any, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    found = run(*arguments)
    assert found.code == 2
    for word in words:
        assert word in found.err


@pytest.mark.nightly
def test_gpu_hours_of_a_named_gpu(run: Any) -> None:
    arguments = ("train", "jobs/train/quickstart.yaml", "--dry-run", *MINI, "--set", "budget.budgets=[16]", "--json")
    plans = {name: json.loads(run(*arguments, "--gpu", name).out) for name in ("l4", "h100")}
    assert plans["l4"]["gpu_hours"] > plans["h100"]["gpu_hours"] > 0
    assert plans["l4"]["peak_bytes"] > plans["l4"]["state_bytes"]
