"""`parcelray analyze`: studies of visual tokens, of attention to them, and of adaptive budgets."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parcelray.cli.options import Address, AsJson, JobFile, Set, console, integers, load_evaluation, path, write_json

if TYPE_CHECKING:
    from parcelray.config.train import TrackingConfig

analyze_app = typer.Typer(no_args_is_help=True, help="Analyze visual tokens, attention to them, and adaptive budgets.")

_Models = Annotated[list[str], typer.Argument(help="One or more model references to compare.", show_default=False)]
_Images = Annotated[str, typer.Option(help="Source of the images: mini (the mini suite) or a folder.")]
_Output = Annotated[
    Path | None,
    typer.Option(
        help="Folder for the tables and figures; default: runs/analyze/COMMAND/MODEL_OR_JOB.",
        show_default=False,
        parser=path,
    ),
]
_TrackingUri = Annotated[
    str | None,
    typer.Option(
        help="MLflow tracking URI, or `none` to log nothing; default: sqlite:///runs/mlflow.db.",
        show_default=False,
    ),
]


@analyze_app.command("saliency")
def saliency(
    model: Annotated[str, typer.Argument(help="Model reference, for example mini_llava.", show_default=False)],
    images: _Images = "mini",
    prompts: Annotated[
        list[str],
        typer.Option(
            "--prompt",
            help="Prompt for every image; default: the prompts of the mini suite. Images of a folder need at least two"
            " prompts. Repeatable.",
            show_default=False,
        ),
    ] = [],
    count: Annotated[int, typer.Option(min=2, help="Number of images.")] = 24,
    output: _Output = None,
    tracking_uri: _TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Compare attention maps across prompts: rank agreement, attention independent of the prompt, heat maps."""
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
    model: Annotated[str, typer.Argument(help="Model reference, for example mini_llava.", show_default=False)],
    count: Annotated[int, typer.Option(min=2, help="Number of image-question pairs of the mini suite.")] = 100,
    permutations: Annotated[int, typer.Option(min=100, help="Number of permutations of the permutation test.")] = 1000,
    output: _Output = None,
    tracking_uri: _TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Correlate attention with the likelihood lost when a visual token is left out, with a permutation test."""
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
    models: _Models,
    images: _Images = "mini",
    count: Annotated[int, typer.Option(min=2, help="Number of images.")] = 64,
    output: _Output = None,
    tracking_uri: _TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Measure redundancy of visual tokens: effective rank, cosine similarities, variance explained by clusters."""
    from parcelray.studies.attention import study_redundancy

    folder = output or Path("runs/analyze/redundancy") / "-".join(_slug(model) for model in models)
    profiles = study_redundancy(
        models, console(stderr=as_json), images=images, count=count, folder=folder, tracking=_tracking(tracking_uri)
    )
    if as_json:
        write_json({name: each.to_dict() for name, each in profiles.items()})


@analyze_app.command("spectral")
def spectral(
    models: _Models,
    images: _Images = "mini",
    count: Annotated[int, typer.Option(min=8, help="Number of images.")] = 64,
    pooled_budget: Annotated[
        int, typer.Option(min=1, help="Budget at which the concentration of the anchors is compared (visual tokens).")
    ] = 64,
    budget: Annotated[
        int, typer.Option(min=1, help="Budget at which the power of anchors and queries is compared (visual tokens).")
    ] = 256,
    output: _Output = None,
    tracking_uri: _TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Measure spatial spectra of anchors and query tokens: radial power, concentration, mean frequency."""
    from parcelray.studies.tokens import study_spectra

    folder = output or Path("runs/analyze/spectral") / "-".join(_slug(model) for model in models)
    study = study_spectra(
        models,
        console(stderr=as_json),
        images=images,
        count=count,
        pooled_budget=pooled_budget,
        budget=budget,
        folder=folder,
        tracking=_tracking(tracking_uri),
    )
    if as_json:
        write_json(study.to_dict())


@analyze_app.command("tokens")
def tokens(
    models: _Models,
    images: _Images = "mini",
    count: Annotated[int, typer.Option(min=8, help="Number of images.")] = 256,
    budgets: Annotated[
        str,
        typer.Option(
            help="Budgets (visual tokens per image), separated by commas; default: 16, 32, 64, 128 and 256, as far as"
            " the model supports them.",
            show_default=False,
        ),
    ] = "",
    output: _Output = None,
    tracking_uri: _TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Measure how anchors and query tokens divide the work: redundancy, attention, coverage, overlap."""
    from parcelray.studies.tokens import study_tokens

    folder = output or Path("runs/analyze/tokens") / "-".join(_slug(model) for model in models)
    found = study_tokens(
        models,
        console(stderr=as_json),
        images=images,
        count=count,
        budgets=integers(budgets, "--budgets") if budgets else (),
        folder=folder,
        tracking=_tracking(tracking_uri),
    )
    if as_json:
        write_json({name: [each.to_dict() for each in parts] for name, parts in found.items()})


@analyze_app.command("adaptive")
def adaptive(
    job_file: JobFile,
    overrides: Set = [],
    output: _Output = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Compare budgets chosen per image and question with fixed budgets.

    The policies are an escalation rule, a predictor and the oracle; calibration is reported too.
    """
    from parcelray.evaluation.adaptive.study import study_adaptive

    job = load_evaluation(job_file, overrides, as_json)
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
