"""LLaVA-1.5's processor with the budget as a keyword: `USER:`, placeholders, prompt, `ASSISTANT:`."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image
from transformers import BatchFeature, LlavaProcessor

from parcelray.models.backbones.processor_base import ONLY_NORMALISE, REDUCING_GAP, ElasticProcessor

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


class ElasticLlavaProcessor(ElasticProcessor, LlavaProcessor):  # type: ignore[misc]
    """LLaVA's processor with the budget as a keyword of the call.

    Saved files are those of the stock processor.
    """

    _budget: int | None = None

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
        return int(self.tokenizer(self._line("a", True))["input_ids"].index(self.image_token_id))

    def encode_prompts(self, texts: Sequence[str], *, with_image: bool = True) -> list[list[int]]:
        """See `ElasticProcessor`."""
        encoded = self.tokenizer([self._line(text, with_image) for text in texts])["input_ids"]
        return [[token for token in ids if token != self.image_token_id] for ids in encoded]

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

    def __call__(
        self,
        images: Sequence[Sequence[Image.Image]] | None = None,
        text: Sequence[str] | None = None,
        *,
        num_visual_tokens: int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Builds a batch.

        Args:
            images: images (or video frames) of each prompt in order, see `fitted`; None for text only (the blind
                baseline).
            text: prompts without placeholders.
            num_visual_tokens: placeholders per image; None means one per patch, as in the stock processor.
            kwargs: passed to the stock processor (`return_tensors`, `padding`, ...).

        Returns:
            input_ids and attention_mask [B, S], pixel_values [I, C, H, W].
        """
        prompts = list(text or [])
        if images is None:
            return super().__call__(text=[self._line(prompt, False) for prompt in prompts], **kwargs)
        lines = [self._line(prompt, True, len(group)) for group, prompt in zip(images, prompts, strict=True)]
        self._budget = num_visual_tokens
        try:
            fitted = [self.fitted(image) for group in images for image in group]
            return super().__call__(images=fitted, text=lines, **ONLY_NORMALISE, **kwargs)
        finally:
            self._budget = None

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Returns the placeholders of an image: the budget of the current call, or as in the stock class."""
        return (
            str(super().replace_image_token(image_inputs, image_idx, **kwargs))
            if self._budget is None
            else self.image_token * self._budget
        )

    def _line(self, text: str, with_image: bool, num_images: int = 1) -> str:
        return f"USER: {self.image_token * num_images}\n{text} ASSISTANT:" if with_image else f"USER: {text} ASSISTANT:"
