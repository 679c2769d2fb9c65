"""From samples to the arrays of a training batch, budget left open.

The image placeholders stand at the same place in every prompt of a model, so a batch is collated without them and
`training.step` puts in as many as the step's budget asks for: one collated batch serves any budget, and several (the
sandwich rule).
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from parcelray.datasets.images import decode_image
from parcelray.datasets.mini.regions import BACKGROUND
from parcelray.datasets.sample import Sample
from parcelray.models.backbones.processor_base import ElasticProcessor

Batch = dict[str, NDArray[np.generic]]
"""pixel_values uint8 [I, C, H, W]; input_ids, token_type_ids, attention_mask, labels int32 [B, S], right-padded, without image placeholders."""

IGNORED = -100
"""Label of positions without a loss."""


class Collator:
    """Samples of one group to a `Batch`.

    Args:
        processor: its tokenizer writes the text as the processor would; its image processor gives the pixel size.
        label_patches: adds `patch_labels`, int32 [B, images x N]: the token of the region that a patch's centre lies in
            (`Sample.metadata["regions"]`: by image, boxes in fractions with a word each), the background's for some of
            the others.
    """

    def __init__(self, processor: ElasticProcessor, *, label_patches: bool = False) -> None:
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._label_patches = label_patches
        self._grid_size = math.isqrt(processor.num_patches)

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Collates; every sample must have the same number of images."""
        prefixes = self._processor.encode_prompts([sample.prompt for sample in samples])
        suffixes = self._processor.encode_answers([sample.answers[0] for sample in samples])
        length = max(len(prefix) + len(suffix) for prefix, suffix in zip(prefixes, suffixes, strict=True))
        shape = (len(samples), length)
        batch: Batch = {
            "pixel_values": np.stack([self._pixels(image) for sample in samples for image in sample.images]),
            "input_ids": np.full(shape, self._tokenizer.pad_token_id, dtype=np.int32),
            "token_type_ids": np.zeros(shape, dtype=np.int32),
            "attention_mask": np.zeros(shape, dtype=np.int32),
            "labels": np.full(shape, IGNORED, dtype=np.int32),
        }
        for row, (prefix, suffix) in enumerate(zip(prefixes, suffixes, strict=True)):
            start, end = len(prefix), len(prefix) + len(suffix)
            batch["input_ids"][row, :end] = prefix + suffix
            batch["token_type_ids"][row, start:end] = 1
            batch["attention_mask"][row, :end] = 1
            batch["labels"][row, start:end] = suffix
        if self._label_patches:
            batch["patch_labels"] = np.stack([self._patch_labels(sample) for sample in samples])
        return batch

    def _patch_labels(self, sample: Sample) -> NDArray[np.int32]:
        """[images x N]; without regions nothing is labelled.

        Of the background only about as many patches are labelled as lie in regions, evenly spread: all of it would be
        most of the loss, and what the objects are would be learnt several times later.
        """
        grid = self._grid_size
        labels = np.full((len(sample.images), grid * grid), IGNORED, dtype=np.int32)
        for image, regions in enumerate(sample.metadata.get("regions", [])):
            words = np.full((grid, grid), IGNORED, dtype=np.int32)
            for region in regions:
                # The patches whose centres lie inside, and at least one. (A patch's centre is half a patch after its
                # start.)
                top, left, bottom, right = (math.ceil(side * grid - 0.5) for side in region["box"])
                words[top : max(bottom, top + 1), left : max(right, left + 1)] = self._token(region["word"])
            labels[image] = words.reshape(-1)
            background = np.flatnonzero(labels[image] == IGNORED)
            count = min(len(background), max(1, grid * grid - len(background)))
            labels[image, background[:: max(1, len(background) // count)]] = self._token(BACKGROUND)
        return labels.reshape(-1)

    def _token(self, word: str) -> int:
        return int(self._tokenizer(word, add_special_tokens=False)["input_ids"][0])

    def _pixels(self, data: bytes) -> NDArray[np.uint8]:
        return np.asarray(self._processor.fitted(decode_image(data)), dtype=np.uint8).transpose(2, 0, 1)
