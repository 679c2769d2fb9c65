"""The image decoder of training, evaluation and serving."""

import io
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from parcelray.errors import UserError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Formats that are decoded; the bytes decide, not a file name or a declared type."""
MAX_PIXELS = 178_956_970
"""Largest width times height of an image in data; Pillow's own limit, about 0.5 GB as RGB."""

Transparency = Literal["drop", "white"]
"""What transparency becomes.

- `drop`: the stored colours, as `Image.convert("RGB")` of lmms-eval gives them; for training and evaluation.
- `white`: the colours on a white background, as in vLLM; for serving.
"""
_SWAPS_SIDES = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""


class UnknownImageFormat(UserError):
    """The bytes are of no format that is decoded."""


class ImageTooLarge(UserError):
    """An image has too many pixels. Its pixels were not decoded.

    Attributes:
        size: width and height in pixels; None if Pillow refused the image by its own limit.
    """

    size: tuple[int, int] | None = None


class BrokenImage(UserError):
    """The bytes are of a known format, but cannot be decoded."""


def decode_image(
    data: bytes,
    *,
    transparency: Transparency = "drop",
    formats: tuple[str, ...] = FORMATS,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Decodes the first frame of an image to RGB, 8 bits per channel, upright by its EXIF orientation.

    16-bit grey values become their high byte. The result has no metadata, so that no later step can apply transparency
    or orientation again.

    Args:
        data: the encoded image.
        transparency: what transparency becomes, see `Transparency`.
        formats: Pillow's names of the legal formats.
        max_pixels: largest width times height; checked before any pixel is decoded.

    Raises:
        UnknownImageFormat: the bytes are of none of the formats.
        ImageTooLarge: the image has too many pixels.
        BrokenImage: the bytes are truncated or invalid.
    """
    opened = _opened(data, formats, max_pixels)
    try:
        # Loading may add metadata from the end of the file.
        opened.load()
        orientation = _orientation(opened)
        rgb = _rgb(_8_bit(opened), transparency)
    except Exception:  # noqa: BLE001 - decoders raise any kind of error on invalid bytes
        raise _broken(data) from None
    rgb.info = {}
    if orientation != 1:
        rgb.getexif()[ExifTags.Base.Orientation] = orientation
        ImageOps.exif_transpose(rgb, in_place=True)
    return rgb


def image_size(data: bytes) -> tuple[int, int]:
    """Returns width and height in pixels of an image as `decode_image` returns it, mostly from its header alone.

    Raises:
        UserError: as `decode_image` for its default limits, except for errors in the pixels' data.
    """
    opened = _opened(data, FORMATS, MAX_PIXELS)
    width, height = opened.size
    # Pillow applies the orientation of TIFF files itself.
    turned = opened.format != "TIFF" and _orientation(opened) in _SWAPS_SIDES
    return (height, width) if turned else (width, height)


def _opened(data: bytes, formats: tuple[str, ...], max_pixels: int) -> Image.Image:
    """Reads the header of an image."""
    if not data:
        raise _broken(data)
    try:
        opened = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        raise UnknownImageFormat(
            f"An image of {len(data)} bytes cannot be decoded; legal formats are {', '.join(formats)}. Convert it to"
            " one of them."
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        # Where warnings are errors, Pillow refuses images at half of its limit.
        raise _too_large(None, max_pixels) from None
    except Exception:  # noqa: BLE001 - decoders raise any kind of error on invalid bytes
        raise _broken(data) from None
    if opened.width * opened.height > max_pixels:
        raise _too_large(opened.size, max_pixels)
    return opened


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 (upright) if there is none or if the metadata are invalid."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 - invalid metadata raise any kind of error, and the pixels do not need them
        return 1
    return found if found in range(1, 9) else 1


def _8_bit(image: Image.Image) -> Image.Image:
    """Reduces 16 bits per pixel to the high byte; Pillow would clip the values at 255."""
    if not image.mode.startswith("I"):
        return image
    values_HW = np.asarray(image)
    grey = Image.fromarray((values_HW.clip(0, 65535) >> 8).astype(np.uint8))
    if "transparency" in image.info:
        opaque_HW = values_HW != image.info["transparency"]
        grey.putalpha(Image.fromarray((255 * opaque_HW).astype(np.uint8)))
    return grey


def _rgb(image: Image.Image, transparency: Transparency) -> Image.Image:
    if transparency == "white" and image.has_transparency_data:
        rgba = image.convert("RGBA")
        rgb = Image.new("RGB", image.size, (255, 255, 255))
        rgb.paste(rgba, mask=rgba.getchannel("A"))
        return rgb
    # Pillow warns about transparency that `convert` cannot keep.
    image.info.pop("transparency", None)
    return image.convert("RGB")


def _too_large(size: tuple[int, int] | None, max_pixels: int) -> ImageTooLarge:
    shown = "too many" if size is None else f"{size[0]} x {size[1]}"
    error = ImageTooLarge(
        f"An image has {shown} pixels; legal are at most {max_pixels / 1e6:g} million. Use a smaller image: the model"
        " scales it down anyway."
    )
    error.size = size
    return error


def _broken(data: bytes) -> BrokenImage:
    return BrokenImage(f"An image of {len(data)} bytes cannot be decoded: it is truncated or broken; replace it.")
