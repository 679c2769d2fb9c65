"""Collation of samples into training batches that do not depend on the budget.

A batch is collated without image placeholders, because they are at the same position in every prompt of a model.
`training.step` inserts as many placeholders as the budget of the step requires. One batch can therefore be used at any
budget, or at several (the sandwich rule).
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from parcelray.datasets.images import decode_image
from parcelray.datasets.mini.regions import BACKGROUND
from parcelray.datasets.sample import Sample
from parcelray.datasets.source import BadRowsError
from parcelray.errors import UserError
from parcelray.models.backbones.processor_base import ElasticProcessor

Batch = dict[str, NDArray[np.generic]]
"""Arrays of a batch by name.

`pixel_values`: uint8 [I, C, H, W]. `input_ids`, `token_type_ids`, `attention_mask`, `labels`: int32 [B, S],
right-padded and without image placeholders. `patch_labels` (optional): int32 [B, images x N].
"""

IGNORED = -100
"""Label of positions that do not contribute to the loss."""


class Collator:
    """Collates samples of one group into a `Batch`.

    Args:
        processor: processor of the model, for tokenization and image size.
        label_patches: whether to add `patch_labels`, int32 [B, images x N]. The label of a patch is the token of the
            region that contains its centre (`Sample.metadata["regions"]`: for each image, boxes in fractions of the
            sides, each with a word). Some of the other patches get the label of the background.
    """

    def __init__(self, processor: ElasticProcessor, *, label_patches: bool = False) -> None:
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._label_patches = label_patches
        self._grid_size = math.isqrt(processor.num_patches)

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Collates samples that all have the same number of images.

        Raises:
            BadRowsError: the message names the samples whose images cannot be decoded.
        """
        pixels = self._all_pixels(samples)
        prefixes = self._processor.encode_prompts([sample.prompt for sample in samples])
        suffixes = self._processor.encode_answers([sample.answers[0] for sample in samples])
        length = max(len(prefix) + len(suffix) for prefix, suffix in zip(prefixes, suffixes, strict=True))
        shape = (len(samples), length)
        batch: Batch = {
            "pixel_values": np.stack(pixels),
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
        """Labels the patches of a sample: int32 [images x N]. Samples without regions get no labels.

        Only about as many background patches are labelled as there are patches in regions, evenly spread. Otherwise the
        background would dominate the loss and the model would learn the objects several times later.
        """
        grid = self._grid_size
        labels = np.full((len(sample.images), grid * grid), IGNORED, dtype=np.int32)
        for image, regions in enumerate(sample.metadata.get("regions", [])):
            words = np.full((grid, grid), IGNORED, dtype=np.int32)
            for region in regions:
                # All patches whose centres are inside the box, and at least one. The centre of a patch is half a patch
                # after its start.
                top, left, bottom, right = (math.ceil(side * grid - 0.5) for side in region["box"])
                words[top : max(bottom, top + 1), left : max(right, left + 1)] = self._token(region["word"])
            labels[image] = words.reshape(-1)
            background = np.flatnonzero(labels[image] == IGNORED)
            count = max(1, min(len(background), grid * grid - len(background)))
            labels[image, background[:: max(1, len(background) // count)]] = self._token(BACKGROUND)
        return labels.reshape(-1)

    def _token(self, word: str) -> int:
        return self._processor.encode_text([word])[0][0]

    def _all_pixels(self, samples: Sequence[Sample]) -> list[NDArray[np.uint8]]:
        pixels, problems = [], {}
        for sample in samples:
            for image in sample.images:
                try:
                    pixels.append(self._pixels(image))
                except UserError as error:
                    problems[sample.id] = str(error)
        if problems:
            raise BadRowsError(problems)
        return pixels

    def _pixels(self, data: bytes) -> NDArray[np.uint8]:
        return np.asarray(self._processor.fitted(decode_image(data)), dtype=np.uint8).transpose(2, 0, 1)
