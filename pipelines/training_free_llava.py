"""Studies Cluster & Aggregate on LLaVA-1.5-7B at 64 of 576 visual tokens, on GQA and TextVQA.

All token placements are compared with random and spatial sampling, with all tokens, and blind. For another model, the
budget is the same share of its tokens.

    python pipelines/training_free_llava.py [--dry-run] [--set 'benchmarks=[{name: gqa, data: FOLDER}, {name:
    textvqa_val, data: FOLDER}]']
"""

import sys
from pathlib import Path

from rich.console import Console

from parcelray.cli.scripts import overrides_of, run_script
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.loader import load_job_of
from parcelray.evaluation.plan import evaluation_plan
from parcelray.studies.reduction.study import run_reduction_study

JOB = Path(__file__).resolve().parent.parent / "jobs" / "evaluate" / "training_free_llava.yaml"
METHODS = ("cluster", "cluster, no size bias", "cluster, contiguous")
SHARE = 64 / 576
DRY_RUN = "--dry-run"


def run(arguments: list[str], console: Console) -> None:
    """Runs the study; with --dry-run, only prints the plan of its first evaluation."""
    job = load_job_of(EvaluateJob, JOB, overrides_of([argument for argument in arguments if argument != DRY_RUN]))
    if DRY_RUN in arguments:
        console.print(evaluation_plan(job).to_rich())
        return
    run_reduction_study(job, console, methods=METHODS, shares=(SHARE,))


def main() -> int:
    """Runs the pipeline with the command-line arguments."""
    return run_script(lambda console: run(sys.argv[1:], console))


if __name__ == "__main__":
    sys.exit(main())
