"""Evaluates every training-free reducer on the mini suite at four budgets.

Reports accuracy against compute, comparisons with random sampling, and the budgets at which families break down. The
mini LLaVA, which was trained without compression, is evaluated at 5, 11, 20 and 30 % of its 256 visual tokens, blind
and in full. Methods inside the decoder use budgets that they support. Random sampling runs with five seeds.
A second run computes nothing.

    python pipelines/training_free.py [--set storage=FOLDER]
"""

import sys
from pathlib import Path

from parcelray.cli.scripts import overrides_of, run_script
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.loader import load_job_of
from parcelray.studies.reduction.study import run_reduction_study

JOB = Path(__file__).resolve().parent.parent / "jobs" / "evaluate" / "training_free.yaml"


def main() -> int:
    """Runs the pipeline; `--set a.b=c` overrides keys of its job file."""
    return run_script(
        lambda console: run_reduction_study(load_job_of(EvaluateJob, JOB, overrides_of(sys.argv[1:])), console)
    )


if __name__ == "__main__":
    sys.exit(main())
