"""The evaluation of a trained model on the test split of what it was trained on."""

from collections.abc import Sequence
from pathlib import Path

from parcelray.config.data import DataConfig, MiniDataConfig, NlvrDataConfig
from parcelray.config.evaluate import BenchmarkChoice, BudgetName, EvaluateJob, PassConfig
from parcelray.config.model import CheckpointModelConfig
from parcelray.config.train import TrainJob

_FAMILIES = 4


def held_out_evaluation(
    job: TrainJob, model_folder: Path, budgets: Sequence[int | BudgetName], samples: int
) -> EvaluateJob:
    """The evaluation that belongs to a training.

    Args:
        job: the training.
        model_folder: its model.
        budgets: visual tokens per image.
        samples: per family of the mini suite; pictures of NLVR, each with all its questions.
    """
    in_process = job.scaling.bounds[1] == 0
    return EvaluateJob(
        kind="evaluate",
        name=f"{job.name}-test",
        model=CheckpointModelConfig(reference=str(model_folder)),
        benchmarks=(_benchmark(job.data, samples),),
        budgets=tuple(dict.fromkeys(budgets)),
        max_unscored=1.0,
        compute=PassConfig(
            actors=0 if in_process else max(1, job.scaling.bounds[0]), gpus_per_actor=job.scaling.gpus_per_worker
        ),
        tracking=job.tracking,
        storage=job.storage,
    )


def _benchmark(data: DataConfig, samples: int) -> BenchmarkChoice:
    if isinstance(data, MiniDataConfig):
        return BenchmarkChoice(
            name="mini", source={"families": list(data.families), "samples": samples, "seed": data.seed}
        )
    if isinstance(data, NlvrDataConfig):
        return BenchmarkChoice(
            name="nlvr",
            data=data.path,
            limit=samples,
            source={"view": data.view, "questions": list(data.questions), "seed": data.seed},
        )
    return BenchmarkChoice(name="samples", data=data.path, limit=_FAMILIES * samples)
