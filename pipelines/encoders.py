"""How much a vision encoder decides: redundancy of the tokens, and accuracy at equal retention, for several models side by side.

By default the mini base (SigLIP) and the mini LLaVA (CLIP); name other vanilla models, of one family of encoders each, as arguments.

    python pipelines/encoders.py [MODEL ...] [--set storage=FOLDER]
"""

import sys
from pathlib import Path

from parcelray.cluster.attention_studies import study_redundancy
from parcelray.cluster.reduction_study import run_reduction_study
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.loader import load_job_of
from parcelray.errors import ParcelrayError, UserError
from parcelray.reports.console import open_console

JOB = Path(__file__).resolve().parent.parent / "jobs" / "evaluate" / "training_free.yaml"
MODELS = ("mini_base", "mini_llava")
METHODS = ("cluster", "average pooling", "spatial", "DivPrune")
"""Those that read nothing but tokens, so that every encoder can have them."""


def main() -> int:
    """Runs the pipeline; `--set a.b=c` changes its job."""
    console = open_console()
    models = [argument for argument in sys.argv[1 : sys.argv.index("--set") if "--set" in sys.argv else None] if argument] or list(MODELS)
    overrides = sys.argv[sys.argv.index("--set") :] if "--set" in sys.argv else []
    try:
        if len(overrides) % 2 or any(flag != "--set" for flag in overrides[::2]):
            raise UserError(f"{' '.join(overrides)} is not understood; after the models this pipeline takes only --set a.b=c, as often as you like.")
        job = load_job_of(EvaluateJob, JOB, overrides[1::2])
        study_redundancy(models, console, folder=Path(job.storage) / "studies" / "encoders", tracking=job.tracking)
        for model in models:
            changes = {"name": f"encoders-{Path(model).name}", "model": {"type": "checkpoint", "reference": model}}
            run_reduction_study(EvaluateJob.model_validate(job.model_dump() | changes), console, methods=METHODS)
    except UserError as error:
        console.print(f"error: {error}", markup=False, highlight=False)
        return 2
    except ParcelrayError as error:
        console.print(f"failed: {error}", markup=False, highlight=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
