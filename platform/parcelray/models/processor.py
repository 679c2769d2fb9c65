"""The processor: prompts with as many image placeholders as the budget asks for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import BatchFeature, PaliGemmaProcessor


def image_size_of(checkpoint: Path) -> int:
    """Side of a checkpoint's input images, pixels."""
    return int(ElasticPaliGemmaProcessor.from_pretrained(checkpoint).image_processor.size["height"])


class ElasticPaliGemmaProcessor(PaliGemmaProcessor):  # type: ignore[misc]
    """PaliGemma's processor with the budget as a keyword of the call. Saved files stay those of the stock processor."""

    image_seq_length: int

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
            images: for each prompt its images (or video frames) in order; None for text only (the blind baseline).
            text: the prompts, without placeholders.
            suffix: the answers, for training: adds `labels`.
            num_visual_tokens: placeholders per image; None means one per patch, as in the stock processor.
            kwargs: for the stock processor (`return_tensors`, `padding`, ...).

        Returns:
            input_ids, attention_mask, token_type_ids [B, S] (0: bidirectional prefix, 1: causal suffix), and pixel_values [I, C, H, W].
        """
        prompts = list(text or [])
        if images is None:
            return self._text_only(prompts, suffix, **kwargs)
        placeholders = [self.image_token * len(group) + prompt for group, prompt in zip(images, prompts, strict=True)]
        default = self.image_seq_length
        # The stock class reads the count from this attribute in the middle of its call; it is set for the call and put back.
        self.image_seq_length = default if num_visual_tokens is None else num_visual_tokens
        try:
            return super().__call__(images=[list(group) for group in images], text=placeholders, suffix=list(suffix) if suffix is not None else None, **kwargs)
        finally:
            self.image_seq_length = default

    def prompts(self, texts: Sequence[str], num_images: int, *, num_visual_tokens: int, answers: Sequence[str] | None = None) -> BatchFeature:
        """Prompts for visual tokens that are already there: left-padded for generation, or right-padded with answers whose likelihood is asked.

        Args:
            texts: the prompts, without placeholders.
            num_images: images per prompt.
            num_visual_tokens: placeholders per image; 0 writes none (the blind baseline).
            answers: text after each prompt, its end included; None: nothing after it.

        Returns:
            input_ids, attention_mask, token_type_ids [B, S]; the token type of answers is 1.
        """
        placeholders = self.image_token * (num_images * num_visual_tokens)
        lines = [f"{placeholders}{self.tokenizer.bos_token}{text}\n" for text in texts]
        pairs = self._ended(answers)
        side = "left" if pairs is None else "right"
        return self.tokenizer(lines, pairs, return_token_type_ids=True, return_tensors="pt", padding=True, padding_side=side, add_special_tokens=False)

    def _text_only(self, prompts: list[str], suffix: Sequence[str] | None, **kwargs: Any) -> BatchFeature:
        texts = [f"{self.tokenizer.bos_token}{prompt}\n" for prompt in prompts]
        return self.tokenizer(texts, text_pair=self._ended(suffix), return_token_type_ids=True, **kwargs)

    def _ended(self, answers: Sequence[str] | None) -> list[str] | None:
        return [answer + self.tokenizer.eos_token for answer in answers] if answers is not None else None
