"""From a replica's settings to the engine that answers its requests."""

import logging
import time

import torch
from pydantic import TypeAdapter

from parcelray.config.connector import ConnectorConfig
from parcelray.errors import UnsupportedBudgetError
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.vlm import load_processor, load_vlm, use_sdpa_where_exact
from parcelray.serving.engine.budget_chooser import BudgetChooser, load_predictor
from parcelray.serving.engine.engine import Engine
from parcelray.serving.engine.health import HealthProbe
from parcelray.serving.ingress.prompting import PromptBuilder
from parcelray.serving.replica.engine_factory import build_engine
from parcelray.serving.replica.replica_settings import ReplicaSettings

logger = logging.getLogger("ray.serve")


def load_model(settings: ReplicaSettings) -> ElasticVLM:
    """The model of a replica, in evaluation mode on its device.

    Raises:
        UnsupportedBudgetError: it cannot give an offered budget.
        UserError: the checkpoint cannot be loaded.
    """
    connector: ConnectorConfig | None = (
        TypeAdapter(ConnectorConfig).validate_json(settings.connector) if settings.connector else None
    )
    model = load_vlm(settings.path, connector=connector, dtype=getattr(torch, settings.dtype))
    for budget in settings.budgets:
        if budget not in model.supported_budgets:
            raise UnsupportedBudgetError(budget, model.supported_budgets, model.connector.name)
    use_sdpa_where_exact(model)
    return model.to(settings.device).eval()


def load_chooser(settings: ReplicaSettings, model: ElasticVLM, processor: ElasticProcessor) -> BudgetChooser | None:
    """The chooser of a replica; None: nothing is left open to it.

    Raises:
        UserError: there is no predictor, or it does not fit the model and its budgets.
    """
    if settings.policy is None:
        return None
    return BudgetChooser(
        load_predictor(settings.policy, settings.budgets), model, processor, price=settings.policy.price
    )


def load_engine(settings: ReplicaSettings, name: str) -> tuple[Engine, HealthProbe]:
    """The engine of a replica, warm, and what asks whether it answers.

    Args:
        settings: of the replica.
        name: of the engine, in its statistics.

    Raises:
        UnsupportedBudgetError: the model cannot give an offered budget.
        UserError: the checkpoint or the predictor cannot be loaded.
    """
    started = time.perf_counter()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    model = load_model(settings)
    processor = load_processor(settings.path)
    logger.info("parcelray: model loaded in %.1f s", time.perf_counter() - started)
    probe = HealthProbe(PromptBuilder(processor), settings.budgets)
    chooser = load_chooser(settings, model, processor)
    engine = build_engine(settings.engine, model, processor, name=name, chooser=chooser, urgent_tokens=probe.num_tokens)
    probe.warm_up(engine)
    return engine, probe
