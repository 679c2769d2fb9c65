"""A checkpoint with another routing: data of its configuration, the weights stay as they are."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from parcelray.config.connector import ParcelConnectorConfig, RouteConfig
from parcelray.errors import UserError
from parcelray.models.checkpoint import MANIFEST_NAME, read_manifest, write_manifest
from parcelray.models.connectors.routing import resolve_routing
from parcelray.models.vlm import config_of, connector_of


def write_rerouted(source: Path, target: Path, routing: Sequence[RouteConfig], found_by: str) -> Path:
    """Copies a checkpoint of a supernet over splits and sets its routing, which evaluation and serving then follow.

    Args:
        source: checkpoint folder with a manifest.
        target: folder to write; what is there is replaced.
        routing: the new intervals.
        found_by: the search, for the manifest.

    Raises:
        UserError: the checkpoint is no supernet, or was not trained for one of the anchor grids.
    """
    connector = config_of(source).connector_config
    if not isinstance(connector, ParcelConnectorConfig) or not connector.anchor_grids:
        raise UserError(
            f"{source} is no supernet over splits (its connector has no anchor_grids), so its routing is fixed; train"
            " jobs/train/supernet.yaml."
        )
    built = connector_of(source)
    for route in routing:
        for budget in (route.min_budget, route.max_budget):
            built.check_split(budget, route.anchor_grid)
    resolve_routing(routing, int(max(built.supported_budgets) ** 0.5))
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    file = target / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["connector"]["routing"] = [route.model_dump(mode="json") for route in routing]
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    manifest = read_manifest(source)
    (target / MANIFEST_NAME).unlink()
    write_manifest(
        target,
        config=manifest.config,
        git_commit=manifest.git_commit,
        data=manifest.data,
        seed=manifest.seed,
        extra={**manifest.extra, "routing_found_by": found_by, "rerouted_from": str(source)},
    )
    return target
