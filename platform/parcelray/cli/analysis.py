"""`parcelray analyze`: what a model's visual tokens and its attention to them are like."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parcelray.cli.options import Address, AsJson, JobFile, Set, console, write_json

if TYPE_CHECKING:
    from parcelray.config.train import TrackingConfig

analyze_app = typer.Typer(no_args_is_help=True, help="Study a model's visual tokens and its attention to them.")

_Images = Annotated[str, typer.Option(help="mini (the mini suite), or a folder of images.")]
_Output = Annotated[
    Path | None, typer.Option(help="Folder for numbers and pictures; default: below runs/analyze.", show_default=False)
]
_TrackingUri = Annotated[
    str | None, typer.Option(help="MLflow tracking URI, or none; default: as for jobs.", show_default=False)
]


@analyze_app.command("saliency")
def saliency(
    model: Annotated[str, typer.Argument(help="A model reference, such as mini_llava.", show_default=False)],
    images: _Images = "mini",
    prompts: Annotated[
        list[str], typer.Option("--prompt", help="Asked of every image; repeatable.", show_default=False)
    ] = [],
    count: Annotated[int, typer.Option(min=2, help="Images.")] = 24,
    output: _Output = None,
    tracking_uri: _TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Saliency against the prompt: rank agreement, what draws attention, and heat maps."""
    from parcelray.studies.attention import study_saliency

    folder = output or Path("runs/analyze/saliency") / _slug(model)
    reports = study_saliency(
        model,
        console(stderr=as_json),
        images=images,
        count=count,
        prompts=prompts,
        folder=folder,
        tracking=_tracking(tracking_uri),
    )
    if as_json:
        write_json({name: report.to_dict() for name, report in reports.items()})


@analyze_app.command("validity")
def validity(
    model: Annotated[str, typer.Argument(help="A model reference, such as mini_llava.", show_default=False)],
    count: Annotated[int, typer.Option(min=2, help="Image-question pairs of the mini suite.")] = 100,
    permutations: Annotated[int, typer.Option(min=100, help="Of the test.")] = 1000,
    output: _Output = None,
    tracking_uri: _TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Attention against the loss of likelihood when a token is left out, with a permutation test."""
    from parcelray.studies.attention import study_validity

    folder = output or Path("runs/analyze/validity") / _slug(model)
    result = study_validity(
        model,
        console(stderr=as_json),
        count=count,
        permutations=permutations,
        folder=folder,
        tracking=_tracking(tracking_uri),
    )
    if as_json:
        write_json({name: each.to_dict() for name, each in result.items()})


@analyze_app.command("redundancy")
def redundancy(
    models: Annotated[list[str], typer.Argument(help="Model references, side by side.", show_default=False)],
    images: _Images = "mini",
    count: Annotated[int, typer.Option(min=2, help="Images.")] = 64,
    output: _Output = None,
    tracking_uri: _TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Effective rank, cosines, and the variance that a few clusters explain."""
    from parcelray.studies.attention import study_redundancy

    folder = output or Path("runs/analyze/redundancy") / "-".join(_slug(model) for model in models)
    profiles = study_redundancy(
        models, console(stderr=as_json), images=images, count=count, folder=folder, tracking=_tracking(tracking_uri)
    )
    if as_json:
        write_json({name: each.to_dict() for name, each in profiles.items()})


@analyze_app.command("adaptive")
def adaptive(
    job_file: JobFile,
    overrides: Set = [],
    output: _Output = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Budgets chosen per image and question against fixed ones: an escalation rule, a predictor, the oracle; with calibration."""
    from parcelray.config.evaluate import EvaluateJob
    from parcelray.config.loader import load_job_of
    from parcelray.evaluation.adaptive.study import study_adaptive

    job = load_job_of(EvaluateJob, job_file, overrides)
    run = study_adaptive(
        job, console(stderr=as_json), folder=output or Path("runs/analyze/adaptive") / job.name, address=address
    )
    if as_json:
        write_json(run.study.to_dict() | {"folder": str(run.folder)})


def _tracking(uri: str | None) -> "TrackingConfig":
    from parcelray.config.train import TrackingConfig

    return TrackingConfig() if uri is None else TrackingConfig(uri=None if uri == "none" else uri)


def _slug(model: str) -> str:
    return "".join(character if character.isalnum() or character in "-_" else "_" for character in model).strip("_")
