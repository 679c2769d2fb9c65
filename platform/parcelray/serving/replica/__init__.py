"""The replicas of a model: what they are built from (here), how they are loaded, and the class that Serve runs."""

from parcelray.config.base import StrictModel
from parcelray.config.reducer import ReducerConfig
from parcelray.config.serve import EngineConfig, InputPolicyConfig, ServedModelConfig
from parcelray.models.checkpoint import ModelPin


class ReplicaSettings(StrictModel):
    """Everything that a replica is built from."""

    pin: ModelPin
    """The checkpoint, which each replica and the ingress open on their own hosts."""
    model: ServedModelConfig
    """The served model; its `reference` is pinned: it names the version."""
    reducer: ReducerConfig | None = None
    """Training-free reducer of the model; null: none."""
    budgets: tuple[int, ...]
    """Offered visual-token budgets, ascending; each is warmed up."""
    policy: InputPolicyConfig | None = None
    """Policy for budgets that requests leave open; null: the replica chooses no budgets."""
    engine: EngineConfig
    """Limits of the engine."""
    threads: int | None
    """CPU threads of the model; null: torch's default."""
