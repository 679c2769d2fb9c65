"""Every training-free reducer on the mini suite at four retentions: accuracy against compute, against random sampling, and where families break.

Asks the mini LLaVA, which was trained without compression, at 5, 11, 20 and 30 % of its 256 visual tokens, blind and in full; methods inside
the decoder at budgets that they can have. Random sampling runs with five seeds. A second run computes nothing.

    python pipelines/training_free.py [--set storage=FOLDER]
"""

import sys
from pathlib import Path

from parcelray.cluster.reduction_study import run_reduction_study
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.loader import load_job_of
from parcelray.errors import ParcelrayError, UserError
from parcelray.reports.console import open_console

JOB = Path(__file__).resolve().parent.parent / "jobs" / "evaluate" / "training_free.yaml"


def main() -> int:
    """Runs the pipeline; `--set a.b=c` changes its job."""
    console = open_console()
    arguments = sys.argv[1:]
    try:
        if len(arguments) % 2 or any(flag != "--set" for flag in arguments[::2]):
            raise UserError(f"{' '.join(arguments)} is not understood; this pipeline takes only --set a.b=c, as often as you like.")
        run_reduction_study(load_job_of(EvaluateJob, JOB, arguments[1::2]), console)
    except UserError as error:
        console.print(f"error: {error}", markup=False, highlight=False)
        return 2
    except ParcelrayError as error:
        console.print(f"failed: {error}", markup=False, highlight=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
