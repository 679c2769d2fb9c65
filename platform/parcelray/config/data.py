"""Configuration of data sources."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

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


class HeldOut(StrictModel):
    """Rows that are held out of the training, chosen by seed. Rows that share an image are in the same split."""

    validation: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the images whose rows are the validation split."""
    test: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the images whose rows are the test split."""
    seed: int = Field(default=0, ge=0)
    """Seed of the choice. The test split does not depend on the size of the validation split."""

    @model_validator(mode="after")
    def _check(self) -> "HeldOut":
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation {self.validation} and test {self.test} leave no rows for training; lower one of them"
            )
        return self

    @property
    def any(self) -> bool:
        """Whether any rows are held out."""
        return self.validation + self.test > 0


class _Rows(StrictModel):
    metric: str = "exact_match"
    """Metric and variant of the validation and of the report, as printed by `parcelray benchmarks list`."""
    held_out: HeldOut = HeldOut()
    """Validation and test rows."""
    max_bad_rows: float = Field(default=0.0, ge=0, le=1)
    """Largest fraction of rows that are skipped because they cannot be used; above it the training stops.

    Each such row is reported with its id and the reason, and written to bad_rows.jsonl in the run folder.
    """


class ConversationsDataConfig(_Rows):
    """Conversations about images, in LLaVA's format (`conversations`) or as OpenAI's `messages`.

    The images are files in a folder, members of tar shards, bytes in parquet files, or URIs.
    """

    type: Literal["conversations"] = "conversations"
    path: LocalPath
    """Rows: JSON, JSON lines, parquet, or tar shards in WebDataset's layout, local or any fsspec URI.

    A file, a folder, or a pattern with `*` or a range such as `shard-{000..015}.tar`.
    """
    images: LocalPath | None = None
    """Folder, or tar files (a pattern that ends with .tar), of the images that rows name; null: the folder of the rows.

    Absolute paths and URIs in the rows are read from where they are.
    """


class HubDataConfig(_Rows):
    """A Hugging Face data set: an id on the hub, a folder from `save_to_disk`, or parquet files."""

    type: Literal["hub"] = "hub"
    id: str | None = None
    """Id of a data set on the hub: ORG/NAME."""
    path: LocalPath | None = None
    """Folder from `save_to_disk`, or parquet files: a path, pattern or fsspec URI that ends with .parquet."""
    name: str | None = None
    """Name of the data set's configuration."""
    split: str = "train"
    """Split of the data set to train on; `held_out` takes rows of it."""
    revision: str | None = None
    """Commit of the data set on the hub; null: the newest."""
    images: tuple[str, ...] = ("image",)
    """Columns with an image or a list of images, in the order of the prompt."""
    prompt: str = "{question}"
    """Template of the question; `{column}` inserts the value of a column."""
    answer: str | None = "answer"
    """Column of the answer; null: the rows are conversations, see `ConversationsDataConfig`."""

    @model_validator(mode="after")
    def _check(self) -> "HubDataConfig":
        if (self.id is None) == (self.path is None):
            raise ValueError(f"id is {self.id} and path is {self.path}; set one of them")
        return self


class BenchmarkDataConfig(StrictModel):
    """The training split of a benchmark of the catalog, with the prompts of its evaluation.

    The report evaluates the benchmark itself: the transfer tuning of the PARCEL paper (arXiv 2605.30126).
    """

    type: Literal["benchmark"] = "benchmark"
    name: str
    """Benchmark name, as printed by `parcelray benchmarks list` or defined in a file of `catalog`."""
    data: LocalPath | None = None
    """File or folder with the benchmark's data; null: the Hugging Face hub, or an installed package."""
    catalog: tuple[LocalPath, ...] = ()
    """YAML files, or folders of YAML files, with additional benchmarks."""
    split: str = "train"
    """Split of the data to train on."""
    validation: float = Field(default=0.02, ge=0, lt=1)
    """Fraction of the images of the training split that are held out for the validation."""
    prompt_family: Literal["paligemma", "llava"] = "paligemma"
    """Prompt family, which selects prompts and expected answers."""
    rows_per_sample: int = Field(default=1, ge=1)
    """Largest number of rows about one image that are the turns of one sample: the image is encoded once for all."""
    seed: int = Field(default=0, ge=0)
    """Seed of the validation images."""
    max_bad_rows: float = Field(default=0.0, ge=0, le=1)
    """Largest fraction of rows that are skipped because they cannot be used; above it the training stops."""


SingleDataConfig = Annotated[
    MiniDataConfig | NlvrDataConfig | ParquetDataConfig | ConversationsDataConfig | HubDataConfig | BenchmarkDataConfig,
    Field(discriminator="type"),
]


class MixtureMember(StrictModel):
    """One source of a mixture."""

    data: SingleDataConfig
    """The source."""
    weight: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Share of the steps, relative to the sum of all weights; null: see `epochs` and `temperature`."""
    epochs: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Passes over this source, relative to those of the others: its share is epochs x images."""


class MixtureDataConfig(StrictModel):
    """Several sources, each with a share of the steps; a step reads one of them. The job's seed decides the order."""

    type: Literal["mixture"] = "mixture"
    sources: tuple[MixtureMember, ...] = Field(min_length=2)
    """The sources, all with `weight`, all with `epochs`, or all with neither."""
    temperature: float = Field(default=1.0, ge=1, allow_inf_nan=False)
    """Without weights and epochs, the share of a source is images ** (1 / temperature).

    1: in proportion to the images; a large value: equal shares.
    """

    @model_validator(mode="after")
    def _check(self) -> "MixtureDataConfig":
        given = {(member.weight is not None, member.epochs is not None) for member in self.sources}
        if len(given) > 1 or (True, True) in given:
            raise ValueError("set weight for all sources, or epochs for all, or neither for any")
        if self.temperature != 1 and given != {(False, False)}:
            raise ValueError(f"temperature {self.temperature} excludes weight and epochs; remove one of them")
        if given != {(True, False)} and any(isinstance(member.data, MiniDataConfig) for member in self.sources):
            raise ValueError("the mini suite has no end, so its share cannot follow from its size; give weights")
        return self


DataConfig = Annotated[
    MiniDataConfig
    | NlvrDataConfig
    | ParquetDataConfig
    | ConversationsDataConfig
    | HubDataConfig
    | BenchmarkDataConfig
    | MixtureDataConfig,
    Field(discriminator="type"),
]
