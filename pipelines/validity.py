"""Studies whether attended tokens matter, by leaving out each visual token of 120 samples of a job.

The loss without a token is correlated with its attention, and tested against attention maps that are shifted at random.

    python pipelines/validity.py [--set count=120] [--set 'benchmarks=[{name: gqa, data: FOLDER}]']
"""

import sys
from pathlib import Path

from rich.console import Console

from parcelray.cli.scripts import overrides_of, run_script, split_count
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.loader import load_job_of
from parcelray.studies.attention import study_validity
from parcelray.tracking.run_folder import study_folder

JOB = Path(__file__).resolve().parent.parent / "jobs" / "evaluate" / "attention.yaml"
COUNT = 120


def run(arguments: list[str], console: Console) -> None:
    """Runs the study; the argument `--set count=NUMBER` sets the number of samples."""
    count, changes = split_count(overrides_of(arguments), COUNT)
    job = load_job_of(EvaluateJob, JOB, changes)
    with study_folder(job.storage, f"studies/validity-{job.name}", console) as folder:
        study_validity(job.model.reference, console, count=count, job=job, folder=folder, tracking=job.tracking)


def main() -> int:
    """Runs the pipeline with the command-line arguments."""
    return run_script(lambda console: run(sys.argv[1:], console))


if __name__ == "__main__":
    sys.exit(main())
