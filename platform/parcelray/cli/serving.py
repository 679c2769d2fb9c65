"""`parcelray serve`, `parcelray endpoint` and `parcelray keys`: an endpoint, those of a cluster, and API keys."""

import functools
from pathlib import Path
from typing import Annotated

import typer

from parcelray.cli.options import Address, AsJson, DryRun, JobsAddress, Set, console, path, show, write_json

endpoint_app = typer.Typer(no_args_is_help=True, help="Show, update and stop the endpoints of a Ray cluster.")
keys_app = typer.Typer(no_args_is_help=True, help="Add, remove and list API keys of an endpoint.")
EndpointName = Annotated[
    str, typer.Argument(help="Name of the endpoint, as printed by `parcelray endpoint status`.", show_default=False)
]
_KeysFile = Annotated[Path, typer.Option("--file", help="File with the hashes of the keys.", parser=path)]


def serve(  # noqa: PLR0913
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
    detach: Annotated[
        bool,
        typer.Option(
            "--detach",
            help="Hand the endpoint over to the cluster and exit when it answers; overrides detached. `parcelray"
            " endpoint` shows, updates and stops it.",
        ),
    ] = False,
    dry_run: DryRun = False,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Serve a model with an OpenAI-compatible API, at any visual-token budget, until Ctrl-C."""
    from parcelray.serving.plan import pin, serve_job, serving_plan

    changes = [*overrides, *(["detached=true"] if detach else [])]
    job = serve_job(target, changes, host=host, port=port)
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


@endpoint_app.command("status")
def endpoint_status(
    name: Annotated[
        str | None, typer.Argument(help="Name of the endpoint; default: all endpoints.", show_default=False)
    ] = None,
    address: JobsAddress = None,
    as_json: AsJson = False,
) -> None:
    """Show the endpoints of a cluster: status, address, versions and replicas."""
    from parcelray.serving.deployments import RemoteCluster, endpoint_states, states_table

    states = endpoint_states(RemoteCluster(address), name)
    if as_json:
        write_json([state.to_dict() for state in states])
    else:
        console().print(states_table(states))


@endpoint_app.command("update")
def endpoint_update(name: EndpointName, overrides: Set = [], address: JobsAddress = None) -> None:
    """Resolve the model references of an endpoint again, and roll over to the result without downtime."""
    from parcelray.serving.deployments import RemoteCluster, update

    say = functools.partial(console().print, markup=False, soft_wrap=True)
    pinned = update(RemoteCluster(address), name, overrides, say)
    for warning in pinned.warnings:
        console(stderr=True).print(warning, style="yellow", soft_wrap=True)
    console().print(f"{name} now serves {pinned.champion.pinned}", soft_wrap=True)


@endpoint_app.command("stop")
def endpoint_stop(name: EndpointName, address: JobsAddress = None) -> None:
    """Stop an endpoint after its requests in flight are finished."""
    from parcelray.serving.deployments import RemoteCluster, stop

    stop(RemoteCluster(address), name)
    console().print(f"Stopped {name}", soft_wrap=True)


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
