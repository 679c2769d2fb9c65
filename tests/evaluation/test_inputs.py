"""Images of studies: a file that cannot be decoded is named."""

import re
from pathlib import Path

import pytest

from parcelray.errors import UserError
from parcelray.evaluation.inputs import study_images
from tests.datasets.image_cases import read


def test_a_broken_file_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(read("rgb_transparent_color.png"))
    (tmp_path / "b.jpg").write_bytes(read("truncated.jpg"))
    (image,) = study_images(str(tmp_path), 1, 64)
    assert (image.size, image.info) == ((64, 64), {})
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "b.jpg")) + ": An image of 304 bytes cannot be"):
        study_images(str(tmp_path), 2, 64)
