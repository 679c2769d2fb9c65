"""Encoded images out of table cells, and frames out of videos."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
from PIL import Image, ImageDraw, UnidentifiedImageError

from parcelray.config.benchmark import VideoConfig
from parcelray.errors import UserError

_FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_FRAME_QUALITY = 95


class BadCell(Exception):
    """A cell that holds no image; the message is the reason that is reported with the row."""


def cell_images(cell: Any, folder: Path) -> list[bytes]:
    """The encoded images of a cell: bytes, {"bytes", "path"}, a path below the folder, or a list of these; none of an empty cell.

    Raises:
        BadCell: it is none of these, or the file is not there.
    """
    if cell is None or cell == "":
        return []
    if isinstance(cell, list):
        return [image for entry in cell for image in cell_images(entry, folder)]
    if isinstance(cell, dict):
        if cell.get("bytes"):
            return [bytes(cell["bytes"])]
        if not cell.get("path"):
            raise BadCell("an image without bytes and without a path")
        cell = cell["path"]
    if isinstance(cell, bytes):
        return [cell]
    if isinstance(cell, str):
        return [_file(folder, cell).read_bytes()]
    raise BadCell(f"a cell of type {type(cell).__name__} where an image should be")


def image_size(image: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the header.

    Raises:
        BadCell: it is not an image.
    """
    try:
        with Image.open(io.BytesIO(image)) as opened:
            return opened.size
    except (UnidentifiedImageError, OSError):
        raise BadCell("an image that cannot be read") from None


def with_box(image: bytes, box: tuple[float, float, float, float]) -> bytes:
    """The image as PNG with a red box, one pixel wide.

    Args:
        image: encoded.
        box: top, left, bottom, right in fractions of the image's sides.

    Raises:
        BadCell: it is not an image.
    """
    try:
        picture = Image.open(io.BytesIO(image)).convert("RGB")
    except (UnidentifiedImageError, OSError):
        raise BadCell("an image that cannot be read") from None
    top, left, bottom, right = box
    width, height = picture.width - 1, picture.height - 1
    ImageDraw.Draw(picture).rectangle((left * width, top * height, right * width, bottom * height), outline=(255, 0, 0))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def video_frames(
    folder: Path, path: str, config: VideoConfig, segment: tuple[float, float] | None = None
) -> tuple[bytes, ...]:
    """`config.frames` frames of a video file, or of a folder of frames, as encoded images.

    Every `config.stride`-th frame from the start of the segment; the frames of a video that ends before are repeated
    from the first on.

    Args:
        folder: of the data.
        path: below the folder.
        config: frames and stride.
        segment: start and end, seconds; None: the whole video. In a folder of frames there is no time, so it must be
            None.

    Raises:
        BadCell: there is no such video, or it cannot be decoded.
    """
    place = _file(folder, path)
    if place.is_dir():
        files = [file for file in sorted(place.iterdir()) if file.suffix.lower() in _FRAME_SUFFIXES]
        found = [file.read_bytes() for file in files[:: config.stride][: config.frames]]
    else:
        found = list(_decoded(place, config, segment))
    if not found:
        raise BadCell(f"no frames in {path}")
    return tuple(found[number % len(found)] for number in range(config.frames))


def _decoded(file: Path, config: VideoConfig, segment: tuple[float, float] | None) -> Iterator[bytes]:
    start, end = segment or (0.0, float("inf"))
    taken = seen = 0
    try:
        with av.open(str(file)) as container:
            for frame in container.decode(video=0):
                time = frame.time or 0.0
                if time < start:
                    continue
                if time > end or taken == config.frames:
                    return
                if seen % config.stride == 0:
                    taken += 1
                    buffer = io.BytesIO()
                    picture: Image.Image = frame.to_image()  # type: ignore[no-untyped-call]
                    picture.save(buffer, format="JPEG", quality=_FRAME_QUALITY)
                    yield buffer.getvalue()
                seen += 1
    except (av.FFmpegError, IndexError) as error:
        raise BadCell(f"the video {file.name} cannot be decoded ({error})") from None


def _file(folder: Path, path: str) -> Path:
    file = (folder / path).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise UserError(
            f"The path {path!r} in the data leads out of {folder}; paths in cells stay below the data's folder."
        )
    if not file.exists():
        raise BadCell(f"no file {path}")
    return file
