"""PaliGemma's processor with the budget as a keyword: placeholders, start token, prompt, line end."""

from collections.abc import Sequence
from typing import Any

from PIL import Image
from transformers import BatchFeature, PaliGemmaProcessor

from parcelray.models.backbones.processor_base import ONLY_NORMALISE, ElasticProcessor


class ElasticPaliGemmaProcessor(ElasticProcessor, PaliGemmaProcessor):  # type: ignore[misc]
    """PaliGemma's processor with the budget as a keyword of the call.

    Saved files are those of the stock processor.
    """

    image_seq_length: int

    @property
    def image_size(self) -> int:
        """See `ElasticProcessor`."""
        return int(self.image_processor.size["height"])

    @property
    def num_patches(self) -> int:
        """See `ElasticProcessor`."""
        return int(self.image_seq_length)

    def encode_prompts(self, texts: Sequence[str], *, with_image: bool = True) -> list[list[int]]:
        """See `ElasticProcessor`."""
        return list(self.tokenizer([self._line(text) for text in texts], add_special_tokens=False)["input_ids"])

    def __call__(
        self,
        images: Sequence[Sequence[Image.Image]] | None = None,
        text: Sequence[str] | None = None,
        suffix: Sequence[str] | None = None,
        *,
        num_visual_tokens: int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Builds a batch.

        Args:
            images: images (or video frames) of each prompt in order, see `fitted`; None for text only (the blind
                baseline).
            text: prompts without placeholders.
            suffix: answers, for training; adds `labels` to the result.
            num_visual_tokens: placeholders per image; None means one per patch, as in the stock processor.
            kwargs: passed to the stock processor (`return_tensors`, `padding`, ...).

        Returns:
            input_ids, attention_mask and token_type_ids [B, S] (0: bidirectional prefix, 1: causal suffix), and
            pixel_values [I, C, H, W].
        """
        prompts = list(text or [])
        if images is None:
            ends = [answer + self.tokenizer.eos_token for answer in suffix] if suffix is not None else None
            return self.tokenizer(
                [self._line(prompt) for prompt in prompts], text_pair=ends, return_token_type_ids=True, **kwargs
            )
        placeholders = [self.image_token * len(group) + prompt for group, prompt in zip(images, prompts, strict=True)]
        default = self.image_seq_length
        # The stock class reads the count from this attribute during its call, so it is set for the call and restored
        # afterwards.
        self.image_seq_length = default if num_visual_tokens is None else num_visual_tokens
        try:
            return super().__call__(
                images=[[self.fitted(image) for image in group] for group in images],
                text=placeholders,
                suffix=list(suffix) if suffix is not None else None,
                **ONLY_NORMALISE,
                **kwargs,
            )
        finally:
            self.image_seq_length = default

    def _line(self, text: str) -> str:
        return f"{self.tokenizer.bos_token}{text}\n"
