"""Where samples come from, as data."""

from typing import Annotated, Literal

from pydantic import Field

from parcelray.config.base import StrictModel

Family = Literal["general", "resolution", "grounding", "video"]
NlvrQuestion = Literal["statement", "count", "color", "size", "box"]


class MiniDataConfig(StrictModel):
    """The procedural mini suite, made on the fly."""

    type: Literal["mini"] = "mini"
    families: tuple[Family, ...] = Field(default=("general", "resolution", "grounding", "video"), min_length=1)
    """Families to draw from."""
    dense_fraction: float = Field(default=0.5, ge=0, le=1)
    """Share of training samples with dense supervision (captions of every cell, all boxes)."""
    seed: int = Field(default=0, ge=0)
    """Seed of the scenes."""


class NlvrDataConfig(StrictModel):
    """NLVR (Suhr et al., ACL 2017): sentences written by people about pictures of three boxes.

    The data stay where they are.
    """

    type: Literal["nlvr"] = "nlvr"
    path: str
    """Folder with dev.parquet and test.parquet, or with the corpus's own layout (nlvr/dev/dev.json, ...)."""
    view: Literal["boxes", "picture"] = "boxes"
    """`boxes`: three images a prompt, one per box; `picture`: the whole picture as one image."""
    questions: tuple[NlvrQuestion, ...] = Field(default=("statement", "count", "color", "size", "box"), min_length=1)
    """The true/false statement, and questions derived from the structured representation."""
    seed: int = Field(default=0, ge=0)
    """Seed of the choice among derived questions."""


class ParquetDataConfig(StrictModel):
    """A folder of parquet files with the columns of `parcelray.datasets.sample.Sample`, as written by the mini suite's export."""

    type: Literal["parquet"] = "parquet"
    path: str
    """Folder with train/, validation/ and test/ folders of parquet files."""


DataConfig = Annotated[MiniDataConfig | NlvrDataConfig | ParquetDataConfig, Field(discriminator="type")]
