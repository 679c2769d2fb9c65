"""From a question and pictures to what an engine reads. Needs the processor, not the model."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from parcelray.serving.engine.engine import GenerateRequest, ImagePixels, Sampling

if TYPE_CHECKING:
    from parcelray.models.backbones.processor_base import ElasticProcessor


class PromptBuilder:
    """Builds requests for the engine of one checkpoint.

    Args:
        processor: of the checkpoint.
    """

    def __init__(self, processor: "ElasticProcessor") -> None:
        self._processor = processor
        self._offset = processor.visual_offset
        self.image_size = processor.image_size
        self.crops = processor.crops

    def pixels(self, image: Image.Image) -> ImagePixels:
        """A picture at the size of the model's input, with its hash."""
        rgb = self._processor.fitted(image).tobytes()
        return ImagePixels(hashlib.sha256(rgb).hexdigest(), self.image_size, rgb)

    def request(
        self,
        request_id: str,
        text: str,
        images: Sequence[ImagePixels],
        *,
        num_visual_tokens: int,
        sampling: Sampling,
        timeout_s: float,
        stream: bool = False,
        urgent: bool = False,
    ) -> GenerateRequest:
        """One request; see `GenerateRequest` for the arguments."""
        ids = self._processor.encode_prompts([text], with_image=bool(images))[0]
        offset = self._offset if images else 0
        budget = num_visual_tokens if images else 0
        return GenerateRequest(
            request_id, tuple(ids), offset, tuple(images), budget, sampling, timeout_s, stream, urgent
        )
