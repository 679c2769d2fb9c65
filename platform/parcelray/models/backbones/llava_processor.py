"""LLaVA-1.5's processor with the budget as a keyword: `USER:`, placeholders, prompt, `ASSISTANT:`."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from PIL import Image
from transformers import LlavaProcessor

from parcelray.models.backbones.processor_base import ElasticProcessor


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

    def fitted(self, image: Image.Image) -> Image.Image:
        """See `ElasticProcessor`; scaled and cropped by the image processor, without its normalisation."""
        if image.size == (self.image_size, self.image_size):
            return image
        pixels = self.image_processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][
            0
        ]
        return Image.fromarray(pixels.clip(0, 255).astype("uint8").transpose(1, 2, 0))

    @cached_property
    def _frame(self) -> _Frame:
        line = self.tokenizer(f"USER: {self.image_token}\n")["input_ids"]
        place = line.index(self.image_token_id)
        num_after = len(line) - place - 1
        return _Frame(self.tokenizer("")["input_ids"], line[:place], len(self.encode_text(["\n"])[0]) - num_after)
