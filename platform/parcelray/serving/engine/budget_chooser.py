"""Chooses the budget of a request by its images and its question, with a predictor that evaluation has fitted.

The vision tower runs for every budget alike, so what it saw is there before the choice is made.

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
    """Chooses as `BudgetPredictor.choose` does offline.

    Args:
        predictor: of this checkpoint.
        model: in evaluation mode, on its device.
        processor: of the same checkpoint.
        price: chance of a right answer that a visual token must buy; None: the predictor's own.

    Raises:
        UserError: the predictor reads other signals than this model gives.
    """

    def __init__(
        self, predictor: BudgetPredictor, model: ElasticVLM, processor: ElasticProcessor, *, price: float | None = None
    ) -> None:
        self._predictor = predictor
        self._reader = SignalReader(model, processor, device=str(model.lm_head.weight.device))
        self._price = price
        if predictor.signals != self._reader.names:
            raise UserError(
                f"The budget predictor reads {len(predictor.signals)} signals, and this model gives"
                f" {len(self._reader.names)} or others; serve the checkpoint that it was fitted on, or fit it again."
            )

    def settled(self, request: GenerateRequest, features: Mapping[str, Tensor], max_tokens: int) -> GenerateRequest:
        """A request that leaves its budget open, with the budget that it gets.

        Args:
            request: with choices, the smallest of which fits.
            features: patch features [N, D] of its images by content.
            max_tokens: that prompt and answer may hold.
        """
        room = max_tokens - len(request.prompt_ids) - request.sampling.max_new_tokens
        among = [budget for budget in request.choices if len(request.images) * budget <= room]
        # Where what fits is smaller than all that the predictor knows, there is nothing to predict.
        budget = among[-1]
        if any(each in self._predictor.budgets for each in among):
            pooled = pool(torch.stack([features[image.content] for image in request.images]))
            budget = self._predictor.choose(
                self._reader.of_ids(list(pooled), request.prompt_ids).tolist(), price=self._price, among=among
            )
        return replace(request, num_visual_tokens=budget, choices=())


def load_predictor(policy: InputPolicyConfig, offered: Sequence[int]) -> BudgetPredictor:
    """The predictor of a policy.

    Raises:
        UserError: there is none, it needs an answer before it can choose, or its budgets do not fit those that are
            offered.
    """
    predictor = BudgetPredictor.load(Path(policy.predictor))
    if predictor.reads_answer:
        raise UserError(
            f"The budget predictor in {policy.predictor} reads the answer at {predictor.budgets[0]} visual tokens,"
            " which would be a second pass over every request; serve one that chooses before any answer, which"
            " `parcelray analyze adaptive` saves."
        )
    missing = [budget for budget in predictor.budgets if budget not in offered]
    if missing:
        raise UserError(
            f"The budget predictor in {policy.predictor} gives {', '.join(map(str, missing))} visual tokens, which are"
            f" not among the offered {', '.join(map(str, sorted(offered)))}; offer them, or fit a predictor for the"
            " offered ones."
        )
    if policy.floor is not None and policy.floor > predictor.budgets[-1]:
        raise UserError(
            f"The floor {policy.floor} is above every budget of the predictor in {policy.predictor},"
            f" {predictor.budgets[-1]} at most; lower it."
        )
    return predictor
