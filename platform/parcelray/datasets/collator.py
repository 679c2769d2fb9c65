"""Collation of samples into training batches that do not depend on the budget.

A batch is collated without image placeholders, because they are at the same position in every prompt of a model.
`training.step` inserts as many placeholders as the budget of the step requires. One batch can therefore be used at any
budget, or at several (the sandwich rule).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parcelray.datasets.images import decode_image
from parcelray.datasets.mini.regions import BACKGROUND
from parcelray.datasets.sample import Sample
from parcelray.datasets.source import BadRowsError
from parcelray.errors import UserError
from parcelray.models.backbones.processor_base import ElasticProcessor, Segment, Turn

Batch = dict[str, NDArray[np.generic]]
"""Arrays of a batch by name.

`pixel_values`: uint8 [I, C, H, W]. `input_ids`, `token_type_ids`, `attention_mask`, `labels`: int32 [B, S],
right-padded and without image placeholders. `samples`: int32 [B], the sample of each prompt, ascending; the turns of a
conversation can be several prompts, which share its images. `patch_labels` (optional): int32 [B, images x N].
`skipped` (optional): the reasons of rows that others replace, by row id, as JSON in uint8; see `StepReader`.
"""

IGNORED = -100
"""Label of positions that do not contribute to the loss."""


class PreparedSample(NamedTuple):
    """The arrays of one sample before collation."""

    pixels: list[NDArray[np.uint8]]
    """Images, uint8 [C, H, W]."""
    sequences: list[list[Segment]]
    """Prompts with their answers; see `ElasticProcessor.encode_turns`."""
    patch_labels: NDArray[np.int32] | None
    """int32 [images x N]; None: without labels."""


class Collator:
    """Collates samples of one group into a `Batch`.

    Args:
        processor: processor of the model, for tokenization and image size.
        max_text_tokens: largest number of text tokens of a prompt with its answers; None: no limit.
        label_patches: whether to add `patch_labels`, int32 [B, images x N]. The label of a patch is the token of the
            region that contains its centre (`Sample.metadata["regions"]`: for each image, boxes in fractions of the
            sides, each with a word). Some of the other patches get the label of the background.
    """

    def __init__(
        self, processor: ElasticProcessor, *, label_patches: bool = False, max_text_tokens: int | None = None
    ) -> None:
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._label_patches = label_patches
        self._max_text_tokens = max_text_tokens
        self._grid_size = math.isqrt(processor.num_patches)

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Collates samples that all have the same number of images.

        Raises:
            BadRowsError: the message names the samples that cannot be used.
        """
        prepared: list[PreparedSample] = []
        problems: dict[str, str] = {}
        for sample in samples:
            try:
                prepared.append(self.prepare(sample))
            except BadRowsError as error:
                problems |= error.problems
        if problems:
            raise BadRowsError(problems)
        return self.collate(prepared)

    def prepare(self, sample: Sample) -> PreparedSample:
        """Decodes and encodes one sample.

        Raises:
            BadRowsError: an image cannot be decoded, or a prompt is too long.
        """
        try:
            pixels = [self._pixels(image) for image in sample.images]
        except UserError as error:
            raise BadRowsError({sample.id: str(error)}) from None
        turns = [Turn(sample.prompt, sample.answers[0]), *(Turn(*turn) for turn in sample.later_turns)]
        sequences = self._processor.encode_turns(turns, with_image=bool(sample.images))
        longest = max(sum(len(segment.ids) for segment in sequence) for sequence in sequences)
        if self._max_text_tokens is not None and longest > self._max_text_tokens:
            raise BadRowsError(
                {sample.id: f"too long: {longest} text tokens, at most {self._max_text_tokens} are legal"}
            )
        return PreparedSample(pixels, sequences, self._patch_labels(sample) if self._label_patches else None)

    def collate(self, prepared: Sequence[PreparedSample]) -> Batch:
        """Pads and stacks samples that all have the same number of images."""
        sequences = [sequence for sample in prepared for sequence in sample.sequences]
        owners = [number for number, sample in enumerate(prepared) for _ in sample.sequences]
        shape = (len(sequences), max(sum(len(segment.ids) for segment in sequence) for sequence in sequences))
        side = self._processor.image_size
        pixels = [image for sample in prepared for image in sample.pixels]
        batch: Batch = {
            "pixel_values": np.stack(pixels) if pixels else np.zeros((0, 3, side, side), dtype=np.uint8),
            "input_ids": np.full(shape, self._tokenizer.pad_token_id, dtype=np.int32),
            "token_type_ids": np.zeros(shape, dtype=np.int32),
            "attention_mask": np.zeros(shape, dtype=np.int32),
            "labels": np.full(shape, IGNORED, dtype=np.int32),
            "samples": np.array(owners, dtype=np.int32),
        }
        for row, sequence in enumerate(sequences):
            start = 0
            for ids, is_answer in sequence:
                end = start + len(ids)
                batch["input_ids"][row, start:end] = ids
                batch["attention_mask"][row, start:end] = 1
                if is_answer:
                    batch["token_type_ids"][row, start:end] = 1
                    batch["labels"][row, start:end] = ids
                start = end
        if self._label_patches:
            labels = [sample.patch_labels for sample in prepared if sample.patch_labels is not None]
            batch["patch_labels"] = np.stack([labels[owner] for owner in owners])
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

    def _pixels(self, data: bytes) -> NDArray[np.uint8]:
        return np.asarray(self._processor.fitted(decode_image(data)), dtype=np.uint8).transpose(2, 0, 1)
