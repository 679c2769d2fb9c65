"""PaliGemma's processor with the budget as a keyword: placeholders, start token, prompt, line end."""

from collections.abc import Sequence

from transformers import PaliGemmaProcessor

from parcelray.models.backbones.processor_base import ElasticProcessor


class ElasticPaliGemmaProcessor(ElasticProcessor, PaliGemmaProcessor):  # type: ignore[misc]
    """PaliGemma's processor with the budget as a keyword of the call; saved files are those of the stock processor."""

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
        encoded = self.encode_text([f"{text}\n" for text in texts])
        return [[self.tokenizer.bos_token_id, *ids] for ids in encoded]
