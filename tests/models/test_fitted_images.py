"""Images at the model's input size: as the image processors resize them, but with little memory for any shape."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from parcelray.config.model import MiniLlavaModelConfig, MiniModelConfig
from parcelray.errors import UserError
from parcelray.models import mini, mini_llava
from parcelray.models.backbones.processor_base import ElasticProcessor
from tests.models.conftest import CORPUS

MODES = ("paligemma", "crop", "crop after a larger resize", "pad", "square resize")
SIDE = 112
# The result is a part of the image, whose coordinates Pillow rounds to float32. A value on the border between two grey
# levels may then be rounded to the other one.
TOLERANCE = 1


def processor(mode: str, side: int = SIDE) -> ElasticProcessor:
    """Returns a processor of a family, with an image processor of the mode."""
    if mode == "paligemma":
        return mini.build_processor(MiniModelConfig(image_size=side, patch_size=14), CORPUS)
    llava = mini_llava.build_processor(MiniLlavaModelConfig(image_size=side, patch_size=14), CORPUS)
    if mode == "crop after a larger resize":
        llava.image_processor.size = {"shortest_edge": side * 8 // 7}
    elif mode == "pad":
        llava.image_processor = LlavaImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_pad=True
        )
    elif mode == "square resize":
        llava.image_processor = mini.build_processor(
            MiniModelConfig(image_size=side, patch_size=14), CORPUS
        ).image_processor
    return llava


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "size",
    [
        *((640, 480), (480, 640), (427, 640), (500, 375), (333, 1000), (1200, 190)),
        *((SIDE, SIDE), (SIDE, 113), (90, 90), (1, 64), (64, 1), (1, 1), (3, 2)),
    ],
)
def test_fitted_images_are_those_of_the_image_processor(mode: str, size: tuple[int, int]) -> None:
    """Noise, because its edges are the hardest case; differences in photographs are smaller."""
    own = processor(mode)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    stock = own.image_processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    expected = stock.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).astype(int)
    fitted = own.fitted(image)
    assert fitted.size == (SIDE, SIDE)
    difference = np.abs(np.asarray(fitted).astype(int) - expected)
    # A larger resize also changes the order of Pillow's two passes, which clip values between them.
    assert difference.max() <= TOLERANCE + 2 * (mode == "crop after a larger resize"), difference.max()
    pixels = own.pixel_values([image, image])
    whole = np.asarray(own(images=[[image], [image]], text=["a", "b"])["pixel_values"])
    assert pixels.shape == (2, 3, SIDE, SIDE)
    assert np.array_equal(pixels.numpy(), whole)
    assert np.array_equal(own.normalised([fitted]).numpy()[0], pixels.numpy()[1])


@pytest.mark.parametrize("mode", ["P", "L", "RGBA", "CMYK"])
def test_only_decoded_images_are_accepted(mode: str) -> None:
    with pytest.raises(
        UserError, match=rf"mode {mode}( with transparency)?; give RGB images without transparency, as .*decode_image"
    ):
        processor("crop").fitted(Image.new(mode, (SIDE, SIDE)))
    image = Image.new("RGB", (SIDE, SIDE))
    image.info["transparency"] = (0, 0, 0)
    with pytest.raises(UserError, match="mode RGB with transparency"):
        processor("paligemma")(images=[[image]], text=["a"])


def _peak() -> int:
    """Returns the largest memory of this process since the last reset, bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux, to reset the peak of the memory")
@pytest.mark.parametrize("mode", MODES)
def test_long_images_need_little_memory(mode: str) -> None:
    own = processor(mode, 448)
    own.pixel_values([Image.new("RGB", (640, 480))])
    for size in ((60_000, 1), (1, 60_000), (20_000_000, 1), (1, 20_000_000)):
        image = Image.new("RGB", size, (128, 128, 128))
        Path("/proc/self/clear_refs").write_text("5")
        before = _peak()
        pixels = own.pixel_values([image])
        assert pixels.shape == (1, 3, 448, 448)
        assert _peak() - before < 200e6, size
