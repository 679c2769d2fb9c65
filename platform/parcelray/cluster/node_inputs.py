"""Comparison of a job's plain paths on the nodes of a cluster, before anything starts.

References to models are opened on each host. A plain path is legal only if every node has the same content there, such
as on a shared disk or on a cluster of one node.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from parcelray.datasets.fingerprint import folder_digest
from parcelray.errors import UserError
from parcelray.models.checkpoint import ModelPin, open_pin

EachNode = Callable[[Callable[[], str | None]], list[str | None]]
"""Calls a function on every node in use and returns its results."""


def check_inputs(
    pins: Iterable[ModelPin | None], folders: Iterable[str | Path | None], each_node: EachNode | None = None
) -> None:
    """Checks that every node in use has the models and data of a job that are given as plain paths.

    Models are compared by the sha256 of all files, data by names, sizes and a sample of the content. A node that joins
    later checks the models itself when it opens them.

    Args:
        pins: models of the job; those that are no plain paths, and None, are left out.
        folders: folders and files with data, which exist on this host; None is left out.
        each_node: calls a function on every node; None: a task of Ray on each.

    Raises:
        UserError: a node lacks a path or has other content there.
    """
    paths = [pin for pin in pins if pin is not None and pin.is_path]
    data = list(dict.fromkeys(str(folder) for folder in folders if folder is not None))
    if not (paths or data) or (each_node is None and _is_only_this_node()):
        return
    digests = {folder: folder_digest(folder) for folder in data}
    problems = (each_node or _on_each_node)(_Check(tuple(paths), digests))
    for problem in problems:
        if problem is not None:
            raise UserError(problem)


class _Check:
    """Finds the first difference of a host's files from those of the driver."""

    def __init__(self, pins: tuple[ModelPin, ...], digests: Mapping[str, str]) -> None:
        self._pins = pins
        self._digests = digests

    def __call__(self) -> str | None:
        try:
            for pin in self._pins:
                open_pin(pin)
            found = {folder: folder_digest(folder) for folder in self._digests}
        except UserError as error:
            return str(error)
        for folder, expected in self._digests.items():
            if found[folder] != expected:
                return (
                    f"The data {folder} differ between the hosts: their digest is {found[folder][:19]} on"
                    f" {os.uname().nodename} and {expected[:19]} on the driver's host; copy the same files to every"
                    " host."
                )
        return None


def _on_each_node(check: Callable[[], str | None]) -> list[str | None]:
    run = ray.remote(num_cpus=0)(_call)
    tasks = [
        run.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(check)
        for node in _nodes_in_use()
    ]
    results: list[str | None] = ray.get(tasks)
    return results


def _call(check: Callable[[], str | None]) -> str | None:
    return check()


def _nodes_in_use() -> list[dict[str, Any]]:
    """Returns the live nodes on which workers can run."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"] and any(node["Resources"].get(name) for name in ("CPU", "GPU"))]


def _is_only_this_node() -> bool:
    own = ray.get_runtime_context().get_node_id()
    return all(node["NodeID"] == own for node in _nodes_in_use())
