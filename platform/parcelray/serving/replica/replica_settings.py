"""What a replica of a model is made from."""

from parcelray.config.base import StrictModel
from parcelray.config.serve import EngineConfig, InputPolicyConfig


class ReplicaSettings(StrictModel):
    """All that a replica is made from."""

    path: str
    """Folder of the checkpoint, on every node."""
    version: str
    """Pinned reference: what the folder holds."""
    connector: str | None
    """JSON of a connector without weights to put in; null: the checkpoint's own."""
    dtype: str
    """Arithmetic of the model."""
    device: str
    """Where it runs."""
    budgets: tuple[int, ...]
    """To warm up."""
    policy: InputPolicyConfig | None = None
    """How budgets are chosen that requests leave open to the replica; null: none are."""
    engine: EngineConfig
    """What it holds at the same time."""
    threads: int | None
    """Of the arithmetic on a CPU; null: torch's choice."""
