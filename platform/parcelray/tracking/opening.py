"""Opens pinned models on the host of this process: a worker, a trial, an actor or a replica."""

import functools
from pathlib import Path

from parcelray.models.checkpoint import ModelPin, open_pin, open_settings
from parcelray.models.host_cache import OnProgress


def model_folder(pin: ModelPin, on_progress: OnProgress | None = None) -> Path:
    """Returns the folder of a pinned model on this host (see `models.checkpoint.open_pin`).

    Args:
        pin: the model, as the driver resolved it.
        on_progress: receives the progress of a download; None: lines on standard error.

    Raises:
        UserError: the files cannot be had on this host, or they are not those that the driver resolved.
        SystemFailure: the disk of this host is full.
    """
    if pin.tracking_uri is None:
        return open_pin(pin, on_progress=on_progress)
    # Importing MLflow takes seconds, which other references need not wait for.
    from parcelray.tracking.registry import resolve_registry

    resolver = functools.partial(resolve_registry, tracking_uri=pin.tracking_uri, on_progress=on_progress)
    return open_pin(pin, registry_resolver=resolver, on_progress=on_progress)


def settings_folder(pin: ModelPin, on_progress: OnProgress | None = None) -> Path:
    """Returns a folder of this host with a pinned model's configuration, tokenizer and image processor.

    Weights that the host does not have are not downloaded (see `models.checkpoint.open_settings`).

    Args:
        pin: the model, as the driver resolved it.
        on_progress: see `model_folder`.

    Raises:
        UserError: see `model_folder`.
    """
    if pin.tracking_uri is None:
        return open_settings(pin, on_progress=on_progress)
    from parcelray.tracking.registry import read_version_file, resolve_registry

    if pin.registry_folder is None:
        reader = functools.partial(read_version_file, pin.reference, pin.tracking_uri)
        return open_settings(pin, registry_reader=reader, on_progress=on_progress)
    resolver = functools.partial(resolve_registry, tracking_uri=pin.tracking_uri, on_progress=on_progress)
    return open_settings(pin, registry_resolver=resolver, on_progress=on_progress)
