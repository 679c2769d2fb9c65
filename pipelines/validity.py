"""Measures whether tokens with high attention matter for the answer, on 120 questions of a job file.

Each visual token is left out in turn. The loss of likelihood is correlated with attention, and tested against attention
maps that are shifted at random.

    python pipelines/validity.py [--set count=120] [--set 'benchmarks=[{name: gqa, data: FOLDER}]']
"""

import sys
from pathlib import Path

from rich.console import Console

from parcelray.cli.scripts import overrides_of, run_script, split_count
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.loader import load_job_of
from parcelray.studies.attention import study_validity

JOB = Path(__file__).resolve().parent.parent / "jobs" / "evaluate" / "attention.yaml"
COUNT = 120


def run(arguments: list[str], console: Console) -> None:
    """Runs the study; `count=NUMBER` among the overrides sets the number of images or questions."""
    count, changes = split_count(overrides_of(arguments), COUNT)
    job = load_job_of(EvaluateJob, JOB, changes)
    folder = Path(job.storage) / "studies" / f"validity-{job.name}"
    study_validity(job.model.reference, console, count=count, job=job, folder=folder, tracking=job.tracking)


def main() -> int:
    """Runs the pipeline; `--set a.b=c` overrides keys of its job file."""
    return run_script(lambda console: run(sys.argv[1:], console))


if __name__ == "__main__":
    sys.exit(main())
