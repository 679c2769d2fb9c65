"""What the tests of evaluations share."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def without_pictures() -> Iterator[None]:
    """Evaluations leave an empty file for their picture: drawing it takes as long as the answers of a tiny model."""

    def plot(summary: object, path: Path) -> None:
        path.touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parcelray.cluster.evaluation_results.plot_evaluation", plot)
        yield
