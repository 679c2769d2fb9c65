"""Images are read within the time of their request, and who waits for another host keeps nobody from decoding."""

import asyncio
import threading
from typing import Any

import pytest

from parcelray.config.serve import HttpConfig, RequestLimits
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.serving import image_reader
from parcelray.serving.api_errors import ApiError
from parcelray.serving.image_reader import ImageReader
from parcelray.serving.images import open_image
from parcelray.serving.prompting import PromptBuilder
from tests.serving.test_api import data_url
from tests.serving.test_hostile import picture


@pytest.fixture
def reader() -> ImageReader:
    return ImageReader(RequestLimits(), HttpConfig(image_threads=1, image_hosts=("images.example.com",)))


def test_an_image_that_takes_too_long_is_a_503(reader: ImageReader, processor: ElasticProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    def slow(*arguments: Any) -> Any:
        assert answered.wait(60)
        return open_image(*arguments)

    monkeypatch.setattr(image_reader, "open_image", slow)
    with pytest.raises(ApiError) as refused:
        asyncio.run(reader.read(PromptBuilder(processor), {"url": data_url(picture("PNG"))}, 0.1))
    assert (refused.value.status, refused.value.code, refused.value.headers["retry-after"]) == (503, "deadline_exceeded", "1")
    answered.set()


def test_hosts_that_do_not_answer_keep_no_image_from_being_decoded(reader: ImageReader, processor: ElasticProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr(image_reader, "fetch_image", lambda *_: never.wait(20))
    monkeypatch.setattr(image_reader, "TIMEOUT_S", 0.3)
    prompts = PromptBuilder(processor)

    async def run() -> None:
        stuck = [asyncio.create_task(reader.read(prompts, {"url": "https://images.example.com/a.png"}, 5)) for _ in range(20)]
        await asyncio.sleep(0.05)
        (image,) = await reader.read(prompts, {"url": data_url(picture("PNG"))}, 5)
        assert image.side == prompts.image_size
        found = await asyncio.gather(*stuck, return_exceptions=True)
        assert {(error.status, error.code, error.param) for error in found if isinstance(error, ApiError)} == {(422, "image_not_fetched", "url")}
        assert len(found) == 20
        never.set()

    asyncio.run(run())
