"""Compares vision encoders: token redundancy, and retention of the same reduction methods at equal budgets.

The default models are three mini LLaVAs with CLIP, SigLIP and ConvNeXt, trained in the same way.
`--set models.NAME=REF` replaces or adds a model. The budgets are the four square numbers nearest to 5, 11, 20 and 30 %
of the tokens, because average pooling supports only square numbers.

    python pipelines/encoders.py [--set models.SigLIP=FOLDER ...] [--set storage=FOLDER]
"""

import sys
from pathlib import Path

from rich.console import Console

from parcelray.cli.scripts import overrides_of, run_script
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.loader import load_job_of
from parcelray.studies.encoders import run_encoder_study

JOB = Path(__file__).resolve().parent.parent / "jobs" / "evaluate" / "training_free.yaml"
MODELS = {"CLIP": "mini_llava", "SigLIP": "mini_llava_siglip", "ConvNeXt": "mini_llava_convnext"}
OWN = "models."


def run(arguments: list[str], console: Console) -> None:
    """Runs the study."""
    changes = overrides_of(arguments)
    named = [change.removeprefix(OWN).partition("=") for change in changes if change.startswith(OWN)]
    job = load_job_of(EvaluateJob, JOB, [change for change in changes if not change.startswith(OWN)])
    run_encoder_study(MODELS | {name: reference for name, _, reference in named}, job, console)


def main() -> int:
    """Runs the pipeline with the command-line arguments."""
    return run_script(lambda console: run(sys.argv[1:], console))


if __name__ == "__main__":
    sys.exit(main())
