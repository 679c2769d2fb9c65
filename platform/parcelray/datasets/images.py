"""The image decoder of training, evaluation and serving."""

import io

from PIL import Image

from parcelray.errors import UserError


def decode_image(data: bytes) -> Image.Image:
    """Decodes PNG or JPEG bytes to RGB.

    Raises:
        UserError: the bytes are not a valid image.
    """
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    # Pillow's PNG reader raises a SyntaxError for a broken chunk.
    except (OSError, SyntaxError, Image.DecompressionBombError):
        raise UserError(f"An image of {len(data)} bytes cannot be decoded; give PNG or JPEG bytes.") from None
