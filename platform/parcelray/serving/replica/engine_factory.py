"""Builds the engine that a job names."""

from parcelray.config.serve import EngineConfig
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.serving.engine.budget_chooser import BudgetChooser
from parcelray.serving.engine.continuous_engine import ContinuousEngine, EngineLimits
from parcelray.serving.engine.engine import Engine
from parcelray.serving.static_engine import StaticEngine


def limits_of(config: EngineConfig, *, urgent_tokens: int = EngineLimits.urgent_tokens) -> EngineLimits:
    """An engine's limits out of a job.

    Args:
        config: of the job.
        urgent_tokens: that one health check holds.
    """
    return EngineLimits(
        max_running=config.max_running,
        max_waiting=config.max_waiting,
        kv_tokens=config.kv_tokens,
        urgent_tokens=urgent_tokens,
        prefill_tokens=config.prefill_tokens,
        vision_batch=config.vision_batch,
        feature_cache_bytes=config.feature_cache_mb * 1024**2,
    )


def build_engine(
    config: EngineConfig,
    model: ElasticVLM,
    processor: ElasticProcessor,
    *,
    name: str = "local",
    chooser: BudgetChooser | None = None,
    urgent_tokens: int = EngineLimits.urgent_tokens,
) -> Engine:
    """The engine of one replica, already running.

    Args:
        config: of the job.
        model: in evaluation mode, on its device.
        processor: of the same checkpoint.
        name: in its statistics.
        chooser: of budgets that requests leave open; None: such requests are refused.
        urgent_tokens: that one health check holds.
    """
    engine = StaticEngine if config.type == "static" else ContinuousEngine
    return engine(model, processor, limits_of(config, urgent_tokens=urgent_tokens), name=name, chooser=chooser)
