"""Signals for choosing a budget: of an image and a question before decoding, and of the smallest budget's answer.

The vision tower runs once for all budgets anyway, so the cost of pooling its features is negligible.

Shapes: I images, N patches, D vision width, L language width, Q questions, S signals.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parcelray.datasets.images import decode_image
from parcelray.datasets.sample import Sample
from parcelray.evaluation.scoring.split_scores import GivenAnswer
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor

ANSWER_SIGNALS = ("mean_log_prob", "probability", "entropy", "num_new_tokens")
"""Names of the signals that `answer_signals` returns."""

Floats = NDArray[np.float64]


class SignalReader:
    """Computes the signals of images and questions.

    Args:
        model: model in evaluation mode.
        processor: processor of the same checkpoint.
        device: device of the model.
        batch_size: images per batch of the vision tower.
    """

    def __init__(
        self, model: ElasticVLM, processor: ElasticProcessor, *, device: str = "cpu", batch_size: int = 64
    ) -> None:
        self._model = model
        self._processor = processor
        self._device = torch.device(device)
        self._batch_size = batch_size

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the signals, in order."""
        config = self._model.config
        width, language = config.vision_dims.hidden_size, config.text_config.hidden_size
        pooled = [f"image_{kind}_{index}" for kind in ("mean", "std") for index in range(width)]
        return (*pooled, *(f"question_{index}" for index in range(language)), "num_text_tokens", "num_images")

    @torch.inference_mode()
    def read(self, samples: Sequence[Sample]) -> Floats:
        """Computes the signals of samples: [Q, S]."""
        distinct = list(dict.fromkeys(image for sample in samples for image in sample.images))
        found: dict[bytes, Floats] = {}
        for start in range(0, len(distinct), self._batch_size):
            part = distinct[start : start + self._batch_size]
            pixels = self._processor.pixel_values([decode_image(image) for image in part])
            found |= dict(
                zip(
                    part,
                    pool(self._model.model.encode_patches(pixels.to(self._device, self._model.dtype))),
                    strict=True,
                )
            )
        return np.stack([self.of([found[image] for image in sample.images], sample.prompt) for sample in samples])

    @torch.inference_mode()
    def of(self, pooled: Sequence[Floats], prompt: str) -> Floats:
        """Computes the signals of one question: [S].

        Args:
            pooled: pooled patch features of each of its images, see `pool`.
            prompt: the question.
        """
        (ids,) = self._processor.encode_prompts([prompt])
        return self.of_ids(pooled, ids)

    @torch.inference_mode()
    def of_ids(self, pooled: Sequence[Floats], ids: Sequence[int]) -> Floats:
        """Computes the signals from the token ids of the whole prompt, without visual tokens: [S]."""
        image_P = np.mean(pooled, axis=0) if len(pooled) else np.zeros(2 * self._model.config.vision_dims.hidden_size)
        question_L = (
            self._model.get_input_embeddings()(torch.tensor(list(ids), device=self._device))
            .double()
            .mean(0)
            .cpu()
            .numpy()
        )
        return np.concatenate([image_P, question_L, [len(ids), len(pooled)]])


def pool(patch_features_IND: Tensor) -> Floats:
    """Computes the mean and standard deviation of each channel over the patches: [I, 2 D]."""
    features_IND = patch_features_IND.float()
    pooled: Floats = torch.cat([features_IND.mean(1), features_IND.std(1)], dim=1).cpu().numpy().astype(np.float64)
    return pooled


def answer_signals(answers: Iterable[GivenAnswer]) -> Floats:
    """Computes the signals of answers with known confidence: [Q, 4], in the order of `ANSWER_SIGNALS`."""
    return np.array(
        [
            [each.mean_log_prob, np.exp(each.mean_log_prob or 0.0), each.entropy, each.num_new_tokens]
            for each in answers
        ],
        dtype=np.float64,
    )
