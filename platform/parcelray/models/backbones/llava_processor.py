"""LLaVA-1.5's processor with the budget as a keyword: `USER:`, placeholders, prompt, `ASSISTANT:`."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from PIL import Image
from transformers import LlavaProcessor

from parcelray.models.backbones.processor_base import REDUCING_GAP, ElasticProcessor, Segment, Turn

_LONGEST_PADDED = 4096
"""Longest side that is padded to a square as it is, in pixels; a longer image is first resized to it."""
_KERNEL_RADIUS = 3
"""Radius of Pillow's largest resampling kernel (Lanczos), in pixels of the smaller of source and result."""


class _Part(NamedTuple):
    """The part of an axis that is left after resizing and cropping."""

    read: tuple[int, int]
    """First pixel that has an influence on the result, and the one after the last."""
    box: tuple[float, float]
    """Start and end of the part that is left, in pixels after the first one read."""


def _central_part(length: int, scaled: int, side: int) -> _Part:
    """Returns the central part of an axis of `length` pixels that is resized to `scaled` pixels and cropped to `side`.

    The box is relative to what is read, because Pillow's boxes are float32.
    """
    start = (scaled - side) // 2 * length / scaled
    end = ((scaled - side) // 2 + side) * length / scaled
    margin = _KERNEL_RADIUS * max(1.0, length / scaled) + 1
    first, last = max(0, math.floor(start - margin)), min(length, math.ceil(end + margin))
    return _Part((first, last), (start - first, end - first))


class _Frame(NamedTuple):
    """The token ids of a prompt around its text."""

    start: list[int]
    """Ids at the start of a prompt without image."""
    before_image: list[int]
    """Ids before the image placeholders."""
    num_prefix: int
    """Number of tokens that the tokenizer puts before a text that is encoded alone, but not after a placeholder."""


class ElasticLlavaProcessor(ElasticProcessor, LlavaProcessor):  # type: ignore[misc]
    """LLaVA's processor with the budget as a keyword of the call; saved files are those of the stock processor."""

    has_token_types = False

    @property
    def image_size(self) -> int:
        """See `ElasticProcessor`."""
        size = getattr(self.image_processor, "crop_size", None) or self.image_processor.size
        return int(size["height"])

    @property
    def crops(self) -> bool:
        """See `ElasticProcessor`; True if the image processor scales the shorter edge and crops."""
        return bool(self.image_processor.do_center_crop)

    @property
    def num_patches(self) -> int:
        """See `ElasticProcessor`."""
        return int((self.image_size // self.patch_size) ** 2)

    @property
    def visual_offset(self) -> int:
        """See `ElasticProcessor`."""
        return len(self._frame.before_image)

    def encode_prompts(self, texts: Sequence[str], *, with_image: bool = True) -> list[list[int]]:
        """See `ElasticProcessor`."""
        frame = self._frame
        if not with_image:
            return [[*frame.start, *ids] for ids in self.encode_text([f"USER: {text} ASSISTANT:" for text in texts])]
        encoded = self.encode_text([f"\n{text} ASSISTANT:" for text in texts])
        return [[*frame.before_image, *ids[frame.num_prefix :]] for ids in encoded]

    def encode_turns(self, turns: Sequence[Turn], *, with_image: bool = True) -> list[list[Segment]]:
        """See `ElasticProcessor`; all turns are one sequence: `USER: ... ASSISTANT: answer</s>USER: ...`."""
        first, *later = turns
        questions = self.encode_prompts([first.question], with_image=with_image)
        if later:
            questions += self.encode_text([f"USER: {turn.question} ASSISTANT:" for turn in later])
        answers = self.encode_answers([turn.answer for turn in turns])
        pairs = zip(questions, answers, strict=True)
        return [
            [segment for question, answer in pairs for segment in (Segment(question, False), Segment(answer, True))]
        ]

    def _fitted(self, image: Image.Image) -> Image.Image:
        size = self.image_processor.size
        edge = size.get("shortest_edge")
        if getattr(self.image_processor, "do_pad", False):
            padded = self._padded(image, edge or size["height"])
            return self._cropped(padded, padded.size) if self.crops else padded
        if not self.crops:
            return super()._fitted(image)
        if edge is None:
            return self._cropped(image, (size["width"], size["height"]))
        short = min(image.size)
        # The image processor rounds the longer edge down.
        return self._cropped(image, (edge * image.width // short, edge * image.height // short))

    def _cropped(self, image: Image.Image, scaled: tuple[int, int]) -> Image.Image:
        """Returns the central square of an image as if all of it were resized to `scaled` pixels and then cropped."""
        side = self.image_size
        parts = [_central_part(length, out, side) for length, out in zip(image.size, scaled, strict=True)]
        (left, right), (top, bottom) = [part.read for part in parts]
        (x0, x1), (y0, y1) = [part.box for part in parts]
        image = image.crop((left, top, right, bottom))
        # The width first, as Pillow resizes whole images if their aspect ratio is kept.
        image = image.resize((side, image.height), self._resample, (x0, 0, x1, image.height))
        return image.resize((side, side), self._resample, (0, y0, side, y1))

    def _padded(self, image: Image.Image, side: int) -> Image.Image:
        """Returns an image padded with the mean colour to a square and then resized to `side` pixels."""
        if max(image.size) > _LONGEST_PADDED:
            # The square would have 60,000 x 60,000 pixels for an image of 60,000 x 1.
            shrink = _LONGEST_PADDED / max(image.size)
            shrunk = [max(1, round(length * shrink)) for length in image.size]
            image = image.resize(shrunk, self._resample, reducing_gap=REDUCING_GAP)
        longest = max(image.size)
        colour = tuple(int(255 * mean) for mean in self.image_processor.image_mean)
        square = Image.new("RGB", (longest, longest), colour)
        square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
        return square.resize((side, side), self._resample)

    @cached_property
    def _frame(self) -> _Frame:
        line = self.tokenizer(f"USER: {self.image_token}\n")["input_ids"]
        place = line.index(self.image_token_id)
        num_after = len(line) - place - 1
        return _Frame(self.tokenizer("")["input_ids"], line[:place], len(self.encode_text(["\n"])[0]) - num_after)
