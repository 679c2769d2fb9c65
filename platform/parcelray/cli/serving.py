"""`parcelray serve` and `parcelray keys`: an endpoint, and who may use it."""

from pathlib import Path
from typing import Annotated

import typer

from parcelray.cli.options import Address, AsJson, DryRun, Set, console, show

keys_app = typer.Typer(no_args_is_help=True, help="API keys of an endpoint: a file of their hashes.")
_KeysFile = Annotated[Path, typer.Option("--file", help="The file of hashes.")]


def serve(
    target: Annotated[
        str,
        typer.Argument(
            help="A job file such as jobs/serve/mini.yaml, or a model: models:/NAME@ALIAS, a folder.",
            show_default=False,
        ),
    ],
    overrides: Set = [],
    host: Annotated[
        str | None,
        typer.Option(help="Address to listen on; other than the loopback's only with keys.", show_default=False),
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port.", show_default=False)] = None,
    build: Annotated[
        Path | None, typer.Option(help="Write the file that `serve deploy` takes, and stop.", show_default=False)
    ] = None,
    dry_run: DryRun = False,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Answer requests, OpenAI-compatible, at any visual-token budget; until Ctrl-C."""
    from parcelray.serving.plan import pin, serve_job, serving_plan

    job = serve_job(target, overrides, host=host, port=port)
    if dry_run:
        show(serving_plan(job), as_json, lambda plan: plan.to_rich())
        return
    from parcelray.serving.run import run_endpoint

    pinned = pin(job)
    if build is not None:
        for warning in pinned.warnings:
            console(stderr=True).print(warning, style="yellow", soft_wrap=True)
        build.write_text(pinned.to_yaml(), encoding="utf-8")
        console().print(f"Wrote {build}: serve deploy {build}", soft_wrap=True)
        return
    run_endpoint(pinned, console(stderr=as_json), address=address)


@keys_app.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(help="Who gets the key.", show_default=False)],
    file: _KeysFile = Path("runs/serve/keys.txt"),
    per_minute: Annotated[int, typer.Option(min=1, help="Requests that it may make in a minute.")] = 600,
) -> None:
    """Make a key. It is shown once; the file keeps only its hash."""
    from parcelray.serving.http.auth import add_key

    key = add_key(file, name, per_minute)
    console(stderr=True).print(f"Key of {name}, shown this once; its hash is in {file}", soft_wrap=True)
    typer.echo(key)


@keys_app.command("remove")
def keys_remove(
    name: Annotated[str, typer.Argument(help="Whose key goes.", show_default=False)],
    file: _KeysFile = Path("runs/serve/keys.txt"),
) -> None:
    """Remove a key. A running `parcelray serve` takes it as valid until it gets SIGHUP."""
    from parcelray.serving.http.auth import remove_key

    remove_key(file, name)
    console().print(
        f"Removed the key of {name} from {file}; send SIGHUP to a running `parcelray serve`",
        soft_wrap=True,
    )


@keys_app.command("list")
def keys_list(file: _KeysFile = Path("runs/serve/keys.txt")) -> None:
    """List the owners of keys."""
    from rich.table import Table

    from parcelray.serving.http.auth import read_keys

    table = Table("name", "requests a minute", "hash")
    for key in read_keys(file):
        table.add_row(key.name, str(key.per_minute), f"{key.hash[:12]}...")
    console().print(table)
