"""`parcelray config`: validates job files, prints them with their defaults, and prints their JSON schemas."""

import sys
from typing import Annotated

import typer

from parcelray.cli.options import AsJson, JobFile, Set, console, load, write_json
from parcelray.errors import UserError

config_app = typer.Typer(no_args_is_help=True, help="Validate job files, print their defaults and their JSON schema.")


@config_app.command("validate")
def config_validate(job_file: JobFile, overrides: Set = []) -> None:
    """Validate a job file; exit code 2 and one line per error if it is invalid."""
    from parcelray.config.identity import identity

    console().print(f"{job_file} is legal: {identity(load(job_file, overrides))}", soft_wrap=True)


@config_app.command("show")
def config_show(job_file: JobFile, overrides: Set = [], as_json: AsJson = False) -> None:
    """Print a job file with all defaults filled in."""
    import yaml

    data = load(job_file, overrides).model_dump(mode="json")
    write_json(data) if as_json else sys.stdout.write(yaml.safe_dump(data, sort_keys=False))


@config_app.command("schema")
def config_schema(
    kind: Annotated[str, typer.Argument(help="Kind of job: train, tune, evaluate, promote or serve.")] = "train",
) -> None:
    """Print the JSON schema of one kind of job file, for use in an editor."""
    from parcelray.config.loader import JOB_MODELS

    if kind not in JOB_MODELS:
        raise UserError(f"kind is {kind!r}; legal: {', '.join(JOB_MODELS)}. Give one of them.")
    write_json(JOB_MODELS[kind].model_json_schema())
