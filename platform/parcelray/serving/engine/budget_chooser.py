"""Chooses the visual-token budget of a request from its images and question, with a predictor fitted by evaluation.

The vision tower's output does not depend on the budget, so the patch features exist before the choice is made.

Shapes: N patches, D vision width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from parcelray.config.serve import InputPolicyConfig
from parcelray.errors import UserError
from parcelray.evaluation.adaptive.budget_predictor import BudgetPredictor
from parcelray.evaluation.adaptive.budget_signals import SignalReader, pool
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.serving.engine.engine import GenerateRequest


class BudgetChooser:
    """Chooses budgets as `BudgetPredictor.choose` does offline.

    Args:
        predictor: predictor that was fitted for this checkpoint.
        model: model in evaluation mode, on its device.
        processor: processor of the same checkpoint.
        price: probability of a correct answer that one visual token must add; None: the predictor's own price.

    Raises:
        UserError: the predictor needs other signals than this model produces.
    """

    def __init__(
        self, predictor: BudgetPredictor, model: ElasticVLM, processor: ElasticProcessor, *, price: float | None = None
    ) -> None:
        self._predictor = predictor
        self._reader = SignalReader(model, processor, device=str(model.lm_head.weight.device))
        self._price = price
        if predictor.signals != self._reader.names:
            raise UserError(
                f"The budget predictor was fitted on {len(predictor.signals)} signals, but this model produces"
                f" {len(self._reader.names)} signals or differently named ones; serve the checkpoint that it was"
                " fitted on, or fit it again."
            )

    def choose(self, request: GenerateRequest, features: Mapping[str, Tensor], max_tokens: int) -> GenerateRequest:
        """Returns a request with the budget that is chosen from its `choices`.

        Args:
            request: request with choices, the smallest of which fits.
            features: patch features [N, D] of its images by content.
            max_tokens: maximum number of prompt and answer tokens.
        """
        room = max_tokens - len(request.prompt_ids) - request.sampling.max_new_tokens
        among = [budget for budget in request.choices if len(request.images) * budget <= room]
        # If every fitting budget is smaller than the predictor's budgets, there is nothing to predict.
        budget = among[-1]
        if any(each in self._predictor.budgets for each in among):
            pooled = pool(torch.stack([features[image.content] for image in request.images]))
            budget = self._predictor.choose(
                self._reader.of_ids(list(pooled), request.prompt_ids).tolist(), price=self._price, among=among
            )
        return replace(request, num_visual_tokens=budget, choices=())


def load_predictor(policy: InputPolicyConfig, offered: Sequence[int]) -> BudgetPredictor:
    """Loads the predictor of a policy.

    Raises:
        UserError: it does not exist, needs an answer before it can choose, or its budgets do not match the offered
            ones.
    """
    predictor = BudgetPredictor.load(Path(policy.predictor))
    if predictor.reads_answer:
        raise UserError(
            f"The budget predictor in {policy.predictor} needs the answer at {predictor.budgets[0]} visual tokens,"
            " which would require a second pass over every request; use a predictor that does not need an answer,"
            " as saved by `parcelray analyze adaptive`."
        )
    missing = [budget for budget in predictor.budgets if budget not in offered]
    if missing:
        raise UserError(
            f"The budget predictor in {policy.predictor} can choose {', '.join(map(str, missing))} visual tokens, but"
            f" budgets.offered is {', '.join(map(str, sorted(offered)))}; add them to budgets.offered, or fit a"
            " predictor for the offered budgets."
        )
    if policy.floor is not None and policy.floor > predictor.budgets[-1]:
        raise UserError(
            f"budgets.policy.floor is {policy.floor}, above the largest budget {predictor.budgets[-1]} of the predictor"
            f" in {policy.predictor}; lower it."
        )
    return predictor
