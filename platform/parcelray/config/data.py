"""Configuration of data sources."""

from typing import Annotated, Literal

from pydantic import Field

from parcelray.config.base import StrictModel
from parcelray.config.paths import LocalPath

Family = Literal["general", "resolution", "grounding", "video"]
NlvrQuestion = Literal["statement", "count", "color", "size", "box"]


class MiniDataConfig(StrictModel):
    """The procedural mini suite, generated on the fly."""

    type: Literal["mini"] = "mini"
    families: tuple[Family, ...] = Field(default=("general", "resolution", "grounding", "video"), min_length=1)
    """Task families to draw samples from."""
    dense_fraction: float = Field(default=0.5, ge=0, le=1)
    """Fraction of training samples with dense supervision (captions of every cell, all boxes)."""
    seed: int = Field(default=0, ge=0)
    """Seed of the scenes."""


class NlvrDataConfig(StrictModel):
    """NLVR (Suhr et al., ACL 2017): human-written sentences about pictures of three boxes.

    The data are read from where they are and are not copied.
    """

    type: Literal["nlvr"] = "nlvr"
    path: LocalPath
    """Folder with dev.parquet and test.parquet, or with the corpus's own layout (nlvr/dev/dev.json, ...)."""
    view: Literal["boxes", "picture"] = "boxes"
    """`boxes`: three images per prompt, one per box; `picture`: the whole picture as one image."""
    questions: tuple[NlvrQuestion, ...] = Field(default=("statement", "count", "color", "size", "box"), min_length=1)
    """Kinds of questions: the true/false statement, and those derived from the structured representation."""
    seed: int = Field(default=0, ge=0)
    """Seed of the derived questions and of the validation directories."""


class ParquetDataConfig(StrictModel):
    """Parquet files with the columns of `parcelray.datasets.sample.Sample`, such as an export of the mini suite."""

    type: Literal["parquet"] = "parquet"
    path: LocalPath
    """Folder that contains the folders train/, validation/ and test/ with parquet files."""


DataConfig = Annotated[MiniDataConfig | NlvrDataConfig | ParquetDataConfig, Field(discriminator="type")]
