"""Compares vision encoders: redundancy of their tokens and retention at equal budgets, on three equally trained models.

The models are mini LLaVAs with CLIP, SigLIP and ConvNeXt towers. `models.NAME=REFERENCE` replaces or adds a model. The
budgets are the four square numbers nearest to 5, 11, 20 and 30 % of the tokens, which average pooling supports too.

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
    """Runs the pipeline; `--set a.b=c` overrides keys of its job file."""
    return run_script(lambda console: run(sys.argv[1:], console))


if __name__ == "__main__":
    sys.exit(main())
