"""What the promotion's gates said of the budgets that an endpoint would give to requests which leave the choice open."""

import re

from parcelray.config.serve import FixedPolicyConfig, InputPolicyConfig, LoadPolicyConfig, ServedBudgets, ServeJob
from parcelray.errors import UserError
from parcelray.models.checkpoint import ResolvedCheckpoint
from parcelray.tracking.store import ensure_store

_VERSION = re.compile(r"models:/(?P<name>[^/]+)/(?P<version>\d+)")


def gate_warnings(job: ServeJob, checkpoint: ResolvedCheckpoint) -> tuple[str, ...]:
    """What the owner of an endpoint should know of a version's gates, a sentence each; nothing for a model that is in no registry.

    Raises:
        UserError: the policy by load or by input could go down to a budget that the gates did not accept.
    """
    found = _VERSION.fullmatch(checkpoint.pinned)
    if found is None:
        return ()
    assert job.tracking.uri is not None, "the reference was looked up there"
    # MLflow takes seconds to load.
    from parcelray.tracking.model_versions import find_version

    accepted = find_version(ensure_store(job.tracking.uri), found["name"], found["version"]).gate_budgets
    given = open_budgets(job.budgets)
    if accepted is None:
        return (
            (
                f"{checkpoint.pinned} was never put to gates, so nothing says that {_listed(given)} visual tokens are"
                f" enough for its answers; `parcelray models promote JOB --set candidate={found['version']}` asks it."
            ),
        )
    legal = f"accepted are {_listed(accepted)}" if accepted else "no budget is accepted"
    if isinstance(job.budgets.policy, LoadPolicyConfig | InputPolicyConfig) and given[0] not in accepted:
        remedy = (
            f"set budgets.policy.floor to one that is accepted ({_listed(fitting)})"
            if (fitting := [each for each in given if each in accepted])
            else "offer one"
        )
        raise UserError(
            f"The {job.budgets.policy.type} policy may go down to {given[0]} visual tokens, which the gates of"
            f" {checkpoint.pinned} did not accept ({legal}); {remedy}, or put the version to a gate that asks for"
            f" {given[0]}."
        )
    missing = [budget for budget in given if budget not in accepted]
    if not missing:
        return ()
    return (
        (
            f"Requests that leave the choice open may get {_listed(missing)} visual tokens, which the gates of"
            f" {checkpoint.pinned} did not accept ({legal})."
        ),
    )


def open_budgets(budgets: ServedBudgets) -> list[int]:
    """Budgets that a request gets which names none, ascending."""
    policy, offered = budgets.policy, sorted(budgets.offered)
    if isinstance(policy, FixedPolicyConfig):
        return [policy.visual_tokens]
    if isinstance(policy, LoadPolicyConfig | InputPolicyConfig):
        return [budget for budget in offered if budget >= (policy.floor or offered[0])]
    return [policy.auto or offered[-1]]


def _listed(budgets: list[int] | tuple[int, ...]) -> str:
    return ", ".join(map(str, budgets))
