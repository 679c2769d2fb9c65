"""The decoder: right pixels for every kind of image, upright, 8-bit and without transparency; bombs are refused."""

import io
import pickle
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile

from parcelray.datasets.images import (
    MAX_PIXELS,
    BrokenImage,
    ImageTooLarge,
    Transparency,
    UnknownImageFormat,
    decode_image,
    image_size,
)
from parcelray.errors import UserError
from tests.datasets.image_cases import BLUE, CASES, FOLDER, REFUSED, WHITE, close, read


def _encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_the_tables_have_every_image() -> None:
    assert sorted([*CASES, *REFUSED]) == sorted(path.name for path in FOLDER.iterdir())


@pytest.mark.parametrize("transparency", ["drop", "white"])
@pytest.mark.parametrize("name", CASES)
def test_images_have_the_right_pixels(name: str, transparency: Transparency) -> None:
    decoded = decode_image(read(name), transparency=transparency)
    assert (decoded.mode, decoded.info, dict(decoded.getexif())) == ("RGB", {}, {})
    assert not decoded.has_transparency_data
    assert close(np.asarray(decoded), CASES[name].pixels(transparency), CASES[name].tolerance)
    assert image_size(read(name)) == decoded.size


@pytest.mark.parametrize("name", REFUSED)
def test_broken_images_and_bombs_are_refused_before_they_are_decoded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[int, int]] = []
    load = ImageFile.ImageFile.load

    def record(image: ImageFile.ImageFile) -> Any:
        loaded.append(image.size)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", record)
    with pytest.raises(REFUSED[name]) as refused:
        decode_image(read(name))
    assert isinstance(refused.value, UserError)
    assert all(width * height <= MAX_PIXELS for width, height in loaded)
    if name != "truncated.jpg":  # its header is valid
        with pytest.raises(REFUSED[name]):
            image_size(read(name))


def test_the_limits_of_a_caller_hold() -> None:
    data = _encoded(Image.new("RGB", (100, 50)))
    assert decode_image(data, max_pixels=5000).size == (100, 50)
    with pytest.raises(ImageTooLarge, match=r"has 100 x 50 pixels; legal are at most 0\.004999 million") as refused:
        decode_image(data, max_pixels=4999)
    assert pickle.loads(pickle.dumps(refused.value)).size == (100, 50)
    with pytest.raises(UnknownImageFormat, match="legal formats are JPEG, WEBP"):
        decode_image(data, formats=("JPEG", "WEBP"))
    with pytest.raises(UnknownImageFormat):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_is_shown_upright(kind: str, orientation: int) -> None:
    """The stored image is turned and flipped so that a viewer shows a blue left upper quarter."""
    upright = Image.new("RGB", (96, 64), WHITE)
    upright.paste(BLUE, (0, 0, 48, 32))
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = upright.transpose(inverse[orientation]) if orientation > 1 else upright
    data = _encoded(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    decoded = decode_image(data)
    assert decoded.size == image_size(data) == (96, 64)
    assert close(np.asarray(decoded), np.asarray(upright), 60 if kind == "JPEG" else 0)


def test_invalid_metadata_are_ignored() -> None:
    data = _encoded(Image.new("RGB", (4, 2), BLUE), exif=b"Exif\x00\x00neither II nor MM")
    assert decode_image(data).size == image_size(data) == (4, 2)


def test_16_bit_grey_with_a_transparent_value() -> None:
    values = np.array([[0, 300, 301, 65535]], dtype=np.uint16)
    data = _encoded(Image.fromarray(values), transparency=300)
    assert np.asarray(decode_image(data))[0, :, 0].tolist() == [0, 1, 1, 255]
    assert np.asarray(decode_image(data, transparency="white"))[0, :, 0].tolist() == [0, 255, 1, 255]
    tiff = _encoded(Image.fromarray(values), "TIFF")
    assert np.asarray(decode_image(tiff))[0, :, 0].tolist() == [0, 1, 1, 255]


def test_half_transparent_colours_are_mixed_with_white_or_kept() -> None:
    data = _encoded(Image.new("RGBA", (2, 2), (100, 0, 200, 51)))
    assert np.asarray(decode_image(data))[0, 0].tolist() == [100, 0, 200]
    assert close(np.asarray(decode_image(data, transparency="white"))[0, 0], np.array([224, 204, 244]), 1)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    # An alpha for each palette entry, for which Pillow's `convert` warns.
    data = _encoded(palette, transparency=bytes([0, 255]))
    assert np.asarray(decode_image(data))[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    assert np.asarray(decode_image(data, transparency="white"))[0].tolist() == [[255] * 3, [40, 50, 60]]


def test_errors_that_pillow_does_not_declare_are_problems_of_the_image() -> None:
    from PIL.PngImagePlugin import PngInfo

    comment = PngInfo()
    comment.add_text("a", "b" * 20_000_000, zip=True)
    with pytest.raises(BrokenImage, match="truncated or broken"):
        decode_image(_encoded(Image.new("RGB", (8, 8)), pnginfo=comment))
