"""The processor of a checkpoint, whatever its backbone."""

from pathlib import Path
from typing import Any, cast

from parcelray.models.backbones.llava_processor import ElasticLlavaProcessor
from parcelray.models.backbones.paligemma_processor import ElasticPaliGemmaProcessor
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.vlm import family_of

_CLASSES: dict[str, Any] = {"paligemma": ElasticPaliGemmaProcessor, "llava": ElasticLlavaProcessor}


def load_processor(checkpoint: str | Path) -> ElasticProcessor:
    """Tokenizer and image processor of a checkpoint folder, stock or elastic.

    Raises:
        UserError: the folder is no checkpoint of a known family.
    """
    return cast(ElasticProcessor, _CLASSES[family_of(checkpoint)].from_pretrained(checkpoint))


def image_size_of(checkpoint: Path) -> int:
    """Side of a checkpoint's input images, pixels."""
    return load_processor(checkpoint).image_size
