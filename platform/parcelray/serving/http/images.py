"""Reads the images of requests in threads. Invalid images are refused before a pixel is decoded if possible."""

import asyncio
import base64
import binascii
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from parcelray.config.serve import HttpConfig, RequestLimits
from parcelray.datasets.images import BrokenImage, ImageTooLarge, UnknownImageFormat, decode_image
from parcelray.serving.engine.engine import ImagePixels, PromptBuilder
from parcelray.serving.http.api_errors import ApiError
from parcelray.serving.http.remote_images import TIMEOUT_S, fetch_image, not_in_time

FORMATS = ("JPEG", "PNG", "WEBP")
_DATA_URL = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?;base64,", re.ASCII)
_TYPES = {"image/jpeg": "JPEG", "image/jpg": "JPEG", "image/png": "PNG", "image/webp": "WEBP"}
_MIB = 1024**2
_FETCHES = 8
"""Number of images that are downloaded at the same time."""
_START_OF_SCAN = b"\xff\xda"
_MOST_SCANS = 100
"""Most scans of a progressive JPEG. A scan needs few bytes but a pass over all pixels; encoders write about ten."""


@dataclass(frozen=True)
class ImageLimits:
    """Limits of one image."""

    max_bytes: int
    max_pixels: int

    @classmethod
    def of(cls, limits: RequestLimits) -> "ImageLimits":
        """Returns the image limits of a job."""
        return cls(int(limits.image_mb * _MIB), int(limits.image_megapixels * 1e6))


class ImageReader:
    """Reads images in two thread pools: one decodes, one downloads, so that slow hosts do not delay decoding.

    Args:
        limits: limits of requests.
        http: allowed image hosts and number of decoding threads.
    """

    def __init__(self, limits: RequestLimits, http: HttpConfig) -> None:
        self._limits = ImageLimits.of(limits)
        self._hosts = frozenset(http.image_hosts)
        self._decoders = ThreadPoolExecutor(http.image_threads, thread_name_prefix="images")
        self._fetchers = ThreadPoolExecutor(_FETCHES, thread_name_prefix="fetches")

    async def read(self, prompts: PromptBuilder, urls: Mapping[str, str], timeout_s: float) -> list[ImagePixels]:
        """Reads the images at the URLs and resizes them to the model's input size.

        Args:
            prompts: prepares images for the model.
            urls: URLs by the path of their field.
            timeout_s: time limit for all images, in seconds.

        Raises:
            ApiError: an image cannot be read (`param` is its field), or 503 after the time limit.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.gather(*(self._read(prompts, url, param) for param, url in urls.items()))
        except TimeoutError:
            message = "The images were not decoded within the time limit of the request; retry later."
            raise ApiError(503, message, code="deadline_exceeded", headers={"retry-after": "1"}) from None

    async def _read(self, prompts: PromptBuilder, url: str, param: str) -> ImagePixels:
        loop = asyncio.get_running_loop()
        data = None if url.startswith("data:") else await self._fetch(url, param)
        return await loop.run_in_executor(self._decoders, self._decode, prompts, data, url, param)

    async def _fetch(self, url: str, param: str) -> bytes:
        loop = asyncio.get_running_loop()
        try:
            # The DNS lookup has no time limit of its own.
            async with asyncio.timeout(TIMEOUT_S):
                return await loop.run_in_executor(
                    self._fetchers, fetch_image, url, self._hosts, self._limits.max_bytes, param
                )
        except TimeoutError:
            raise not_in_time(param) from None

    def _decode(self, prompts: PromptBuilder, data: bytes | None, url: str, param: str) -> ImagePixels:
        encoded = data_url_bytes(url, self._limits, param) if data is None else data
        return prompts.pixels(open_image(encoded, self._limits, param))


def data_url_bytes(url: str, limits: ImageLimits, param: str) -> bytes:
    """Returns the encoded image of a `data:` URL.

    Raises:
        ApiError: 400 if the URL is invalid, 413 for too many bytes, 415 for an unsupported type.
    """
    match = _DATA_URL.match(url)
    if match is None:
        raise ApiError(
            400,
            f"{param} is not of the form data:image/png;base64,...; send the image in this form.",
            code="invalid_image_url",
            param=param,
        )
    if (kind := match["type"]) not in _TYPES:
        raise ApiError(
            415,
            f"{param} has the type {str(kind)[:60]}; legal are {', '.join(_TYPES)}.",
            code="unsupported_image_type",
            param=param,
        )
    encoded = url[match.end() :]
    if len(encoded) * 3 // 4 > limits.max_bytes + 3:
        raise _too_large(len(encoded) * 3 // 4, limits, param)
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(
            400,
            f"{param} is not valid base64; encode the image without line breaks.",
            code="invalid_base64",
            param=param,
        ) from None


def open_image(data: bytes, limits: ImageLimits, param: str) -> Image.Image:
    """Decodes the first frame of an image to RGB on a white background, within the limits.

    Raises:
        ApiError: 413 for too many bytes, pixels or scans, 415 for an unsupported format, 422 for broken data.
    """
    if len(data) > limits.max_bytes:
        raise _too_large(len(data), limits, param)
    if data.startswith(b"\xff\xd8") and (scans := data.count(_START_OF_SCAN)) > _MOST_SCANS:
        message = f"{param} is a JPEG with {scans} scans; legal are at most {_MOST_SCANS}. Save it as a baseline JPEG."
        raise ApiError(413, message, code="image_too_large", param=param)
    try:
        return decode_image(data, transparency="white", formats=FORMATS, max_pixels=limits.max_pixels)
    except UnknownImageFormat:
        raise ApiError(
            415,
            f"{param} is not a {', '.join(FORMATS)} image; convert it to one of these formats.",
            code="unsupported_image_type",
            param=param,
        ) from None
    except ImageTooLarge as error:
        shown = "too many" if error.size is None else f"{error.size[0]} x {error.size[1]}"
        message = (
            f"{param} has {shown} pixels; legal are at most {limits.max_pixels / 1e6:g} million. Send a"
            " smaller image: the model scales it down anyway."
        )
        raise ApiError(413, message, code="image_too_large", param=param) from None
    except BrokenImage:
        raise ApiError(
            422,
            f"{param} cannot be decoded; the image is truncated or broken. Send it again.",
            code="broken_image",
            param=param,
        ) from None


def _too_large(size: int, limits: ImageLimits, param: str) -> ApiError:
    message = (
        f"{param} has {size / _MIB:.1f} MiB; legal are at most {limits.max_bytes / _MIB:g} MiB. Send a smaller image:"
        " the model scales it down anyway."
    )
    return ApiError(413, message, code="image_too_large", param=param)
