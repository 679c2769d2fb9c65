"""LLaVA-1.5's processor with the budget as a keyword: `USER:`, placeholders, prompt, `ASSISTANT:`."""

from collections.abc import Sequence
from typing import Any

from PIL import Image
from transformers import BatchFeature, LlavaProcessor

from parcelray.models.backbones.processor_base import ElasticProcessor


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

    def fitted(self, image: Image.Image) -> Image.Image:
        """See `ElasticProcessor`; scaled and cropped by the image processor, without its normalisation."""
        if image.size == (self.image_size, self.image_size):
            return image
        pixels = self.image_processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][
            0
        ]
        return Image.fromarray(pixels.clip(0, 255).astype("uint8").transpose(1, 2, 0))

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
            images: images (or video frames) of each prompt in order; None for text only (the blind baseline).
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
            return super().__call__(images=[image for group in images for image in group], text=lines, **kwargs)
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
