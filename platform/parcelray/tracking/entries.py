"""What may be sent to MLflow: legal keys, values cut to its limits, batches of its size, and never a secret.

Limits of MLflow 3.17: 100 params or tags and 1,000 metrics a batch, 1 MB a request, keys of 250, params of 6,000 and
tags of 8,000 characters.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeVar

from parcelray.tracking.store import hide_credentials

ParamValue = str | int | float | bool | None
RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

MAX_KEY = 250
MAX_PARAM = 6000
MAX_TAG = 8000
PARAMS_PER_BATCH = 100
METRICS_PER_BATCH = 1000
BATCH_BYTES = 900_000
REDACTED = "<redacted>"

T = TypeVar("T")

# A word that ends in one of these holds a secret; plurals (`num_visual_tokens`, `keys: content`) are our own
# vocabulary.
_SECRET_WORD = re.compile(r"(token|passw(or)?ds?|secrets?|apikey|credentials?)$|^key$")


def is_secret_key(key: str) -> bool:
    """Whether a parameter of this name (`hf_token`, `aws.secret_access_key`) must not be recorded."""
    words = re.split(r"[^a-z0-9]+", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", key).lower())
    return any(_SECRET_WORD.search(word) for word in words)


def clean_key(key: str) -> str:
    """A key that MLflow accepts: `@` (as in `val/nlvr/accuracy@64`) becomes `:`, other illegal characters become `_`."""
    return re.sub(r"[^\w./: -]", "_", key.replace("@", ":"))[:MAX_KEY]


def clean_params(params: Mapping[str, ParamValue]) -> dict[str, str]:
    """Parameters as MLflow keeps them: text, cut to its limit, secrets masked. Numbers are never secrets."""
    return {clean_key(key): _clean_value(key, value, MAX_PARAM) for key, value in params.items()}


def clean_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags as MLflow keeps them: cut to its limit, secrets masked."""
    return {clean_key(key): _clean_value(key, value, MAX_TAG) for key, value in tags.items()}


def _clean_value(key: str, value: ParamValue, limit: int) -> str:
    if isinstance(value, str) and is_secret_key(key):
        return REDACTED
    text = hide_credentials(str(value))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def batches(entries: Sequence[tuple[str, T]], limit: int) -> Iterator[list[tuple[str, T]]]:
    """Cuts (key, value) entries into batches of at most `limit` entries and `BATCH_BYTES` bytes."""
    batch: list[tuple[str, T]] = []
    size = 0
    for key, value in entries:
        entry_bytes = len(json.dumps([key, str(value)]))
        if batch and (len(batch) == limit or size + entry_bytes > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append((key, value))
        size += entry_bytes
    if batch:
        yield batch
