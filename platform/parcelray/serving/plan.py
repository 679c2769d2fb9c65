"""Resolves and checks an endpoint before anything starts, and plans what it will need."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from parcelray import __version__
from parcelray.config.identity import identity
from parcelray.config.loader import apply_override, load_job_of, validate
from parcelray.config.model import CheckpointModelConfig
from parcelray.config.reducer import ReducerConfig
from parcelray.config.serve import (
    FixedPolicyConfig,
    InputPolicyConfig,
    LoadPolicyConfig,
    ServedBudgets,
    ServedModelConfig,
    ServeJob,
)
from parcelray.errors import UnsupportedBudgetError, UserError
from parcelray.models.checkpoint import ResolvedCheckpoint
from parcelray.models.token_reduction import build_reducer
from parcelray.models.token_reduction.base import check_uncompressed
from parcelray.models.vlm import config_of, connector_of
from parcelray.profiling.backbone_shapes import from_transformers_config
from parcelray.profiling.flops import kv_cache_bytes
from parcelray.profiling.reduction_flops import prefill_costs
from parcelray.serving.app import replica_settings, serve_config
from parcelray.serving.engine.budget_chooser import load_predictor
from parcelray.serving.http.auth import ApiKey, read_keys
from parcelray.tracking.registry import resolve_model
from parcelray.tracking.store import ensure_store

if TYPE_CHECKING:
    from rich.table import Table

    from parcelray.tracking.model_versions import RegisteredVersion

_DEFAULT_BUDGETS = (16, 64, 256)
"""Budgets of an endpoint without a job file, if the model supports them."""
TEXT_TOKENS = 32
"""Text tokens of a request that plans assume."""
_MAX_DEFAULT_BUDGETS = 5
"""Maximum number of budgets of an endpoint without a job file."""


@dataclass(frozen=True)
class PinnedEndpoint:
    """A job whose model references are resolved, once."""

    job: ServeJob
    champion: ResolvedCheckpoint
    challenger: ResolvedCheckpoint | None
    keys: tuple[ApiKey, ...]
    """The API keys, as hashes; empty: none is needed."""
    reducer: ReducerConfig | None = None
    """Training-free reducer of the champion, which the job or the model registry names; None: none."""
    challenger_reducer: ReducerConfig | None = None
    """Training-free reducer of the challenger."""
    warnings: tuple[str, ...] = ()
    """Sentences that the operator should read before the endpoint starts."""

    def config(self) -> dict[str, Any]:
        """Returns the configuration for Serve."""
        champion = replica_settings(self.job, self.job.model, self.champion, self.reducer)
        canary = self.job.canary
        challenger = (
            replica_settings(self.job, canary.model, self.challenger, self.challenger_reducer)
            if canary is not None and self.challenger is not None
            else None
        )
        return serve_config(self.job, champion, challenger, self.keys)

    def to_yaml(self) -> str:
        """Returns the file for `serve deploy`."""
        pins = [checkpoint.pin for checkpoint in (self.champion, self.challenger) if checkpoint is not None]
        needed = [f"parcelray {__version__}, installed"]
        needed += [f"the folder {pin.reference}" if pin.is_path else f"access to {pin.reference}" for pin in pins]
        lines = [
            f"{self.job.name}: {self.champion.pinned}. Deploy it with `serve deploy FILE`.",
            *(f"Every node needs {each}." for each in needed),
            (
                "http_options, controller_options and logging_config have an effect only if this file starts Serve on"
                " the cluster."
            ),
        ]
        return "".join(f"# {line}\n" for line in lines) + yaml.safe_dump(self.config(), sort_keys=False)


@dataclass(frozen=True)
class ServingPlan:
    """The resolved endpoint, its memory, and its compute by budget."""

    identity: str
    model: str
    reducer: dict[str, Any] | None
    """Settings of the training-free reducer; None: none."""
    url: str
    keys: bool
    kv_bytes: int
    """Size of one replica's KV cache, bytes."""
    flops: dict[int, int]
    """FLOPs of the prefill of one image at each offered budget."""
    requests_in_kv: dict[int, int]
    """Number of concurrent requests with one image and the default answer length that fit the KV cache, by budget."""
    warnings: tuple[str, ...]
    """Warnings about budgets that the promotion gates did not accept."""
    config: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON-serialisable values."""
        return {key: getattr(self, key) for key in self.__dataclass_fields__}

    def to_rich(self) -> "Table":
        """Returns the plan as a table for the console."""
        from rich.table import Table

        table = Table("plan", self.identity)
        rows = {
            "model": self.model,
            **({"reducer": self._reducer_text(self.reducer)} if self.reducer is not None else {}),
            "endpoint": f"{self.url}/v1, {'with' if self.keys else 'without'} API keys",
            "KV cache": f"{self.kv_bytes / 1024**2:,.1f} MiB per replica",
            **{
                f"{budget} visual tokens": (
                    f"{flops / 1e9:,.2f} GFLOP of prefill, {self.requests_in_kv[budget]:,} concurrent requests"
                )
                for budget, flops in self.flops.items()
            },
        }
        for key, value in [*rows.items(), *(("gates", warning) for warning in self.warnings)]:
            table.add_row(key, value)
        return table

    @staticmethod
    def _reducer_text(reducer: dict[str, Any]) -> str:
        settings = ", ".join(f"{key} {value}" for key, value in reducer.items() if key != "type")
        return f"{reducer['type']} ({settings})"


def serve_job(target: str, overrides: list[str], *, host: str | None = None, port: int | None = None) -> ServeJob:
    """Returns the job of a job file, or a default job for a model reference.

    Args:
        target: path of a job file, or a model reference.
        overrides: changes such as `engine.kv_tokens=1024`.
        host: address to listen on; None: as in the job.
        port: port to listen on; None: as in the job.

    Raises:
        UserError: the file is not a serve job, or the reference cannot be resolved.
    """
    changes = [
        *overrides,
        *([f"http.host={host}"] if host is not None else []),
        *([f"http.port={port}"] if port is not None else []),
    ]
    if target.endswith((".yaml", ".yml")):
        return load_job_of(ServeJob, target, changes)
    bare = validate(ServeJob, {"kind": "serve", "name": _name(target), "model": {"reference": target}}, target)
    checkpoint = resolve(bare, bare.model)
    _, legal = _supported_budgets(checkpoint, _reducer_of(bare, checkpoint, None))
    data = bare.model_dump(mode="json", exclude_unset=True) | {"budgets": {"offered": _default_budgets(legal)}}
    for change in changes:
        apply_override(data, change)
    return validate(ServeJob, data, target)


def serving_plan(job: ServeJob) -> ServingPlan:
    """Resolves a job and computes its memory and compute.

    Raises:
        UserError: see `pin`.
    """
    pinned = pin(job)
    config = config_of(pinned.champion.path)
    shape = from_transformers_config(config)
    costs = prefill_costs(shape, job.model.connector or config.connector_config, pinned.reducer, job.budgets.offered)
    bytes_per_value = 4 if job.model.dtype == "float32" else 2
    return ServingPlan(
        identity=identity(job),
        model=pinned.champion.pinned,
        reducer=None if pinned.reducer is None else pinned.reducer.model_dump(mode="json"),
        url=f"http://{job.http.host}:{job.http.port}",
        keys=job.http.keys_file is not None,
        kv_bytes=kv_cache_bytes(shape, job.engine.kv_tokens, bytes_per_value),
        flops={budget: each.total for budget, each in costs.items()},
        requests_in_kv={budget: requests_in_kv(job, budget) for budget in costs},
        warnings=pinned.warnings,
        config=job.model_dump(mode="json"),
    )


def requests_in_kv(job: ServeJob, budget: int) -> int:
    """Returns how many requests with one image and the default answer length run at once at a budget."""
    tokens = budget + TEXT_TOKENS + job.limits.default_max_tokens
    return min(job.engine.max_running, job.engine.kv_tokens // tokens)


def pin(job: ServeJob, *, keys: tuple[ApiKey, ...] = ()) -> PinnedEndpoint:
    """Resolves the models of a job and checks everything that can be checked before the start.

    Args:
        job: the endpoint.
        keys: the API keys if the keys file is not on this machine; empty: those of the file.

    Raises:
        UserError: a model cannot be resolved or does not support an offered budget, the promotion gates did not accept
            the lowest budget of the policy, or the keys or the budget predictor cannot be read.
    """
    if job.http.keys_file is not None and not keys:
        keys = tuple(read_keys(Path(job.http.keys_file)))
    if job.samples is not None and job.tracking.uri is not None:
        # The database schema is created here, once; the ingress only writes.
        job = job.model_copy(
            update={"tracking": job.tracking.model_copy(update={"uri": ensure_store(job.tracking.uri)})}
        )
    if isinstance(job.budgets.policy, InputPolicyConfig):
        load_predictor(job.budgets.policy, job.budgets.offered)
    champion = resolve(job, job.model)
    challenger = resolve(job, job.canary.model) if job.canary is not None else None
    reducer = _reducer_of(job, champion, job.reducer)
    _check_budgets(job, job.model, champion, reducer)
    warnings = gate_warnings(job, champion, reducer)
    challenger_reducer = None
    if job.canary is not None and challenger is not None:
        challenger_reducer = _reducer_of(job, challenger, job.canary.reducer)
        _check_budgets(job, job.canary.model, challenger, challenger_reducer)
        warnings += gate_warnings(job, challenger, challenger_reducer)
    pinned = PinnedEndpoint(job, champion, challenger, keys, reducer, challenger_reducer, warnings)
    if len({app["name"] for app in pinned.config()["applications"]}) < len(pinned.config()["applications"]):
        raise UserError(
            f"Champion and challenger are both {champion.pinned}, so there is nothing to compare; set"
            " canary.model.reference to another version."
        )
    return pinned


def resolve(job: ServeJob, model: ServedModelConfig) -> ResolvedCheckpoint:
    """Resolves the reference of one of a job's models to a checkpoint.

    Raises:
        UserError: the reference cannot be resolved.
    """
    uri = job.tracking.uri
    # The registry is opened only if it is needed: importing MLflow takes seconds.
    tracking_uri = ensure_store(uri) if uri is not None and model.reference.startswith("models:/") else None
    return resolve_model(CheckpointModelConfig(reference=model.reference), tracking_uri)


def _registered(job: ServeJob, checkpoint: ResolvedCheckpoint) -> "RegisteredVersion | None":
    """Returns the version of the model registry that a reference was resolved to; None: it is not from the registry."""
    if not checkpoint.pinned.startswith("models:/"):
        return None
    assert job.tracking.uri is not None, "the reference was resolved there"
    # Importing MLflow takes seconds.
    from parcelray.tracking.model_versions import referenced_version

    return referenced_version(ensure_store(job.tracking.uri), checkpoint.pinned)


def _reducer_of(job: ServeJob, checkpoint: ResolvedCheckpoint, named: ReducerConfig | None) -> ReducerConfig | None:
    """Returns the reducer of a model: that of the job, else that which the version was promoted with, else None."""
    if named is not None:
        return named
    version = _registered(job, checkpoint)
    return version.reducer if version is not None else None


def gate_warnings(
    job: ServeJob, checkpoint: ResolvedCheckpoint, reducer: ReducerConfig | None = None
) -> tuple[str, ...]:
    """Returns warnings about budgets that the promotion gates did not accept; none for a model outside the registry.

    Args:
        job: the endpoint.
        checkpoint: the model.
        reducer: the reducer that it is served with.

    Raises:
        UserError: the load or input policy may choose a budget that the gates did not accept.
    """
    version = _registered(job, checkpoint)
    if version is None:
        return ()
    # Gate results hold only for the reducer that the gates evaluated the version with.
    same = version.gate_reducer == reducer
    accepted = version.gate_budgets if same else None
    possible = open_budgets(job.budgets)
    if accepted is None:
        served = f" with the reducer {reducer.type}" if reducer is not None else "" if same else " without a reducer"
        return (
            (
                f"{checkpoint.pinned} has no promotion gate results{served}, so its quality at {_listed(possible)}"
                f" visual tokens is not verified; evaluate it with `parcelray models promote JOB --set"
                f" candidate={version.version}`."
            ),
        )
    legal = f"accepted budgets: {_listed(accepted)}" if accepted else "no budget is accepted"
    if isinstance(job.budgets.policy, LoadPolicyConfig | InputPolicyConfig) and possible[0] not in accepted:
        remedy = (
            f"set budgets.policy.floor to an accepted budget ({_listed(offered)})"
            if (offered := [each for each in possible if each in accepted])
            else "offer an accepted budget"
        )
        raise UserError(
            f"The {job.budgets.policy.type} policy may choose {possible[0]} visual tokens, which the promotion gates of"
            f" {checkpoint.pinned} did not accept ({legal}); {remedy}, or promote the version with a gate at"
            f" {possible[0]}."
        )
    missing = [budget for budget in possible if budget not in accepted]
    if not missing:
        return ()
    return (
        (
            f"Requests without a budget may get {_listed(missing)} visual tokens, which the promotion gates of"
            f" {checkpoint.pinned} did not accept ({legal})."
        ),
    )


def open_budgets(budgets: ServedBudgets) -> list[int]:
    """Returns the budgets, ascending, that a request may get which leaves its budget open."""
    policy, offered = budgets.policy, sorted(budgets.offered)
    if isinstance(policy, FixedPolicyConfig):
        return [policy.visual_tokens]
    if isinstance(policy, LoadPolicyConfig | InputPolicyConfig):
        return [budget for budget in offered if budget >= (policy.floor or offered[0])]
    return [policy.auto or offered[-1]]


def _check_budgets(
    job: ServeJob, model: ServedModelConfig, checkpoint: ResolvedCheckpoint, reducer: ReducerConfig | None
) -> None:
    if model.connector is not None:
        if reducer is not None:
            raise UserError(
                f"{checkpoint.pinned} was promoted with the reducer {reducer.type}, which takes all patch tokens, but"
                f" model.connector is {model.connector.type}; remove model.connector."
            )
        return
    name, legal = _supported_budgets(checkpoint, reducer)
    for budget in job.budgets.offered:
        if budget not in legal:
            raise UnsupportedBudgetError(budget, legal, name)
    if reducer is not None:
        # Also refuses a reducer that needs a layer or a part that the model does not have.
        prefill_costs(from_transformers_config(config_of(checkpoint.path)), None, reducer, job.budgets.offered)


def _supported_budgets(checkpoint: ResolvedCheckpoint, reducer: ReducerConfig | None) -> tuple[str, tuple[int, ...]]:
    """Returns the name of the module that produces the budgets, and its legal budgets, ascending."""
    connector = connector_of(checkpoint.path)
    if reducer is None:
        return connector.name, connector.supported_budgets
    check_uncompressed(connector)
    built = build_reducer(reducer)
    return built.name, built.budgets_of(max(connector.supported_budgets), config_of(checkpoint.path).depths)


def _name(reference: str) -> str:
    last = re.sub(r"[@:].*", "", reference.removeprefix("models:/").rstrip("/")).split("/")
    words = [part for part in last if part and not part.isdigit()]
    name = re.sub(r"[^a-z0-9_-]+", "-", words[-1].lower() if words else "model").strip("-_")
    return name[:63] or "model"


def _default_budgets(supported: tuple[int, ...]) -> list[int]:
    default = [budget for budget in _DEFAULT_BUDGETS if budget in supported]
    if default:
        return default
    step = max(1, (len(supported) - 1) // (_MAX_DEFAULT_BUDGETS - 1))
    return sorted({*supported[::step][: _MAX_DEFAULT_BUDGETS - 1], supported[-1]})


def _listed(budgets: list[int] | tuple[int, ...]) -> str:
    return ", ".join(map(str, budgets))
