"""Greedy answers at any budget, with one run of the vision tower per image for all budgets and all questions about it."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

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
        batch_size: images per batch of the encoder, and of the decoder (where a video counts its frames).
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
        """Answers at several budgets from one encoding of each image, however many samples show it.

        Raises:
            UnsupportedBudgetError: the model's connector cannot give a budget.
            SystemFailure: the decoder saw another number of visual tokens than asked for.
        """
        answers: dict[int, list[str]] = {budget: [""] * len(samples) for budget in budgets}
        for chunk in _chunks(samples, self._batch_size):
            images = list(dict.fromkeys(image for index in chunk for image in samples[index].images))
            patches_UND = self._encode(images) if any(budget != BLIND for budget in budgets) else None
            for budget in budgets:
                seen = self._see(images, patches_UND, budget)
                for indices in _batches(samples, chunk, self._batch_size):
                    for index, text in zip(indices, self._decode([samples[index] for index in indices], seen, budget), strict=True):
                        answers[budget][index] = text
        return answers

    def _encode(self, images: Sequence[bytes]) -> Tensor:
        decoded = [decode_image(image) for image in images]
        pixels = self._processor.image_processor(decoded, return_tensors="pt")["pixel_values"].to(self._device, self._model.dtype)
        return self._model.model.encode_patches(pixels)

    def _see(self, images: Sequence[bytes], patches_UND: Tensor | None, budget: int) -> dict[bytes, Tensor]:
        """The visual tokens [K, L] of each image; none for the blind model."""
        if budget == BLIND:
            return {}
        assert patches_UND is not None
        return dict(zip(images, self._model.encoded_images(patches_UND, num_visual_tokens=budget)["image"].pooler_output, strict=True))

    def _decode(self, batch: Sequence[Sample], seen: dict[bytes, Tensor], budget: int) -> list[str]:
        inputs: dict[str, Any] = dict(
            self._processor.prompts([sample.prompt for sample in batch], len(batch[0].images), num_visual_tokens=budget).to(self._device)
        )
        self._check_count(inputs["input_ids"], len(batch) * len(batch[0].images) * budget)
        if seen:
            tokens_IKL = torch.stack([seen[image] for sample in batch for image in sample.images])
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=tokens_IKL)}
        tokens_BS = self._model.generate(**inputs, max_new_tokens=self._max_new_tokens, do_sample=False)
        texts = self._processor.batch_decode(tokens_BS[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [str(text).strip() for text in texts]

    def _check_count(self, input_ids_BS: Tensor, expected: int) -> None:
        found = int((input_ids_BS == self._model.config.image_token_id).sum())
        if found != expected:
            raise SystemFailure(
                f"The decoder was about to see {found} visual tokens where the budget asks for {expected}; the processor does not fit the model."
            )


def _chunks(samples: Sequence[Sample], batch_size: int) -> Iterator[list[int]]:
    """Indices of samples with at most `batch_size` different images (or one sample's), those that share images together."""
    first_with: dict[tuple[bytes, ...], int] = {}
    owners = [first_with.setdefault(sample.images, index) for index, sample in enumerate(samples)]
    chunk: list[int] = []
    images: set[bytes] = set()
    for index in sorted(range(len(samples)), key=lambda index: (owners[index], index)):
        if chunk and len(images.union(samples[index].images)) > batch_size:
            yield chunk
            chunk, images = [], set()
        chunk.append(index)
        images.update(samples[index].images)
    if chunk:
        yield chunk


def _batches(samples: Sequence[Sample], chunk: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """A chunk's indices by number of images, prompts of similar length together (less padding)."""
    groups: dict[int, list[int]] = {}
    for index in chunk:
        groups.setdefault(len(samples[index].images), []).append(index)
    for num_images, indices in sorted(groups.items()):
        size = max(1, batch_size // max(1, num_images))
        indices.sort(key=lambda index: (len(samples[index].prompt), index))
        for start in range(0, len(indices), size):
            yield indices[start : start + size]
