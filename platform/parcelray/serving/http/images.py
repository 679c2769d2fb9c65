"""Images of requests: everything that can be refused is refused before a pixel is decoded."""

import asyncio
import base64
import binascii
import io
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from parcelray.config.serve import HttpConfig, RequestLimits
from parcelray.serving.engine.engine import ImagePixels
from parcelray.serving.http.api_errors import ApiError
from parcelray.serving.http.remote_images import TIMEOUT_S, fetch_image, not_in_time
from parcelray.serving.ingress.prompting import PromptBuilder

FORMATS = ("JPEG", "PNG", "WEBP")
_DATA_URL = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?;base64,", re.ASCII)
_TYPES = {"image/jpeg": "JPEG", "image/jpg": "JPEG", "image/png": "PNG", "image/webp": "WEBP"}
_MIB = 1024**2
_FETCHES = 8
"""Images that are fetched at the same time."""
_START_OF_SCAN = b"\xff\xda"
_MOST_SCANS = 100
"""Each scan of a progressive JPEG is a pass over all its pixels, and takes hardly a byte; encoders write about ten."""


@dataclass(frozen=True)
class ImageLimits:
    """What one image may be."""

    max_bytes: int
    max_pixels: int

    @classmethod
    def of(cls, limits: RequestLimits) -> "ImageLimits":
        """Out of a job's limits."""
        return cls(int(limits.image_mb * _MIB), int(limits.image_megapixels * 1e6))


class ImageReader:
    """Reads images in threads: some decode, others wait for other hosts, so that these never keep the first from their work.

    Args:
        limits: of requests.
        http: which hosts images may come from, and how many threads decode.
    """

    def __init__(self, limits: RequestLimits, http: HttpConfig) -> None:
        self._limits = ImageLimits.of(limits)
        self._hosts = frozenset(http.image_hosts)
        self._decoders = ThreadPoolExecutor(http.image_threads, thread_name_prefix="images")
        self._fetchers = ThreadPoolExecutor(_FETCHES, thread_name_prefix="fetches")

    async def read(self, prompts: PromptBuilder, urls: Mapping[str, str], timeout_s: float) -> list[ImagePixels]:
        """The images at the URLs; the keys are the fields that hold them.

        Raises:
            ApiError: one of them cannot be read, `param` is its field; 503 where they are not there in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.gather(*(self._read(prompts, url, param) for param, url in urls.items()))
        except TimeoutError:
            message = "The images were not decoded within the time of a request; send it again later."
            raise ApiError(503, message, code="deadline_exceeded", headers={"retry-after": "1"}) from None

    async def _read(self, prompts: PromptBuilder, url: str, param: str) -> ImagePixels:
        loop = asyncio.get_running_loop()
        data = None if url.startswith("data:") else await self._fetch(url, param)
        return await loop.run_in_executor(self._decoders, self._decode, prompts, data, url, param)

    async def _fetch(self, url: str, param: str) -> bytes:
        loop = asyncio.get_running_loop()
        try:
            # The look-up of a name has no limit of its own.
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
    """The encoded image of a `data:` URL.

    Raises:
        ApiError: 400 for what is no such URL, 413 for too many bytes, 415 for another type.
    """
    match = _DATA_URL.match(url)
    if match is None:
        raise ApiError(
            400,
            f"{param} is not of the form data:image/png;base64,...; encode the image so.",
            code="invalid_image_url",
            param=param,
        )
    if (kind := match["type"]) not in _TYPES:
        raise ApiError(
            415,
            f"{param} says {str(kind)[:60]}; legal are {', '.join(_TYPES)}.",
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
            400, f"{param} is not base64; encode the image without line ends.", code="invalid_base64", param=param
        ) from None


def open_image(data: bytes, limits: ImageLimits, param: str) -> Image.Image:
    """Decodes an image to RGB: its first frame, within the limits.

    Raises:
        ApiError: 413 for too many bytes, pixels or scans, 415 for another format, 422 for what is broken.
    """
    if len(data) > limits.max_bytes:
        raise _too_large(len(data), limits, param)
    if data.startswith(b"\xff\xd8") and (scans := data.count(_START_OF_SCAN)) > _MOST_SCANS:
        message = f"{param} is a JPEG of {scans} scans; legal are {_MOST_SCANS}. Save it as a baseline JPEG."
        raise ApiError(413, message, code="image_too_large", param=param)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ApiError(
            415, f"{param} is no {', '.join(FORMATS)} image.", code="unsupported_image_type", param=param
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        # Pillow's own limit is beside ours; where warnings are errors it also speaks up at half of it.
        raise _too_many_pixels(None, limits, param) from None
    except Exception:  # noqa: BLE001 - decoders of hostile bytes raise whatever they like, and the answer is the same
        raise _broken(param) from None
    if image.width * image.height > limits.max_pixels:
        raise _too_many_pixels(image.size, limits, param)
    try:
        return image.convert("RGB")
    except Exception:  # noqa: BLE001 - as above
        raise _broken(param) from None


def _too_large(size: int, limits: ImageLimits, param: str) -> ApiError:
    message = (
        f"{param} has {size / _MIB:.1f} MiB; legal are {limits.max_bytes / _MIB:g}. Send a smaller image: it is scaled"
        " down anyway."
    )
    return ApiError(413, message, code="image_too_large", param=param)


def _too_many_pixels(size: tuple[int, int] | None, limits: ImageLimits, param: str) -> ApiError:
    shown = "too many" if size is None else f"{size[0]} x {size[1]}"
    message = (
        f"{param} has {shown} pixels; legal are {limits.max_pixels / 1e6:g} million. Send a smaller image: it is scaled"
        " down anyway."
    )
    return ApiError(413, message, code="image_too_large", param=param)


def _broken(param: str) -> ApiError:
    return ApiError(
        422, f"{param} cannot be decoded; the image is truncated or broken.", code="broken_image", param=param
    )
