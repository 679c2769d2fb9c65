"""`parcelray plan`: tokens and memory of a job before it starts."""

from typing import Annotated

import typer

from parcelray.cli.options import AsJson, JobFile, Set, load, load_evaluation, show
from parcelray.errors import UserError


def plan(
    job_file: JobFile,
    overrides: Set = [],
    rows: Annotated[
        int, typer.Option(min=0, help="Number of rows to read of each data set, evenly spread; 0: all.")
    ] = 1000,
    memory_gib: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Memory of one worker, GiB; default: this machine's, divided by the workers.",
            show_default=False,
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="Type of GPU, such as h100, whose memory is the limit; default: none.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the tokens of a job's data at each budget, its predicted peak memory, and the largest batch that fits."""
    from parcelray.config.evaluate import EvaluateJob
    from parcelray.config.serve import ServeJob
    from parcelray.config.train import TrainJob

    job = load(job_file, overrides)
    if isinstance(job, TrainJob):
        from parcelray.training.token_plan import training_token_plan

        found = training_token_plan(job, num_rows=rows, memory_gib=memory_gib, gpu=gpu)
    elif isinstance(job, EvaluateJob):
        from parcelray.evaluation.token_plan import evaluation_token_plan

        job = load_evaluation(job_file, overrides, as_json)
        found = evaluation_token_plan(job, num_rows=rows, memory_gib=memory_gib, gpu=gpu)
    elif isinstance(job, ServeJob):
        from parcelray.serving.memory import serving_token_plan

        found = serving_token_plan(job, memory_gib=memory_gib, gpu=gpu)
    else:
        raise UserError(f"{job_file}: kind is {job.kind}; `parcelray plan` reads train, evaluate and serve jobs.")
    show(found, as_json, lambda value: value.to_rich())
