"""How much a vision encoder decides: redundancy of the tokens, and accuracy at equal retention, for several models side by side.

By default the mini base (SigLIP) and the mini LLaVA with CLIP and with ConvNeXt; name other vanilla models, of one family of encoders each, as arguments.

    python pipelines/encoders.py [MODEL ...] [--set storage=FOLDER]
"""

import sys
from itertools import takewhile
from pathlib import Path

from rich.console import Console

from parcelray.cluster.attention_studies import study_redundancy
from parcelray.cluster.reduction_study import run_reduction_study
from parcelray.cluster.scripts import overrides_of, run_script
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.loader import load_job_of

JOB = Path(__file__).resolve().parent.parent / "jobs" / "evaluate" / "training_free.yaml"
MODELS = ("mini_base", "mini_llava", "mini_llava_convnext")
METHODS = ("cluster", "average pooling", "spatial", "DivPrune")
"""Those that read nothing but tokens, so that every encoder can have them."""


def run(arguments: list[str], console: Console) -> None:
    """Profiles the models, then compares the methods on each of them."""
    models = list(takewhile(lambda argument: argument != "--set", arguments))
    job = load_job_of(EvaluateJob, JOB, overrides_of(arguments[len(models) :]))
    models = models or list(MODELS)
    study_redundancy(models, console, folder=Path(job.storage) / "studies" / "encoders", tracking=job.tracking)
    for model in models:
        changes = {"name": f"encoders-{Path(model).name}", "model": {"type": "checkpoint", "reference": model}}
        run_reduction_study(EvaluateJob.model_validate(job.model_dump() | changes), console, methods=METHODS)


def main() -> int:
    """Runs the pipeline; `--set a.b=c` changes its job."""
    return run_script(lambda console: run(sys.argv[1:], console))


if __name__ == "__main__":
    sys.exit(main())
