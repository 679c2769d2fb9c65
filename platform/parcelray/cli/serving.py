"""`parcelray serve` and `parcelray keys`: an endpoint and its API keys."""

from pathlib import Path
from typing import Annotated

import typer

from parcelray.cli.options import Address, AsJson, DryRun, Set, console, path, show

keys_app = typer.Typer(no_args_is_help=True, help="Add, remove and list API keys of an endpoint.")
_KeysFile = Annotated[Path, typer.Option("--file", help="File with the hashes of the keys.", parser=path)]


def serve(
    target: Annotated[
        str,
        typer.Argument(
            help="Job file, for example jobs/serve/mini.yaml, or model: models:/NAME@ALIAS or a folder.",
            show_default=False,
        ),
    ],
    overrides: Set = [],
    host: Annotated[
        str | None,
        typer.Option(
            help="Address to listen on; overrides http.host; default: that of the job (127.0.0.1 if not set). Addresses"
            " other than the loopback need API keys.",
            show_default=False,
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            help="TCP port; overrides http.port; default: that of the job (8000 if not set).", show_default=False
        ),
    ] = None,
    build: Annotated[
        Path | None,
        typer.Option(
            help="Write a file for `serve deploy` and exit; default: serve now.", show_default=False, parser=path
        ),
    ] = None,
    dry_run: DryRun = False,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Serve a model with an OpenAI-compatible API, at any visual-token budget, until Ctrl-C."""
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
    name: Annotated[str, typer.Argument(help="Name of the new key.", show_default=False)],
    file: _KeysFile = Path("runs/serve/keys.txt"),
    per_minute: Annotated[int, typer.Option(min=1, help="Rate limit of the key in requests per minute.")] = 600,
) -> None:
    """Create an API key and print it once; the file keeps only its hash."""
    from parcelray.serving.http.auth import add_key

    key = add_key(file, name, per_minute)
    console(stderr=True).print(f"New key {name}. It is printed only now; {file} keeps its hash.", soft_wrap=True)
    typer.echo(key)


@keys_app.command("remove")
def keys_remove(
    name: Annotated[str, typer.Argument(help="Name of the key to remove.", show_default=False)],
    file: _KeysFile = Path("runs/serve/keys.txt"),
) -> None:
    """Remove an API key. A running `parcelray serve` accepts it until it receives SIGHUP."""
    from parcelray.serving.http.auth import remove_key

    remove_key(file, name)
    console().print(
        f"Removed the key {name} from {file}. Send SIGHUP to a running `parcelray serve` to apply it.",
        soft_wrap=True,
    )


@keys_app.command("list")
def keys_list(file: _KeysFile = Path("runs/serve/keys.txt")) -> None:
    """List the names, rate limits and hashes of the API keys."""
    from rich.table import Table

    from parcelray.serving.http.auth import read_keys

    table = Table("name", "requests per minute", "hash")
    for key in read_keys(file):
        table.add_row(key.name, str(key.per_minute), f"{key.hash[:12]}...")
    console().print(table)
