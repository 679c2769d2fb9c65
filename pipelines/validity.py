"""Do attended tokens matter? Each visual token left out of 120 questions of a job; correlation with attention, against maps that are moved at random.

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
    """Runs the study; a key of its own is `count=NUMBER`."""
    count, changes = split_count(overrides_of(arguments), COUNT)
    job = load_job_of(EvaluateJob, JOB, changes)
    folder = Path(job.storage) / "studies" / f"validity-{job.name}"
    study_validity(job.model.reference, console, count=count, job=job, folder=folder, tracking=job.tracking)


def main() -> int:
    """Runs the pipeline; `--set a.b=c` changes its job."""
    return run_script(lambda console: run(sys.argv[1:], console))


if __name__ == "__main__":
    sys.exit(main())
