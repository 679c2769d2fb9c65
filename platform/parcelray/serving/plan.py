"""Which endpoint `parcelray serve` means, and what it would hold, before anything starts."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from parcelray.config.identity import identity
from parcelray.config.loader import apply_override, load_job_of, validate
from parcelray.config.serve import ServeJob
from parcelray.models.vlm import config_of, connector_of
from parcelray.profiling.backbone_shapes import from_transformers_config
from parcelray.profiling.flops import cost, kv_cache_bytes
from parcelray.serving.run import pin, resolve

if TYPE_CHECKING:
    from rich.table import Table

_USUAL = (16, 64, 256)
"""Budgets of an endpoint that is not described by a job, where the model can give them."""
_MOST = 5
"""Budgets offered at most then."""


@dataclass(frozen=True)
class ServingPlan:
    """The resolved endpoint with its memory and its cost by budget."""

    identity: str
    model: str
    url: str
    keys: bool
    kv_bytes: int
    """KV cache of one replica."""
    flops: dict[int, int]
    """Prefill of one image at each offered budget."""
    requests_in_kv: dict[int, int]
    """Requests with one image and the default answer that fit the KV cache together."""
    warnings: tuple[str, ...]
    """What the gates leave open of the model's budgets."""
    config: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {key: getattr(self, key) for key in self.__dataclass_fields__}

    def to_rich(self) -> "Table":
        """For the console."""
        from rich.table import Table

        table = Table("plan", self.identity)
        rows = {
            "model": self.model,
            "endpoint": f"{self.url}/v1, {'with' if self.keys else 'without'} API keys",
            "KV cache": f"{self.kv_bytes / 1024**2:,.1f} MiB a replica",
            **{
                f"{budget} visual tokens": (
                    f"{flops / 1e9:,.2f} GFLOP of prefill, {self.requests_in_kv[budget]:,} requests at the same time"
                )
                for budget, flops in self.flops.items()
            },
        }
        for key, value in [*rows.items(), *(("gates", warning) for warning in self.warnings)]:
            table.add_row(key, value)
        return table


def serve_job(target: str, overrides: list[str], *, host: str | None = None, port: int | None = None) -> ServeJob:
    """The job of a file, or one around a model reference.

    Raises:
        UserError: the file is no job of this kind, or the reference stands for nothing.
    """
    changes = [
        *overrides,
        *([f"http.host={host}"] if host is not None else []),
        *([f"http.port={port}"] if port is not None else []),
    ]
    if target.endswith((".yaml", ".yml")):
        return load_job_of(ServeJob, target, changes)
    bare = validate(ServeJob, {"kind": "serve", "name": _name(target), "model": {"reference": target}}, target)
    connector = connector_of(resolve(bare, bare.model).path)
    data = bare.model_dump(mode="json", exclude_unset=True) | {
        "budgets": {"offered": _offered(connector.supported_budgets)}
    }
    for change in changes:
        apply_override(data, change)
    return validate(ServeJob, data, target)


def serving_plan(job: ServeJob) -> ServingPlan:
    """Resolves a job and says what it would hold.

    Raises:
        UserError: see `pin`.
    """
    pinned = pin(job)
    config = config_of(pinned.champion.path)
    shape = from_transformers_config(config)
    connector = job.model.connector or config.connector_config
    costs = {budget: cost(shape, connector, budget) for budget in sorted(job.budgets.offered)}
    bytes_per_value = 4 if job.model.dtype == "float32" else 2
    return ServingPlan(
        identity=identity(job),
        model=pinned.champion.pinned,
        url=f"http://{job.http.host}:{job.http.port}",
        keys=job.http.keys_file is not None,
        kv_bytes=kv_cache_bytes(shape, job.engine.kv_tokens, bytes_per_value),
        flops={budget: each.total for budget, each in costs.items()},
        requests_in_kv={
            budget: min(job.engine.max_running, job.engine.kv_tokens // (budget + 32 + job.limits.default_max_tokens))
            for budget in costs
        },
        warnings=pinned.warnings,
        config=job.model_dump(mode="json"),
    )


def _name(reference: str) -> str:
    last = re.sub(r"[@:].*", "", reference.removeprefix("models:/").rstrip("/")).split("/")
    words = [part for part in last if part and not part.isdigit()]
    name = re.sub(r"[^a-z0-9_-]+", "-", words[-1].lower() if words else "model").strip("-_")
    return name[:63] or "model"


def _offered(supported: tuple[int, ...]) -> list[int]:
    usual = [budget for budget in _USUAL if budget in supported]
    if usual:
        return usual
    step = max(1, (len(supported) - 1) // (_MOST - 1))
    return sorted({*supported[::step][: _MOST - 1], supported[-1]})
