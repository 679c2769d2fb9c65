"""Writes trained and evaluated elastic models as packaged checkpoints with model cards."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from parcelray.config.evaluate import BLIND, EvaluateJob
from parcelray.config.train import TrainJob
from parcelray.console import markdown_table
from parcelray.errors import UserError
from parcelray.evaluation.scoring.aggregate import estimates
from parcelray.evaluation.scoring.estimate import Estimate, mean_of
from parcelray.evaluation.scoring.majority import majority_scores
from parcelray.evaluation.scoring.split_scores import SplitScores
from parcelray.models.manifest import Manifest, verify_manifest
from parcelray.models.vlm import image_size_of
from parcelray.studies.elastic.report import Rows, load_results
from parcelray.studies.elastic.results import OVERALL, ElasticResults, shown
from parcelray.studies.elastic.runs import SYSTEMS, VANILLA, Run, training_of
from parcelray.tracking.run_folder import RunFolder

SHIPPED: Mapping[str, str] = {
    "parcel": "mini_parcel",
    "m3": "mini_m3",
    "mqt": "mini_mqt",
    VANILLA: "mini_vanilla",
}
"""Packaged name of each system that is shipped."""
_MAX_BYTES = 8_000_000
_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# Mini {label}

{what}
It starts from the mini base: PaliGemma-2 with 0.8 M parameters, 64-pixel images and 256 patch tokens. All weights were
trained. The model knows the procedural mini suite and nothing else.

- **Command**: `python pipelines/elastic.py train --systems {system} --seeds {seed} --steps {steps}`
  (identity `{identity}`, git commit `{commit}`)
- **Start**: the mini base, `{start}`
- **Data**: the mini suite's training split, seed {data_seed}, {dense:.0%} of the samples with dense supervision
- **Seed** {seed}, **steps** {steps:,} of {images} images, {precision} arithmetic, AdamW at {rate:g}, {schedule}
- **Budgets of the training**: {budget}
- **Weights**: `model.safetensors`; `manifest.json` has the SHA-256 of every file and the whole configuration

`mini_parcel`, `mini_m3`, `mini_mqt` and `mini_vanilla` were trained with the same data, steps and optimizer.

## Scores

Test split (scenes that the training split does not have), {questions:,} questions, exact match (grounding: box IoU of
at least 0.5), in percent with 95 % intervals over scenes. Majority class: always the most frequent training answer to
this kind of question. Retention is relative to `mini_vanilla` at 256 tokens, as the mean over the families. One seed.

{table}
"""
_WHAT = {
    "parcel": "PARCEL: one model for all even budgets from 16 to 256 visual tokens per image (arXiv 2605.30126).",
    "m3": "M3: average pooling to 16, 64 or 256 visual tokens per image (arXiv 2405.17430).",
    "mqt": "MQT as published: a query resampler for up to 256 visual tokens per image (baseline of arXiv 2605.30126).",
    VANILLA: "The uncompressed model at 256 visual tokens per image, with the same second stage as the elastic models.",
}


def ship(runs: Sequence[Run], job: TrainJob, evaluation: EvaluateJob, assets: Path, console: Console) -> list[Path]:
    """Copies the model of each shipped system into the package and writes its card.

    Args:
        runs: one run for each system of `SHIPPED`; others are ignored.
        job: the training job of the study.
        evaluation: the evaluation job of the study.
        assets: folder of the packaged checkpoints.
        console: for messages.

    Raises:
        UserError: a system has no run or several, is not trained or evaluated, or a checkpoint is too large.
    """
    chosen = [run for run in runs if run.system in SHIPPED]
    if sorted(run.system for run in chosen) != sorted(SHIPPED):
        raise UserError(
            f"the runs are {', '.join(run.name for run in chosen) or 'none'}; give one seed and the systems"
            f" {','.join(SHIPPED)}."
        )
    results = load_results(chosen, job, evaluation)
    folders = []
    for run in chosen:
        training = training_of(run, job)
        source, target = RunFolder(training).local_path("model"), assets / SHIPPED[run.system]
        manifest = verify_manifest(source)
        size = sum(entry.bytes for entry in manifest.files.values())
        if size > _MAX_BYTES:
            raise UserError(f"{source} has {size:,} bytes; a packaged checkpoint may have {_MAX_BYTES:,}.")
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        majority = majority_scores(training.data, results.splits[run.system][0], image_size_of(source))
        card = model_card(run, training, manifest, results, majority)
        (target / "README.md").write_text(card, encoding="utf-8")
        console.print(f"{target}: {size / 1e6:.1f} MB")
        folders.append(target)
    return folders


def model_card(
    run: Run, job: TrainJob, manifest: Manifest, results: ElasticResults, majority: Sequence[SplitScores]
) -> str:
    """Returns the model card of a run, with the scores of its evaluation."""
    budget = job.budget
    values = budget.values()
    return _CARD.format(
        label=SYSTEMS[run.system].label,
        what=_WHAT[run.system],
        system=run.system,
        identity=manifest.extra["identity"],
        start=manifest.extra["start"],
        commit=manifest.git_commit,
        data_seed=manifest.data["seed"],
        dense=manifest.data["dense_fraction"],
        seed=run.seed,
        steps=run.steps,
        images=job.training.images_per_step,
        precision=job.training.precision,
        rate=job.optimizer.learning_rate,
        schedule=job.schedule.type,
        budget=f"{budget.type}, "
        + (", ".join(map(str, values)) if len(values) < 5 else f"{values[0]} to {values[-1]}"),
        questions=sum(len(split.samples) for split in results.splits[run.system][0]),
        table=markdown_table(_score_rows(run.system, results, majority)),
    )


def _score_rows(system: str, results: ElasticResults, majority: Sequence[SplitScores]) -> Rows:
    splits = results.splits[system][0]
    own = [budget for budget in results.budgets if results.used(system, budget) == budget]
    rows = [["", "retention", "score", *results.families]]
    rows.append(["majority class", "-", *_scores(estimates(majority, BLIND), results)])
    if BLIND in splits[0].scores:
        rows.append(["blind (no image)", "-", *_scores(estimates(splits, BLIND), results)])
    for budget in own:
        kept = "100" if system == VANILLA else shown(results.retention(system, budget, OVERALL).interval)
        rows.append([f"{budget} tokens", kept, *_scores(estimates(splits, budget), results)])
    return rows


def _scores(by_family: Mapping[str, Estimate], results: ElasticResults) -> list[str]:
    overall = mean_of(list(by_family.values()))
    return [shown(each.interval) for each in (overall, *(by_family[name] for name in results.families))]
