"""The model of the studies: a mini LLaVA with random weights."""

from pathlib import Path

import pytest

from parcelray.models.manifest import write_manifest
from parcelray.models.mini import save_checkpoint
from parcelray.models.mini_llava import build

from ..models.conftest import CORPUS, MINI_LLAVA


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a mini LLaVA with random weights."""
    folder = tmp_path_factory.mktemp("llava") / "model"
    model, processor = build(MINI_LLAVA, CORPUS, None, seed=0)
    save_checkpoint(model.eval(), processor, folder)
    write_manifest(folder, config={}, git_commit=None, data=None, seed=0)
    return folder
