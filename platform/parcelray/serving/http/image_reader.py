"""From the URLs of a request to images at the model's input size, off the event loop."""

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from parcelray.config.serve import HttpConfig, RequestLimits
from parcelray.serving.engine.engine import ImagePixels, PromptBuilder
from parcelray.serving.http.api_errors import ApiError
from parcelray.serving.http.images import ImageLimits, data_url_bytes, open_image
from parcelray.serving.http.remote_images import TIMEOUT_S, fetch_image, not_in_time

_FETCHES = 8
"""Images that are fetched at the same time."""


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
