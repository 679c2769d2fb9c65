from collections.abc import Callable
from typing import Any

import pytest

from parcelray.datasets.sample import Sample

MakeSample = Callable[..., Sample]


@pytest.fixture
def make_sample() -> MakeSample:
    def make(*answers: str, id: str = "1", metric: str = "exact_match", **metadata: Any) -> Sample:
        return Sample(
            id=id,
            benchmark="b",
            family="f",
            task="t",
            images=(),
            prompt="?",
            answers=answers,
            metric=metric,
            metadata=metadata,
        )

    return make
