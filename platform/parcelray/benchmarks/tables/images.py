"""Reads encoded images from table cells and frames from videos."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
from PIL import Image, ImageDraw

from parcelray.benchmarks.tables.types import shown
from parcelray.config.benchmark import VideoConfig
from parcelray.datasets import images
from parcelray.errors import UserError

_FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_FRAME_QUALITY = 95


class BadCell(Exception):
    """A cell cannot be used. The message is reported as the problem of its row."""


def cell_images(cell: Any, folder: Path) -> list[bytes]:
    """Returns the encoded images of a cell; an empty cell gives an empty list.

    Args:
        cell: bytes, {"bytes", "path"}, a path below the folder, or a list of these.
        folder: folder of the data.

    Raises:
        BadCell: the cell or its bytes have another type, the path leads out of the folder, or the file cannot be read.
    """
    if cell is None or cell == "":
        return []
    if isinstance(cell, list):
        return [image for entry in cell for image in cell_images(entry, folder)]
    if isinstance(cell, dict):
        if cell.get("bytes"):
            return [_bytes(cell["bytes"])]
        if not cell.get("path"):
            raise BadCell("an image without bytes and without a path")
        cell = cell["path"]
    if isinstance(cell, bytes):
        return [cell]
    if isinstance(cell, str):
        return [_read(_file(folder, cell), cell)]
    raise BadCell(f"a cell of type {type(cell).__name__} instead of an image")


def image_size(image: bytes) -> tuple[int, int]:
    """Returns width and height in pixels, see `datasets.images.image_size`.

    Raises:
        BadCell: the bytes are not an image, or it has too many pixels.
    """
    try:
        return images.image_size(image)
    except UserError as error:
        raise BadCell(str(error)) from None


def with_box(image: bytes, box: tuple[float, float, float, float]) -> bytes:
    """Draws a red box, one pixel wide, and returns the image as PNG.

    Args:
        image: encoded image.
        box: top, left, bottom, right as fractions of the image's sides.

    Raises:
        BadCell: the image cannot be decoded.
    """
    try:
        picture = images.decode_image(image)
    except UserError as error:
        raise BadCell(str(error)) from None
    top, left, bottom, right = box
    width, height = picture.width - 1, picture.height - 1
    ImageDraw.Draw(picture).rectangle((left * width, top * height, right * width, bottom * height), outline=(255, 0, 0))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def video_frames(
    folder: Path, path: str, config: VideoConfig, segment: tuple[float, float] | None = None
) -> tuple[bytes, ...]:
    """Returns `config.frames` encoded frames of a video file or of a folder of frames.

    Takes every `config.stride`-th frame from the start of the segment. If the video is too short, its frames are
    repeated from the first one.

    Args:
        folder: folder of the data.
        path: path of the video below the folder.
        config: number of frames and stride.
        segment: start and end in seconds; None: the whole video. Must be None for a folder of frames, which has no
            time stamps.

    Raises:
        BadCell: the video does not exist, or it cannot be decoded.
    """
    video = _file(folder, path)
    if video.is_dir():
        files = [file for file in sorted(video.iterdir()) if file.suffix.lower() in _FRAME_SUFFIXES]
        frames = [_read(file, file.name) for file in files[:: config.stride][: config.frames]]
    else:
        frames = list(_decoded(video, config, segment))
    if not frames:
        raise BadCell(f"no frames in {shown(path)}")
    return tuple(frames[number % len(frames)] for number in range(config.frames))


def _decoded(file: Path, config: VideoConfig, segment: tuple[float, float] | None) -> Iterator[bytes]:
    start, end = segment or (0.0, float("inf"))
    num_taken = num_decoded = 0
    try:
        with av.open(str(file)) as container:
            for frame in container.decode(video=0):
                time = frame.time or 0.0
                if time < start:
                    continue
                if time > end or num_taken == config.frames:
                    return
                if num_decoded % config.stride == 0:
                    num_taken += 1
                    buffer = io.BytesIO()
                    picture: Image.Image = frame.to_image()  # type: ignore[no-untyped-call]
                    picture.save(buffer, format="JPEG", quality=_FRAME_QUALITY)
                    yield buffer.getvalue()
                num_decoded += 1
    except (av.FFmpegError, IndexError) as error:
        raise BadCell(f"the video {file.name} cannot be decoded ({error})") from None


def _file(folder: Path, path: str) -> Path:
    """Returns the file or folder of a path that stays below the data folder.

    Links are followed: the images of a Hugging Face cache are links to files outside the snapshot's folder.
    """
    if os.path.isabs(path) or ".." in Path(path).parts:
        raise BadCell(f"the path {shown(path)} leads out of the data folder; paths in cells must stay below it")
    file = folder / path
    try:
        present = file.exists()
    except (OSError, ValueError):
        # The name is too long, or contains a NUL character; a cell with an image as base64 text is such a name.
        present = False
    if not present:
        raise BadCell(f"the file {shown(path)} does not exist")
    return file


def _bytes(value: Any) -> bytes:
    """Returns the bytes of an image; JSON holds them as a list of numbers."""
    try:
        # The constructor also takes a number, and returns as many zeros.
        return bytes(value if isinstance(value, list) else memoryview(value))
    except (TypeError, ValueError):
        raise BadCell(f"the bytes of an image are {shown(value)}; give bytes, or numbers from 0 to 255") from None


def _read(file: Path, path: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise BadCell(f"the file {shown(path)} cannot be read ({error.strerror})") from None
