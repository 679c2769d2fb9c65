"""The images of tests/fixtures/cases/images with the right pixels."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parcelray.datasets.images import BrokenImage, ImageTooLarge

FOLDER = Path(__file__).parent.parent / "fixtures" / "cases" / "images"
WHITE, BLACK, RED, GREY, BLUE = (255,) * 3, (0,) * 3, (200, 30, 30), (90,) * 3, (20, 60, 200)

Pixels = NDArray[np.uint8]
Colour = tuple[int, ...]


@dataclass(frozen=True)
class ImageCase:
    """Right pixels [H, W, 3] with transparency dropped, and on a white background if these differ."""

    dropped: Pixels
    on_white: Pixels | None = None
    tolerance: int = 0
    """Largest difference in grey levels; above 0 for JPEG, whose decoders may round differently."""

    def pixels(self, transparency: str) -> Pixels:
        """Returns the right pixels for an argument of `decode_image`."""
        return self.dropped if transparency == "drop" or self.on_white is None else self.on_white


def _picture(
    size: tuple[int, int], background: Colour, box: tuple[int, int, int, int] | None = None, colour: Colour = BLACK
) -> Pixels:
    """Returns an image of width x height with a rectangle (left, top, right, bottom)."""
    pixels = np.full((size[1], size[0], 3), background, dtype=np.uint8)
    if box is not None:
        left, top, right, bottom = box
        pixels[top:bottom, left:right] = colour
    return pixels


_SQUARE = (64, 64)
_RED_ON_WHITE = _picture(_SQUARE, WHITE, (8, 8, 40, 56), RED)
_BAR_ON_WHITE = _picture(_SQUARE, WHITE, (8, 28, 56, 36), BLACK)
_ALL_BLACK = _picture(_SQUARE, BLACK)
CASES = {
    "rgb_transparent_color.png": ImageCase(_RED_ON_WHITE),
    "palette_transparent_color.png": ImageCase(_RED_ON_WHITE),
    "palette_transparent_color.gif": ImageCase(_RED_ON_WHITE),
    "grey_transparent_color.png": ImageCase(_picture(_SQUARE, WHITE, (8, 8, 40, 56), GREY)),
    "rgba_black_on_transparent.png": ImageCase(_ALL_BLACK, _BAR_ON_WHITE),
    "grey_alpha.png": ImageCase(_ALL_BLACK, _BAR_ON_WHITE),
    "png_named.jpg": ImageCase(_ALL_BLACK, _BAR_ON_WHITE),
    "grey_16_bit.png": ImageCase(np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (4, 1, 3))),
    "cmyk.jpg": ImageCase(_RED_ON_WHITE, tolerance=4),
    "bilevel.png": ImageCase(_picture(_SQUARE, WHITE)),
    # Ringing of the JPEG is largest in the row before the edge.
    "exif_orientation_6.jpg": ImageCase(_picture((48, 96), WHITE, (0, 0, 48, 24), BLUE), tolerance=40),
    "animated.gif": ImageCase(_picture(_SQUARE, (255, 0, 0))),
    "one_pixel_wide.png": ImageCase(_picture((1, 64), (10, 200, 10))),
    "wide_60000x1.png": ImageCase(_picture((60_000, 1), (128,) * 3)),
}
REFUSED = {"bomb_20000x20000.png": ImageTooLarge, "truncated.jpg": BrokenImage, "empty.jpg": BrokenImage}


def read(name: str) -> bytes:
    """Returns the bytes of an image."""
    return (FOLDER / name).read_bytes()


def close(found: Pixels, expected: Pixels, tolerance: int) -> bool:
    """Whether two images have the same shape and no value differs by more than `tolerance` grey levels."""
    return found.shape == expected.shape and bool((np.abs(found.astype(int) - expected.astype(int)) <= tolerance).all())
