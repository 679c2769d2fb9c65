"""`parcelray runs`: the stored runs of a folder or of object storage."""

from pathlib import Path
from typing import Annotated

import typer

from parcelray.cli.options import AsJson, console, path, print_progress, show, write_json

runs_app = typer.Typer(no_args_is_help=True, help="List, copy and delete the runs of a folder or of object storage.")

_Storage = Annotated[
    str, typer.Option(help="Folder or URI of the runs, as `storage` of a job: runs, s3://BUCKET/runs or gs://...")
]


@runs_app.command("list")
def runs_list(storage: _Storage = "runs", as_json: AsJson = False) -> None:
    """List the runs with their state, size and age, oldest first."""
    from parcelray.tracking.runs import list_runs

    show(list_runs(storage), as_json, lambda value: value.to_rich())


@runs_app.command("pull")
def runs_pull(
    run: Annotated[
        str, typer.Argument(help="KIND/NAME, such as train/tiny, or the URI of a run folder.", show_default=False)
    ],
    storage: _Storage = "runs",
    output: Annotated[
        Path, typer.Option(help="Folder that receives the run as KIND/NAME.", parser=path, metavar="PATH")
    ] = Path("runs"),
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="Copy training checkpoints, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Copy a run from object storage to this host; run the same command again to resume an interrupted copy.

    An evaluation is copied with the predictions of its model.
    """
    from parcelray.tracking.runs import pull_run

    folder = pull_run(run, storage, output, checkpoints=checkpoints, on_file=print_progress)
    write_json({"folder": str(folder)}) if as_json else console().print(f"{folder}", soft_wrap=True)


@runs_app.command("prune")
def runs_prune(
    runs: Annotated[
        list[str], typer.Argument(help="Runs as KIND/NAME; none: all that --older-than selects.", show_default=False)
    ] = [],
    storage: _Storage = "runs",
    older_than: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="DAYS", help="Only runs without a newer file, days; default: any age.", show_default=False
        ),
    ] = None,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Delete only the training checkpoints, and only of finished runs.")
    ] = False,
    predictions: Annotated[
        bool,
        typer.Option("--predictions", help="Delete the predictions that no evaluation or search of the storage uses."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it, only print what would be deleted.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete runs, their checkpoints, or unused predictions."""
    from parcelray.tracking.runs import prune_runs

    pruned = prune_runs(
        storage, runs, older_than_days=older_than, checkpoints=checkpoints, predictions=predictions, delete=yes
    )
    show(pruned, as_json, lambda value: value.to_rich())
    if not yes and not as_json:
        console().print("Nothing was deleted; add --yes to delete.")
