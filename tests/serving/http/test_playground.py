"""The playground page at `/`, in headless Chromium."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from parcelray.config.connector import ParcelConnectorConfig
from parcelray.datasets.sample import Sample
from parcelray.evaluation.predict.generation import GenerationSettings
from parcelray.evaluation.predict.predictor import Predictor
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.checkpoint import MINI_BASE, resolve_checkpoint
from parcelray.models.vlm import load_processor, load_vlm
from tests.serving.http.webdriver import Browser, browser
from tests.serving.local import endpoint

pytestmark = [pytest.mark.serving, pytest.mark.browser]


@pytest.fixture(scope="module")
def parcel() -> ElasticVLM:
    """The mini base with an untrained PARCEL connector."""
    model = load_vlm(resolve_checkpoint(MINI_BASE).path, connector=ParcelConnectorConfig(num_heads=4))
    model.eval()
    return model


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@pytest.fixture(scope="module")
def url(parcel: ElasticVLM, processor: ElasticProcessor) -> Iterator[str]:
    with endpoint(parcel, processor) as (url, _, _):
        yield url


@pytest.fixture
def page(chromium: Browser, url: str) -> Browser:
    """The newly opened page, with the console messages of earlier tests removed."""
    chromium.open(url)
    chromium.messages()
    return chromium


def test_a_question_is_answered_at_every_budget(
    page: Browser, parcel: ElasticVLM, processor: ElasticProcessor, samples: list[Sample], tmp_path: Path
) -> None:
    sample = samples[0]
    (tmp_path / "image.png").write_bytes(sample.images[0])
    page.wait("return document.getElementById('budget').max === '2'")
    page.type("#file", str(tmp_path / "image.png"))
    # The largest budget: 8 x 8 anchors and 192 queries.
    page.wait("return document.getElementById('view').dataset.budget === '256'")
    assert "64 anchors and 192 queries" in page.run("return document.getElementById('split').textContent")
    page.run("const b = document.getElementById('budget'); b.value = '0'; b.dispatchEvent(new Event('input'))")
    page.wait("return document.getElementById('view').dataset.budget === '16'")
    assert "16 anchors and 0 queries" in page.run("return document.getElementById('split').textContent")
    page.run("document.getElementById('prompt').value = arguments[0]", sample.prompt)
    page.click("#all")
    page.wait("return document.querySelectorAll('article').length === 3")
    # The logits of the two most likely tokens differ by more than 0.5 in these answers, so rounding does not matter.
    offline = Predictor(parcel, processor, settings=GenerationSettings(max_new_tokens=64)).generate_budgets(
        [sample], [16, 64, 256]
    )
    for budget, (answer,) in offline.items():
        shown = page.run(
            "return document.querySelector(`article[data-budget='${arguments[0]}'] .answer`).textContent", budget
        )
        assert shown == (answer or "(an empty answer)")
        rows = page.run("return document.querySelector(`article[data-budget='${arguments[0]}'] dl`).innerText", budget)
        assert str(budget * len(sample.images)) in rows
        assert "FLOP" in rows
        assert "ms" in rows


DROP = """
const bytes = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
const drop = new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
document.getElementById("drop").dispatchEvent(drop);
"""


def picture_of(*colors: str) -> str:
    """Returns a wide image of vertical stripes as base64."""
    image = Image.new("RGB", (60 * len(colors), 60))
    for index, color in enumerate(colors):
        image.paste(color, (60 * index, 0, 60 * index + 60, 60))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_dropped_image_is_shown_resized_for_paligemma(page: Browser) -> None:
    page.wait("return document.getElementById('budget').max === '2'")
    page.click("#anchors")
    page.click("#heat")
    page.run(DROP, picture_of("#ff0000", "#00ff00", "#0000ff"))
    page.wait("return document.getElementById('view').dataset.budget === '256'")
    # PaliGemma resizes the whole image to its square input.
    assert [page.run(PIXEL, at)[:3] for at in (50, 224, 400)] == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


PIXEL = "return [...document.getElementById('view').getContext('2d').getImageData(arguments[0], 224, 1, 1).data]"


def test_the_image_is_shown_cropped_for_llava(chromium: Browser) -> None:
    folder = resolve_checkpoint("mini_llava").path
    llava = load_vlm(folder, connector=ParcelConnectorConfig(num_heads=4))
    llava.eval()
    with endpoint(llava, load_processor(folder)) as (url, _, _):
        chromium.open(url)
        chromium.wait("return document.getElementById('budget').max === '2'")
        chromium.click("#anchors")
        chromium.click("#heat")
        chromium.run(DROP, picture_of("#ff0000", "#00ff00", "#0000ff"))
        chromium.wait("return document.getElementById('view').dataset.budget === '256'")
        assert [chromium.run(PIXEL, at)[:3] for at in (50, 224, 400)] == [[0, 255, 0]] * 3


def test_without_an_image_there_are_no_visual_tokens(page: Browser) -> None:
    page.wait("return document.getElementById('budget').max === '2'")
    page.click("#all")
    page.wait("return document.querySelectorAll('article').length === 1")
    text = page.run("return document.querySelector('article').innerText")
    assert "Without an image" in text
    assert "FLOP" not in text
    assert page.run("return document.getElementById('status').textContent") == "Answered."


def test_the_example_is_drawn_and_errors_are_shown(page: Browser) -> None:
    page.wait("return document.getElementById('budget').max === '2'")
    page.run("document.getElementById('prompt').value = ''")
    page.click("#ask")
    assert page.run("return document.getElementById('status').textContent") == "Write a question."
    page.click("#example")
    page.wait("return document.getElementById('view').dataset.budget === '256'")
    page.run("document.getElementById('prompt').value = 'x'.repeat(100000)")
    page.click("#ask")
    page.wait("return document.getElementById('status').textContent.includes('the maximum is')")


def test_every_control_has_a_label_and_no_resource_is_external(page: Browser) -> None:
    page.wait("return document.getElementById('budget').max === '2'")
    unnamed = page.run(
        "return [...document.querySelectorAll('input, button, canvas')].filter((e) => !(e.labels && e.labels.length) &&"
        " !e.textContent.trim() && !e.getAttribute('aria-label') && !e.closest('label') && e.type !== 'file').map((e)"
        " => e.outerHTML)"
    )
    assert unnamed == []
    assert page.run("return document.documentElement.lang") == "en"
    assert page.run(
        "return performance.getEntriesByType('resource').every((entry) => entry.name.startsWith(location.origin) ||"
        " entry.name.startsWith('data:'))"
    )
    assert [entry["message"] for entry in page.messages() if entry["level"] == "SEVERE"] == []
