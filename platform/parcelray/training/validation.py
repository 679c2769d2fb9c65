"""Scores during a training: in the workers, or on a checkpoint in a process of its own while they train on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from parcelray.config.train import TrainJob
from parcelray.datasets.sample import Sample
from parcelray.evaluation.predict.predictor import Predictor
from parcelray.evaluation.scoring.split_scores import score
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.training import checkpointing
from parcelray.training.metric_logger import MetricLogger
from parcelray.training.start import build_resumed, validation_samples


def validation_metric(num_visual_tokens: int) -> str:
    """Name of the score at a budget."""
    return f"val/score@{num_visual_tokens}"


def validation_values(
    job: TrainJob, model: ElasticVLM, processor: ElasticProcessor, samples: Sequence[Sample], device: str
) -> dict[int, list[float]]:
    """The values of samples at each of the job's validation budgets that the model can give; the model must be in evaluation mode."""
    budgets = [budget for budget in job.validation.budgets if budget in model.supported_budgets]
    predictions = Predictor(model, processor, device=device).generate_budgets(samples, budgets)
    return {
        budget: score(samples, predictions[budget])
        for budget in budgets
    }


@dataclass(frozen=True)
class BackgroundValidation:
    """Scores a training checkpoint; Ray Train calls it in a task of its own.

    Args:
        job: the training.
        logger: makes the metric logger of the training's run.
    """

    job: TrainJob
    logger: Callable[[], MetricLogger]

    def __call__(self, checkpoint: Any, **kwargs: Any) -> dict[str, float]:
        """The scores by metric name, logged at the step of the checkpoint.

        Args:
            checkpoint: of `ray.train`.
            kwargs: of Ray Train; there are none.
        """
        device = "cuda" if self.job.validation.background_gpus and torch.cuda.is_available() else "cpu"
        with checkpoint.as_directory() as name:
            folder = Path(name)
            model, processor = build_resumed(folder)
            step = checkpointing.read_state(folder).step
            values = validation_values(
                self.job, model.eval().to(device), processor, validation_samples(self.job, processor), device
            )
        metrics = {validation_metric(budget): sum(scores) / len(scores) for budget, scores in values.items()}
        logger = self.logger()
        logger.log_metrics(metrics, step)
        logger.flush()
        return metrics
