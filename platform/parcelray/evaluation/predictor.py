"""Greedy answers at any budget, with one run of the vision tower per image for all budgets."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from parcelray.data.collator import decode_image
from parcelray.data.sample import Sample
from parcelray.errors import SystemFailure
from parcelray.models.processor import ElasticPaliGemmaProcessor
from parcelray.models.vlm import ElasticPaliGemmaForConditionalGeneration

BLIND = 0
"""The budget of the blind baseline: no image, no visual tokens."""


class Predictor:
    """Answers samples with one model.

    Args:
        model: in evaluation mode.
        processor: of the same checkpoint.
        batch_size: images per batch (a video counts its frames).
        max_new_tokens: longest answer.
        device: where the model is.
    """

    def __init__(
        self,
        model: ElasticPaliGemmaForConditionalGeneration,
        processor: ElasticPaliGemmaProcessor,
        *,
        batch_size: int = 64,
        max_new_tokens: int = 32,
        device: str = "cpu",
    ) -> None:
        self._model = model
        self._processor = processor
        self._batch_size = batch_size
        self._max_new_tokens = max_new_tokens
        self._device = torch.device(device)

    def generate(self, samples: Sequence[Sample], *, num_visual_tokens: int) -> list[str]:
        """Answers at one budget (0: blind), in the order of the samples."""
        return self.generate_budgets(samples, [num_visual_tokens])[num_visual_tokens]

    @torch.inference_mode()
    def generate_budgets(self, samples: Sequence[Sample], budgets: Sequence[int]) -> dict[int, list[str]]:
        """Answers at several budgets from one encoding of each image.

        Raises:
            UnsupportedBudgetError: the model's connector cannot give a budget.
            SystemFailure: the decoder saw another number of visual tokens than asked for.
        """
        answers: dict[int, list[str]] = {budget: [""] * len(samples) for budget in budgets}
        for indices in _batches(samples, self._batch_size):
            batch = [samples[index] for index in indices]
            patches_IND = self._encode(batch) if any(budget != BLIND for budget in budgets) else None
            for budget in budgets:
                for index, text in zip(indices, self._decode(batch, patches_IND, budget), strict=True):
                    answers[budget][index] = text
        return answers

    def _encode(self, batch: Sequence[Sample]) -> Tensor:
        images = [decode_image(image) for sample in batch for image in sample.images]
        pixels = self._processor.image_processor(images, return_tensors="pt")["pixel_values"].to(self._device, self._model.dtype)
        return self._model.model.encode_patches(pixels)

    def _decode(self, batch: Sequence[Sample], patches_IND: Tensor | None, budget: int) -> list[str]:
        inputs: dict[str, Any] = dict(
            self._processor.prompts([sample.prompt for sample in batch], len(batch[0].images), num_visual_tokens=budget).to(self._device)
        )
        self._check_count(inputs["input_ids"], len(batch) * len(batch[0].images) * budget)
        if budget != BLIND:
            assert patches_IND is not None
            inputs["mm_encoder_outputs"] = self._model.encoded_images(patches_IND, num_visual_tokens=budget)
        tokens_BS = self._model.generate(**inputs, max_new_tokens=self._max_new_tokens, do_sample=False)
        texts = self._processor.batch_decode(tokens_BS[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [str(text).strip() for text in texts]

    def _check_count(self, input_ids_BS: Tensor, expected: int) -> None:
        found = int((input_ids_BS == self._model.config.image_token_id).sum())
        if found != expected:
            raise SystemFailure(
                f"The decoder was about to see {found} visual tokens where the budget asks for {expected}; the processor does not fit the model."
            )


def _batches(samples: Sequence[Sample], batch_size: int) -> Iterator[list[int]]:
    """Indices of samples that have the same number of images, prompts of similar length together (less padding)."""
    groups: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(len(sample.images), []).append(index)
    for num_images, indices in sorted(groups.items()):
        size = max(1, batch_size // max(1, num_images))
        indices.sort(key=lambda index: (len(samples[index].prompt), index))
        for start in range(0, len(indices), size):
            yield indices[start : start + size]
