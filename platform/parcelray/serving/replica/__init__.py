"""The replicas of a model: what they are built from (here), how they are loaded, and the class that Serve runs."""

from parcelray.config.base import StrictModel
from parcelray.config.serve import EngineConfig, InputPolicyConfig, ServedModelConfig


class ReplicaSettings(StrictModel):
    """Everything that a replica is built from."""

    path: str
    """Folder of the checkpoint, on every node."""
    model: ServedModelConfig
    """The served model; its `reference` is pinned: it names what the folder holds."""
    budgets: tuple[int, ...]
    """Offered visual-token budgets, ascending; each is warmed up."""
    policy: InputPolicyConfig | None = None
    """Policy for budgets that requests leave open; null: the replica chooses no budgets."""
    engine: EngineConfig
    """Limits of the engine."""
    threads: int | None
    """CPU threads of the model; null: torch's default."""
