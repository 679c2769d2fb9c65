"""A pipeline with a confirmed search, submitted to three hosts without a shared disk."""

import shlex

import pytest

from ..hosts import MLFLOW_URL, PROJECT, RUNS, Hosts

pytestmark = [pytest.mark.ray, pytest.mark.nightly, pytest.mark.timeout(3600)]

_BENCHMARKS = "[{name: mini, source: {split: validation, samples: 1}, max_new_tokens: 4}]"
SETTINGS = (
    f"storage={RUNS}",
    f"tracking.uri={MLFLOW_URL}",
    "scaling.num_workers=1",
    "training.steps=2",
    "training.images_per_step=8",
    "validation.samples=1",
    "splits.space.parameters.anchor_grid={type: choice, values: [0, 2, 4]}",
    "splits.space.parameters.budgets={type: choice, values: [[64]]}",
    "splits.adaptive=null",
    f"splits.base.benchmarks={_BENCHMARKS}",
    "splits.base.compute={actors: 1, rows_per_shard: 8}",
    "splits.confirm.job.training.steps=2",
    "splits.confirm.job.training.images_per_step=8",
    "splits.confirm.job.validation.samples=1",
    "splits.confirm.best=2",
    f"clusters.base.benchmarks={_BENCHMARKS}",
    "clusters.base.compute={actors: 1, rows_per_shard: 8}",
    "clusters.algorithm={type: optuna, trials: 2, startup_trials: 1, batch: 1}",
)
_STORED = """
    import json, sys, fsspec
    filesystem, path = fsspec.core.url_to_fs(sys.argv[1])
    print(json.dumps({
        "results": json.loads(filesystem.cat_file(f"{path}/anchor_query_split/results.json")),
        "confirmation": json.loads(filesystem.cat_file(f"{path}/anchor_query_split/confirmation.json")),
        "clusters": json.loads(filesystem.cat_file(f"{path}/cluster_count/results.json")),
    }))
"""
_UNFINISHED = """
    import json
    from mlflow import MlflowClient
    client = MlflowClient()
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()], max_results=1000)
    print(json.dumps([run.info.run_name for run in runs if run.info.status != "FINISHED"]))
"""


def test_a_submitted_pipeline_trains_searches_and_confirms(hosts: Hosts) -> None:
    settings = shlex.join(part for setting in SETTINGS for part in ("--set", setting))
    command = f"parcelray submit pipelines/search.py {settings} --confirm --wait"
    output = hosts.laptop.run(command, PROJECT, timeout_s=3000)
    stored = hosts.laptop.python(_STORED, f"{RUNS}/tune")
    assert set(stored["results"]["rivals"]) == {"M3", "MQT"}, output
    assert {split["anchor_grid"] for split in stored["confirmation"]["splits"]} == {0, 2, 4}
    assert len(stored["clusters"]["trials"]) == 2
    assert hosts.laptop.python(_UNFINISHED) == []
