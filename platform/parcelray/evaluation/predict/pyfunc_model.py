"""The registered model that MLflow loads.

MLflow copies this file into every model version and executes it on load (models from code). No pickle is involved, so
it also loads with `MLFLOW_ALLOW_PICKLE_DESERIALIZATION=False`. The weights are loaded on the first prediction.
"""

import base64
import binascii
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from parcelray.datasets.sample import Sample
from parcelray.errors import UserError
from parcelray.models.checkpoint import resolve_checkpoint

if TYPE_CHECKING:
    from parcelray.evaluation.predict.predictor import Predictor


class ElasticVlmModel(PythonModel):
    """Answers prompts about images, with one visual-token budget per row."""

    def __init__(self) -> None:
        self._predictor: Predictor | None = None

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Generates one answer per row.

        Args:
            context: has the folder of the checkpoint as the artifact `model`.
            model_input: columns prompt, image (base64 of PNG or JPEG bytes) and num_visual_tokens.
            params: unused.

        Returns:
            One column, `answer`, in the order of the rows.

        Raises:
            UserError: an image is not base64, or the model does not support a budget.
        """
        samples = [
            _sample(row, prompt, image)
            for row, (prompt, image) in enumerate(zip(model_input["prompt"], model_input["image"], strict=True))
        ]
        if self._predictor is None:
            self._predictor = _load(Path(context.artifacts["model"]))
        answers = [""] * len(samples)
        budgets = model_input["num_visual_tokens"].tolist()
        for budget in sorted(set(budgets)):
            rows = [row for row, row_budget in enumerate(budgets) if row_budget == budget]
            for row, answer in zip(
                rows, self._predictor.generate([samples[row] for row in rows], num_visual_tokens=budget), strict=True
            ):
                answers[row] = answer
        return pd.DataFrame({"answer": answers})


def _load(folder: Path) -> "Predictor":
    import torch

    from parcelray.evaluation.predict.predictor import Predictor
    from parcelray.models.vlm import load_processor, load_vlm

    checkpoint = resolve_checkpoint(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_vlm(checkpoint.path)
    torch.nn.Module.to(model, device)
    return Predictor(model, load_processor(checkpoint.path), device=device)


def _sample(row: int, prompt: str, image: str) -> Sample:
    try:
        encoded = base64.b64decode(image, validate=True)
    except binascii.Error as error:
        raise UserError(
            f"image of row {row} is not base64 ({error}); send PNG or JPEG bytes as base64, without the prefix data:."
        ) from error
    return Sample(
        id=str(row), benchmark="pyfunc", family="general", task="vqa", images=(encoded,), prompt=prompt, answers=()
    )


set_model(ElasticVlmModel())
