"""Images are read within the time limit of their request, and slow hosts do not delay decoding."""

import asyncio
import io
import threading
from typing import Any

import pytest
from PIL import Image

from parcelray.config.serve import HttpConfig, RequestLimits
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.serving.engine.engine import PromptBuilder
from parcelray.serving.http import images
from parcelray.serving.http.api_errors import ApiError
from parcelray.serving.http.images import ImageLimits, ImageReader, open_image
from tests.serving.http.test_api import data_url
from tests.serving.http.test_hostile import picture
from tests.serving.local import PATIENCE_S


@pytest.fixture
def reader() -> ImageReader:
    return ImageReader(RequestLimits(), HttpConfig(image_threads=1, image_hosts=("images.example.com",)))


def test_an_image_that_takes_too_long_is_a_503(
    reader: ImageReader, processor: ElasticProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()

    def slow(*arguments: Any) -> Any:
        answered.wait()
        return open_image(*arguments)

    monkeypatch.setattr(images, "open_image", slow)
    with pytest.raises(ApiError) as refused:
        asyncio.run(reader.read(PromptBuilder(processor), {"url": data_url(picture("PNG"))}, 0.1))
    assert (refused.value.status, refused.value.code, refused.value.headers["retry-after"]) == (
        503,
        "deadline_exceeded",
        "1",
    )
    answered.set()


def test_hosts_that_do_not_answer_do_not_delay_decoding(
    reader: ImageReader, processor: ElasticProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()
    fetched: list[str] = []

    def silent(url: str, *_: Any) -> bytes:
        fetched.append(url)
        answered.wait()
        return picture("PNG")

    monkeypatch.setattr(images, "fetch_image", silent)
    monkeypatch.setattr(images, "TIMEOUT_S", PATIENCE_S)
    prompts = PromptBuilder(processor)

    async def run() -> None:
        stuck = [
            asyncio.create_task(reader.read(prompts, {"url": "https://images.example.com/a.png"}, PATIENCE_S))
            for _ in range(20)
        ]
        while not fetched:
            await asyncio.sleep(0)
        (image,) = await reader.read(prompts, {"url": data_url(picture("PNG"))}, PATIENCE_S)
        assert image.side == prompts.image_size
        assert not any(each.done() for each in stuck)
        answered.set()
        assert [image.side for (image,) in await asyncio.gather(*stuck)] == [prompts.image_size] * 20

    asyncio.run(run())


def test_a_host_that_does_not_answer_is_a_422(
    reader: ImageReader, processor: ElasticProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()
    monkeypatch.setattr(images, "fetch_image", lambda *_: answered.wait())
    monkeypatch.setattr(images, "TIMEOUT_S", 0.05)
    with pytest.raises(ApiError) as refused:
        asyncio.run(reader.read(PromptBuilder(processor), {"url": "https://images.example.com/a.png"}, PATIENCE_S))
    assert (refused.value.status, refused.value.code, refused.value.param) == (422, "image_not_fetched", "url")
    answered.set()


@pytest.mark.parametrize("size", [(20_000_000, 1), (1, 20_000_000)])
def test_a_very_long_image_gets_pixels_or_a_413(
    reader: ImageReader, processor: ElasticProcessor, size: tuple[int, int]
) -> None:
    """The default limits allow 32 megapixels."""
    buffer = io.BytesIO()
    Image.new("1", size).save(buffer, "PNG")
    data = buffer.getvalue()
    assert len(data) < 100_000
    (image,) = asyncio.run(reader.read(PromptBuilder(processor), {"url": data_url(data)}, PATIENCE_S))
    assert image.rgb == bytes(3 * image.side**2)
    limits = ImageLimits(max_bytes=2**20, max_pixels=19_999_999)
    with pytest.raises(ApiError, match=f"url has {size[0]} x {size[1]} pixels; legal are at most") as refused:
        open_image(data, limits, "url")
    assert (refused.value.status, refused.value.code) == (413, "image_too_large")
