"""Trains and compares elastic models from the mini base: PARCEL, M3, MQT and the vanilla base (docs/elastic.md).

    python pipelines/elastic.py choose     # start, schedule and distillation, on validation questions
    python pipelines/elastic.py train      # five systems, three seeds, 1,500 steps
    python pipelines/elastic.py evaluate   # on test questions, after the trainings
    python pipelines/elastic.py report     # tables, figure and targets, from the stored predictions
    python pipelines/elastic.py ship --seeds 4 --steps 4000   # the packaged checkpoints, trained and evaluated before

`--systems`, `--seeds` and `--steps` select the runs. Finished parts are found, and an interrupted one is resumed. Start
the same command once per core: the processes share the work. `--set a.b=c` changes a key of the training, and
`--set evaluation.a.b=c` one of the evaluation.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from parcelray.cli.scripts import run_script
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.loader import load_job_of
from parcelray.config.train import TrainJob
from parcelray.studies.elastic.choice import choice_markdown, outcomes, train_choices
from parcelray.studies.elastic.report import fill_page, load_results, write_report
from parcelray.studies.elastic.runs import SYSTEMS, evaluate_runs, runs_of, train_runs
from parcelray.studies.elastic.ship import ship
from parcelray.tracking.run_folder import storage_folder

ROOT = Path(__file__).resolve().parent.parent
JOBS = ROOT / "jobs"
OF_EVALUATION = "evaluation."
STAGES = ("choose", "train", "evaluate", "report", "ship")


def run(arguments: Sequence[str], console: Console) -> None:
    """Runs one stage."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    own = [each for each in options.set if not each.startswith(OF_EVALUATION)]
    theirs = [each.removeprefix(OF_EVALUATION) for each in options.set if each.startswith(OF_EVALUATION)]
    job = load_job_of(TrainJob, JOBS / "train" / "elastic.yaml", own)
    evaluation = load_job_of(EvaluateJob, JOBS / "evaluate" / "elastic.yaml", theirs)
    runs = runs_of(options.systems, options.seeds, options.steps)
    # The processes that share the work lock files there.
    folder = storage_folder(job.storage) / "elastic"
    if options.stage == "choose":
        train_choices(job, console)
        table = choice_markdown(outcomes(job))
        console.print(table, markup=False, soft_wrap=True)
        if options.page is not None:
            fill_page(options.page, {"choice": table})
    elif options.stage == "train":
        train_runs(runs, job, console)
    elif options.stage == "evaluate":
        evaluate_runs(runs, job, evaluation, console)
    elif options.stage == "report":
        write_report(load_results(runs, job, evaluation), options.steps, folder, options.page, console)
    else:
        ship(runs, job, evaluation, ROOT / "platform" / "parcelray" / "assets", console)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python pipelines/elastic.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--systems", type=_names, default=list(SYSTEMS), help=f"default: {','.join(SYSTEMS)}")
    parser.add_argument("--seeds", type=_numbers, default=[1, 2, 3], help="default: 1,2,3")
    parser.add_argument("--steps", type=int, default=1500, help="training steps of each run; default: 1500")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of this process; default: 1")
    parser.add_argument("--page", type=Path, help="Markdown page whose tables `choose` or `report` replaces")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="may be repeated")
    return parser.parse_args(arguments)


def _names(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> int:
    """Runs the pipeline with the command-line arguments."""
    return run_script(lambda console: run(sys.argv[1:], console))


if __name__ == "__main__":
    sys.exit(main())
