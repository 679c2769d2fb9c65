"""Runs the study of training-free reduction with all methods on the mini suite, at four shares of the tokens.

It evaluates the mini LLaVA, which was trained without compression, at 5, 11, 20 and 30 % of its 256 visual tokens, with
all tokens, and blind. Methods inside the decoder use the nearest budgets that they support. Random sampling runs with
five seeds. A second run computes nothing.

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
    """Runs the pipeline with the command-line arguments."""
    return run_script(
        lambda console: run_reduction_study(load_job_of(EvaluateJob, JOB, overrides_of(sys.argv[1:])), console)
    )


if __name__ == "__main__":
    sys.exit(main())
