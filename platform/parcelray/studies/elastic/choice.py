"""The choice of start, budget schedule and distillation at equal compute, on validation questions.

Every variant has the training FLOPs of the reference: its number of steps follows from the expected cost of its steps,
by the cost model (arXiv 2605.30126, Appendix C). The variant with the lowest loss is chosen, as the mean over budgets.
"""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from parcelray.benchmarks.training_data import held_out_samples
from parcelray.config.loader import changed
from parcelray.config.train import TrainJob
from parcelray.console import markdown_table
from parcelray.datasets.collator import Collator
from parcelray.datasets.sample import Sample
from parcelray.errors import UserError
from parcelray.files import read_json, write_json
from parcelray.models.vlm import image_size_of, load_processor, load_vlm
from parcelray.studies.elastic.runs import only_worker
from parcelray.tracking.run_folder import RunFolder
from parcelray.training.plan import training_plan
from parcelray.training.run import run_training
from parcelray.training.step import losses, to_tensors

BUDGETS = (16, 32, 64, 128, 256)
"""Budgets whose mean validation loss decides."""
STEPS = 300
"""Steps of the reference: local start, stratified budgets, no distillation."""
SAMPLES = 250
"""Validation questions per family for the loss; the score is that of the training's own validation."""
_PROMPTS_PER_BATCH = 32

STARTS: Mapping[str, dict[str, Any]] = {"local": {}, "random": {"connector.start": "random"}}
# By routing regime, as `strata: null` gives for PARCEL, written out for the identity of the runs.
_STRATIFIED: Mapping[str, Any] = {
    "type": "stratified",
    "strata": [
        {"share": 1, "budgets": [16]},
        {"share": 2, "budgets": {"start": 18, "stop": 62}},
        {"share": 1, "budgets": [64]},
        {"share": 4, "budgets": {"start": 66, "stop": 256}},
    ],
}
SCHEDULES: Mapping[str, dict[str, Any]] = {
    "stratified": {"budget": _STRATIFIED},
    "log-uniform": {"budget": {"type": "log_uniform"}},
    "uniform": {"budget": {"type": "uniform"}},
}
DISTILLATION: Mapping[str, dict[str, Any]] = {"no": {}, "yes": {"distillation": {"weight": 0.5}}}
_SINGLE: Mapping[tuple[str, str, str], dict[str, Any]] = {
    ("local", "sandwich", "no"): {"budget": {"type": "sandwich"}},
    ("local, contiguous positions", "stratified", "no"): {"connector.positions": "contiguous", "budget": _STRATIFIED},
    ("random, contiguous positions", "uniform", "no"): {
        "connector.start": "random",
        "connector.positions": "contiguous",
        "budget": {"type": "uniform"},
    },
}
"""Further variants: the sandwich rule, contiguous positions, and the paper's form with a random start."""


@dataclass(frozen=True)
class Outcome:
    """The validation of one variant."""

    start: str
    schedule: str
    distillation: str
    steps: int
    losses: Mapping[int, float]
    """Mean loss of an answer (teacher forcing) by budget, nats."""
    scores: Mapping[int, float]
    """Score of greedy answers by budget, percent."""

    @property
    def mean_loss(self) -> float:
        """Unweighted mean of the loss over the budgets."""
        return sum(self.losses.values()) / len(self.losses)

    @property
    def mean_score(self) -> float:
        """Unweighted mean of the score over the budgets."""
        return sum(self.scores.values()) / len(self.scores)


def variants() -> dict[tuple[str, str, str], dict[str, Any]]:
    """Returns the changes of every variant by start, schedule and distillation."""
    crossed = {
        (start, schedule, distillation): STARTS[start] | SCHEDULES[schedule] | DISTILLATION[distillation]
        for start, schedule, distillation in itertools.product(STARTS, SCHEDULES, DISTILLATION)
    }
    return crossed | dict(_SINGLE)


def choice_jobs(job: TrainJob, steps: int = STEPS) -> dict[tuple[str, str, str], TrainJob]:
    """Returns the training of every variant, with as many steps as have the FLOPs of `steps` steps of the reference.

    Args:
        job: the training of the reference.
        steps: steps of the reference.
    """
    own = {"training.steps": steps, "validation.budgets": list(BUDGETS)}
    flops = {
        key: training_plan(changed(job, own | changes, "choice")).flops / steps for key, changes in variants().items()
    }
    reference = flops["local", "stratified", "no"]
    return {
        key: changed(
            job,
            own | changes | {"name": _name(key), "training.steps": max(1, round(steps * reference / flops[key]))},
            "choice",
        )
        for key, changes in variants().items()
    }


def train_choices(job: TrainJob, console: Console, *, steps: int = STEPS, samples: int = SAMPLES) -> None:
    """Trains and validates the variants that are neither finished nor in work by another process."""
    for each in choice_jobs(job, steps).values():
        with only_worker(each, console) as mine:
            if not mine or _file(each).is_file():
                continue
            run = run_training(each, console, report=False)
            scores = {budget: 100 * run.metrics[f"val/score@{budget}"] for budget in BUDGETS}
            write_json(
                _file(each), {"losses": validation_losses(each, run.model_folder, BUDGETS, samples), "scores": scores}
            )


def outcomes(job: TrainJob, *, steps: int = STEPS) -> list[Outcome]:
    """Returns the outcomes of all variants by ascending loss; the first one is the chosen variant.

    Raises:
        UserError: a variant is not finished.
    """
    found = []
    for key, each in choice_jobs(job, steps).items():
        data = read_json(_file(each), "remove this file, and run the same command again")
        if data is None:
            raise UserError(
                f"{each.name} is not finished; run `python pipelines/elastic.py choose` until all variants are."
            )
        values = [{int(budget): value for budget, value in data[name].items()} for name in ("losses", "scores")]
        found.append(Outcome(*key, each.training.steps, *values))
    return sorted(found, key=lambda outcome: outcome.mean_loss)


def choice_markdown(found: Sequence[Outcome]) -> str:
    """Returns the outcomes as a Markdown table, best first."""
    losses_at = [f"loss at {budget}" for budget in BUDGETS]
    rows = [["start", "schedule", "distillation", "steps", *losses_at, "mean loss", "mean score"]]
    for each in found:
        values = [f"{each.losses[budget]:.3f}" for budget in BUDGETS]
        means = [f"{each.mean_loss:.3f}", f"{each.mean_score:.1f}"]
        rows.append([each.start, each.schedule, each.distillation, str(each.steps), *values, *means])
    return markdown_table(rows)


@torch.no_grad()
def validation_losses(job: TrainJob, model_folder: Path, budgets: Sequence[int], count: int) -> dict[int, float]:
    """Computes the mean answer loss of a model at each budget, with teacher forcing.

    Args:
        job: the training, whose data names the validation questions.
        model_folder: the model.
        budgets: visual tokens per image.
        count: number of questions per family.
    """
    model, processor = load_vlm(model_folder).eval(), load_processor(model_folder)
    collate, groups = Collator(processor), defaultdict[int, list[Sample]](list)
    for sample in held_out_samples(job.data, "validation", count, image_size_of(model_folder)):
        groups[len(sample.images)].append(sample)
    totals = dict.fromkeys(budgets, 0.0)
    for group in groups.values():
        for start in range(0, len(group), _PROMPTS_PER_BATCH):
            batch = to_tensors(collate(group[start : start + _PROMPTS_PER_BATCH]), torch.device("cpu"), processor)
            for budget in budgets:
                found = losses(model, batch, num_visual_tokens=budget, image_token_id=model.config.image_token_id)
                totals[budget] += float(found.answer_sum)
    number = sum(len(group) for group in groups.values())
    return {budget: total / number for budget, total in totals.items()}


def _name(key: tuple[str, str, str]) -> str:
    start, schedule, distillation = key
    words = start.replace(",", "").split() + schedule.split("-") + (["distilled"] if distillation == "yes" else [])
    return "choose-" + "-".join(words)


def _file(job: TrainJob) -> Path:
    return RunFolder(job).local_path("validation.json")
