"""Rules for all configuration models: frozen, no unknown keys, bounded, documented, and exportable as a JSON schema."""

import json
import math
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from parcelray.config.base import StrictModel
from parcelray.config.connector import ParcelConnectorConfig, RouteConfig
from parcelray.config.model import MiniModelConfig
from parcelray.config.train import BudgetConfig, BudgetRange, ScalingConfig, TrainJob

BUDGETS: TypeAdapter[BudgetConfig] = TypeAdapter(BudgetConfig)


def _all_models(root: type[StrictModel] = StrictModel) -> list[type[StrictModel]]:
    return [
        model
        for child in root.__subclasses__()
        for model in (child, *_all_models(child))
        if model.__module__.startswith("parcelray.config")
    ]


def test_models_are_frozen_reject_unknown_keys_and_document_their_fields() -> None:
    models = _all_models()
    assert TrainJob in models
    assert [model.__name__ for model in models if not model.model_config["frozen"]] == []
    assert [model.__name__ for model in models if model.model_config["extra"] != "forbid"] == []
    fields = {f"{model.__name__}.{name}": field for model in models for name, field in model.model_fields.items()}
    undocumented = [name for name, field in fields.items() if not name.endswith(".type") and not field.description]
    assert undocumented == []


def test_assigning_to_a_model_fails() -> None:
    config = BudgetRange(start=16, stop=64)
    with pytest.raises(ValidationError, match="frozen"):
        config.stop = 128  # type: ignore[misc]


def test_the_schema_contains_every_key_and_bound() -> None:
    schema = json.loads(json.dumps(TrainJob.model_json_schema()))
    assert set(schema["properties"]) == set(TrainJob.model_fields)
    assert schema["required"] == ["kind", "name", "data", "training"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["data"]["discriminator"]["propertyName"] == "type"
    assert schema["$defs"]["TrainingConfig"]["properties"]["steps"]["minimum"] == 1


def test_a_dumped_job_loads_as_the_same_job() -> None:
    job = TrainJob.model_validate(
        {
            "kind": "train",
            "name": "x",
            "connector": {"type": "parcel", "routing": [{"min_budget": 16, "max_budget": 64, "anchor_grid": 2}]},
            "data": {"type": "nlvr", "path": "somewhere"},
            "budget": {"type": "weighted", "budgets": [16, 64], "weights": [1, 2.5]},
            "optimizer": {"type": "sgd", "momentum": 0.5},
            "training": {"steps": 3},
            "scaling": {"num_workers": [1, 2]},
        }
    )
    assert TrainJob.model_validate(json.loads(job.model_dump_json())) == job


@pytest.mark.parametrize(
    ("config", "values"),
    [
        ({"type": "uniform"}, tuple(range(16, 257, 2))),
        ({"type": "uniform", "budgets": {"start": 4, "stop": 9, "step": 3}}, (4, 7)),
        ({"type": "sandwich", "budgets": [64, 16, 40]}, (16, 40, 64)),
        ({"type": "weighted", "budgets": [16, 64], "weights": [3, 1]}, (16, 64)),
    ],
)
def test_budgets_are_sorted_in_ascending_order(config: dict[str, Any], values: tuple[int, ...]) -> None:
    assert BUDGETS.validate_python(config).values() == values


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -1], [1, 2, 3], [1, math.nan], [1, math.inf]])
def test_weights_must_be_positive_and_one_per_budget(weights: list[float]) -> None:
    with pytest.raises(ValidationError, match="give one positive weight per budget"):
        BUDGETS.validate_python({"type": "weighted", "budgets": [16, 64], "weights": weights})


def test_a_route_rejects_budgets_below_its_number_of_anchors() -> None:
    assert (
        ParcelConnectorConfig(routing=(RouteConfig(min_budget=16, max_budget=32, anchor_grid=4),)).routing is not None
    )
    with pytest.raises(ValidationError, match="min_budget 15 is smaller than the 16 anchors of a 4 x 4 grid"):
        RouteConfig(min_budget=15, max_budget=32, anchor_grid=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 5}, "image_size 64 is not a multiple of patch_size 5"),
        ({"vision_heads": 5}, "vision_width 96 is not a multiple of vision_heads 5"),
        ({"text_kv_heads": 3}, "text_heads 4 is not a multiple of text_kv_heads 3"),
    ],
)
def test_inconsistent_mini_model_dimensions_are_rejected(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MiniModelConfig.model_validate(changes)


@pytest.mark.parametrize(("workers", "bounds"), [(0, (0, 0)), (3, (3, 3)), ([1, 4], (1, 4))])
def test_worker_counts_give_smallest_and_largest_count(workers: object, bounds: tuple[int, int]) -> None:
    assert ScalingConfig.model_validate({"num_workers": workers}).bounds == bounds


@pytest.mark.parametrize("workers", [-1, [0, 2], [2, 1]])
def test_invalid_worker_counts_are_rejected(workers: object) -> None:
    with pytest.raises(ValidationError, match="is not a worker count"):
        ScalingConfig.model_validate({"num_workers": workers})
