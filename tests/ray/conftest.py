"""What the tests on Ray share."""

from typing import Any

import pytest

from ..cluster.tiny import tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_start(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The section `model` of a job that starts from a tiny untrained checkpoint.

    A job from scratch would train its tokenizer in every worker and every reader.
    """
    return {"type": "checkpoint", "reference": str(tiny_checkpoint(tmp_path_factory.mktemp("start"), seed=3))}
