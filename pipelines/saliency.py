"""Studies how much saliency depends on the prompt, on the samples of a job.

The study gives rank agreement by layer and head, the patch properties that attract attention, and heat maps. It uses
48 images, each with its own prompt and those of two other images. `parcelray analyze saliency` does the same with a
folder of images and given prompts.

    python pipelines/saliency.py [--set count=48] [--set 'benchmarks=[{name: gqa, data: FOLDER}]']
"""

import sys
from pathlib import Path

from rich.console import Console

from parcelray.cli.scripts import overrides_of, run_script, split_count
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.loader import load_job_of
from parcelray.studies.attention import study_saliency
from parcelray.tracking.run_folder import study_folder

JOB = Path(__file__).resolve().parent.parent / "jobs" / "evaluate" / "attention.yaml"
COUNT = 48


def run(arguments: list[str], console: Console) -> None:
    """Runs the study; the argument `--set count=NUMBER` sets the number of images."""
    count, changes = split_count(overrides_of(arguments), COUNT)
    job = load_job_of(EvaluateJob, JOB, changes)
    with study_folder(job.storage, f"studies/saliency-{job.name}", console) as folder:
        study_saliency(job.model.reference, console, count=count, job=job, folder=folder, tracking=job.tracking)


def main() -> int:
    """Runs the pipeline with the command-line arguments."""
    return run_script(lambda console: run(sys.argv[1:], console))


if __name__ == "__main__":
    sys.exit(main())
