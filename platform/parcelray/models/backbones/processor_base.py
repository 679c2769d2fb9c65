"""Base class of the elastic processors: prompts with as many image placeholders as the budget.

Only the processors write control tokens (start, end, padding, image placeholder), by their ids. Texts of users, data
and benchmarks are encoded apart from them, so that no text becomes a control token.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from parcelray.errors import UserError
from parcelray.models.token_counts import TokenCounts, count_tokens

REDUCING_GAP = 128
"""Argument of Pillow's `resize`: the oversampling from which it averages blocks of pixels first.

It has an effect on sides above 256 times the result's. Their resampling kernels would need more memory than the image.
"""
_ONLY_NORMALISE = {"do_resize": False, "do_center_crop": False}
"""Settings of an image processor for images that have the model's input size."""


class Turn(NamedTuple):
    """One question of a conversation and its answer."""

    question: str
    """Text of the question, without image placeholders."""
    answer: str


class Segment(NamedTuple):
    """A part of a training sequence."""

    ids: list[int]
    is_answer: bool
    """Whether the model learns to write this part."""


class ElasticProcessor:
    """Text and pixel processing of an elastic model: a mix-in that precedes the transformers processor.

    The call takes the budget as a keyword. Saved files are those of the stock class.
    """

    tokenizer: Any
    batch_decode: Callable[..., list[str]]
    save_pretrained: Callable[..., Any]
    image_processor: Any
    image_token: str
    image_token_id: int
    has_token_types: ClassVar[bool] = True
    """Whether the model reads `token_type_ids`, because its attention is bidirectional in the prompt."""

    @property
    def visual_offset(self) -> int:
        """Number of tokens of a prompt before its image placeholders."""
        return 0

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Side of the square input image in pixels."""

    @property
    def crops(self) -> bool:
        """Whether `fitted` keeps an image's aspect ratio and crops it to the central square.

        Otherwise the image is resized to the square.
        """
        return False

    @property
    @abstractmethod
    def num_patches(self) -> int:
        """Number of patches of an image, N."""

    def __call__(
        self,
        images: Sequence[Sequence[Image.Image]] | None = None,
        text: Sequence[str] = (),
        suffix: Sequence[str] | None = None,
        *,
        num_visual_tokens: int | None = None,
        padding: Literal[True] = True,
        return_tensors: Literal["pt"] = "pt",
    ) -> BatchFeature:
        """Builds a batch of model inputs, with the arguments of the stock processor and the budget.

        Args:
            images: images (or video frames) of each prompt in order, equally many per prompt; None for text only (the
                blind baseline).
            text: prompts without placeholders.
            suffix: answers, for training; adds `labels` to the result.
            num_visual_tokens: placeholders per image; None means one per patch, as in the stock processor.
            padding: only True is supported: prompts are left-padded, and with answers right-padded.
            return_tensors: only `pt` is supported.

        Returns:
            input_ids, attention_mask and, for a model that reads them, token_type_ids [B, S] (0: prompt, 1: answer);
            with images pixel_values [I, C, H, W], and with answers labels [B, S] (-100 except for answers).

        Raises:
            UserError: another value of `padding` or `return_tensors`, or prompts with different numbers of images.
        """
        if padding is not True or return_tensors != "pt":
            raise UserError(
                f"The processor got padding {padding!r} and return_tensors {return_tensors!r}; it returns padded torch"
                " tensors only: padding=True and return_tensors='pt'."
            )
        groups = [list(group) for group in images] if images is not None else [[] for _ in text]
        counts = [len(group) for group in groups]
        if len(counts) != len(text) or len(set(counts)) != 1:
            raise UserError(
                f"{len(text)} prompts got images in groups of {counts}; give one group per prompt, and equally many"
                " images in each."
            )
        budget = self.num_patches if num_visual_tokens is None else num_visual_tokens
        batch = self.prompts(text, counts[0], num_visual_tokens=budget, answers=suffix)
        if suffix is not None:
            batch["labels"] = batch["input_ids"].where(batch["token_type_ids"] == 1, -100)
        if not self.has_token_types:
            del batch["token_type_ids"]
        flat = [image for group in groups for image in group]
        if flat:
            batch["pixel_values"] = self.pixel_values(flat)
        return batch

    def encode_text(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of texts without start and end tokens.

        The name of a control token in a text, such as `<image>`, `<eos>` or `<pad>`, is encoded as ordinary characters.
        Location and segment tokens (`<loc0000>`, `<seg000>`) control nothing: they are words of the vocabulary, in
        prompts and answers.
        """
        return list(self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"])

    @abstractmethod
    def encode_prompts(self, texts: Sequence[str], *, with_image: bool = True) -> list[list[int]]:
        """Returns the token ids of whole prompts without image placeholders, which belong at `visual_offset`."""

    def encode_answers(self, answers: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of answers with their end token."""
        return [[*ids, self.tokenizer.eos_token_id] for ids in self.encode_text(answers)]

    def count_tokens(
        self, text: str, num_images: int, num_visual_tokens: int, answer: str | None = None
    ) -> TokenCounts:
        """Counts the tokens of a prompt as the decoder gets them.

        Args:
            text: prompt without placeholders.
            num_images: number of images of the prompt.
            num_visual_tokens: budget per image; 0: blind.
            answer: training target without the end token; None: no answer.
        """
        prefix = self.encode_prompts([text], with_image=num_images * num_visual_tokens > 0)[0]
        suffix = self.encode_answers([answer])[0] if answer is not None else []
        return count_tokens(len(prefix), num_images, num_visual_tokens, len(suffix))

    def encode_turns(self, turns: Sequence[Turn], *, with_image: bool = True) -> list[list[Segment]]:
        """Returns the sequences of one conversation for training, each as segments of token ids.

        By default each turn is a sequence of its own, without the turns before it: the model answers single questions.

        Args:
            turns: questions and answers, in order; at least one.
            with_image: whether the conversation has images, whose placeholders belong at `visual_offset`.
        """
        prompts = self.encode_prompts([turn.question for turn in turns], with_image=with_image)
        answers = self.encode_answers([turn.answer for turn in turns])
        return [
            [Segment(prompt, False), Segment(answer, True)] for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def fitted(self, image: Image.Image) -> Image.Image:
        """Returns an image at the model's input size: [image_size, image_size], RGB.

        The result is that of the image processor before normalisation. Only what is in the result is resized, so that
        a long and narrow image needs little memory.

        Args:
            image: RGB image without transparency, as `datasets.images.decode_image` returns it.

        Raises:
            UserError: the image has another mode, or transparency.
        """
        if image.mode != "RGB" or "transparency" in image.info:
            raise UserError(
                f"An image has the mode {image.mode}{' with transparency' * image.has_transparency_data}; give RGB"
                " images without transparency, as parcelray.datasets.images.decode_image returns them."
            )
        return self._fitted(image)

    def _fitted(self, image: Image.Image) -> Image.Image:
        return image.resize((self.image_size, self.image_size), self._resample, reducing_gap=REDUCING_GAP)

    @property
    def _resample(self) -> Image.Resampling:
        return Image.Resampling(int(self.image_processor.resample))

    def normalised(self, fitted: Sequence[Image.Image]) -> Tensor:
        """Returns the pixel values of images that `fitted` returned: float [I, 3, image_size, image_size]."""
        pixels: Tensor = self.image_processor(list(fitted), return_tensors="pt", **_ONLY_NORMALISE)["pixel_values"]
        return pixels

    def pixel_values(self, images: Sequence[Image.Image]) -> Tensor:
        """Returns the pixel values of decoded images: float [I, 3, image_size, image_size]."""
        return self.normalised([self.fitted(image) for image in images])

    def prompts(
        self, texts: Sequence[str], num_images: int, *, num_visual_tokens: int, answers: Sequence[str] | None = None
    ) -> BatchFeature:
        """Builds prompts for visual tokens that were computed before.

        Without answers, the prompts are left-padded for generation. With answers, whose likelihood can then be
        computed, they are right-padded.

        Args:
            texts: prompts without placeholders.
            num_images: number of images per prompt.
            num_visual_tokens: placeholders per image; 0 writes none (the blind baseline).
            answers: text after each prompt, without the end token, which is added; None: no answers.

        Returns:
            input_ids, attention_mask and token_type_ids [B, S]; the token type of answers is 1.
        """
        placeholders = [self.image_token_id] * (num_images * num_visual_tokens)
        offset = self.visual_offset
        prefixes = [
            ids[:offset] + placeholders + ids[offset:]
            for ids in self.encode_prompts(texts, with_image=bool(placeholders))
        ]
        suffixes = self.encode_answers(answers) if answers is not None else [[] for _ in prefixes]
        length = max(len(prefix) + len(suffix) for prefix, suffix in zip(prefixes, suffixes, strict=True))
        shape = (len(prefixes), length)
        columns = {
            "input_ids": torch.full(shape, self.tokenizer.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "token_type_ids": torch.zeros(shape, dtype=torch.int64),
        }
        for row, (prefix, suffix) in enumerate(zip(prefixes, suffixes, strict=True)):
            filled = len(prefix) + len(suffix)
            start = 0 if answers is not None else length - filled
            columns["input_ids"][row, start : start + filled] = torch.tensor(prefix + suffix)
            columns["attention_mask"][row, start : start + filled] = 1
            columns["token_type_ids"][row, start + len(prefix) : start + filled] = 1
        return BatchFeature(columns)
