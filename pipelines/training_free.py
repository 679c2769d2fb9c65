"""Every training-free reducer on the mini suite at four retentions: accuracy against compute, against random sampling, and where families break.

Asks the mini LLaVA, which was trained without compression, at 5, 11, 20 and 30 % of its 256 visual tokens, blind and in
full; methods inside the decoder at budgets that they can have. Random sampling runs with five seeds. A second run
computes nothing.

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
    """Runs the pipeline; `--set a.b=c` changes its job."""
    return run_script(
        lambda console: run_reduction_study(load_job_of(EvaluateJob, JOB, overrides_of(sys.argv[1:])), console)
    )


if __name__ == "__main__":
    sys.exit(main())
