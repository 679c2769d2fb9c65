"""One benchmark split as data: where its rows are, what their columns mean, how it is asked and how it is scored."""

from string import Formatter
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from parcelray.config.base import StrictModel
from parcelray.config.data import Family, NlvrQuestion

PromptFamily = Literal["paligemma", "llava"]
"""Model families that are asked in their own words."""
OPTION_FIELDS = ("options_lines", "options_tabs", "options_inline")
"""What a template may name beside columns: the choices as `A. x` lines, separated by tabs, or as `(A) x, (B) y`."""


class VideoConfig(StrictModel):
    """Frames of a video: every `stride`-th from the start (of the segment); shorter ones repeat until there are enough."""

    path: str
    """File or folder of frames below the data's folder; may name columns: `videos/v_{video_name}.mp4`."""
    frames: int = Field(ge=1)
    """Frames per video."""
    stride: int = Field(ge=1)
    """Frames from one to the next."""
    segment: tuple[str, str] | None = None
    """Columns with start and end of the segment, seconds; None: the whole video."""


class JoinConfig(StrictModel):
    """Images that lie in a table of their own."""

    config: str
    """Configuration (folder) of the image table."""
    column: str
    """Column of the question table that names the image."""
    key: str = "id"
    """Column of the image table that it names."""
    image: str = "image"
    """Column of the image table with the image."""


class AnswersConfig(StrictModel):
    """What is right, and in which form a column says it."""

    column: str
    """Column of the answers."""
    form: Literal["text", "list", "records", "literal", "choice_text", "choice_letter", "truth"] = "text"
    """`text`: one answer; `list`: several; `records`: a list of mappings; `literal`: a Python list in a string; `choice_text`,
    `choice_letter`: the index of a choice, 0 the first; `truth`: true or false."""
    field: str | None = None
    """Of the mappings, the key of the answer."""
    template: str = "{answer}"
    """How the model is to say it, for example `The answer is {answer}.`"""
    drop_empty: bool = False
    """Whether empty answers among several are left out."""


class BoxConfig(StrictModel):
    """A box in the image."""

    column: str
    """Column of four numbers."""
    form: Literal["xywh", "xyxy", "yxyx"] = "xywh"
    """Order of the numbers."""
    unit: Literal["pixels", "fractions"] = "pixels"
    """Of the numbers."""


class ColumnsConfig(StrictModel):
    """What the columns of a table mean."""

    types: dict[str, str]
    """Arrow types of the columns that are read: string, int64, image, list<string>, struct<bytes: binary, path: string>, ..."""
    id: tuple[str, ...] = ()
    """Columns that name a row; none: its number."""
    images: tuple[str, ...] = ()
    """Columns with an image or a list of images, in the order of the prompt; empty cells are left out."""
    join: JoinConfig | None = None
    """The images lie in another table."""
    video: VideoConfig | None = None
    """The images are frames of a video."""
    each: tuple[str, ...] = ()
    """Columns of lists of the same length, of which each entry is a question of its own; of mappings, their keys become columns."""
    answers: AnswersConfig | None = None
    """What is right; None where the truth is a box or a mask."""
    choices: tuple[str, ...] = ()
    """One column with the list of choices (or such a list in a string), or one column for each choice; empty cells are left out."""
    box: BoxConfig | None = None
    """The true box."""
    mask: str | None = None
    """Column of the true mask: polygons in pixels, or COCO's run lengths."""
    draw_box: BoxConfig | None = None
    """A box that is drawn into the image in red, one pixel wide."""
    cluster: str | None = None
    """Column that questions about the same image share; None: the images themselves."""
    metadata: dict[str, str] = Field(default_factory=dict)
    """Columns that the metric reads, under the names that it knows."""
    keep: dict[str, tuple[str | int | bool, ...]] = Field(default_factory=dict)
    """Rows that count: a column, and its legal values; the others are left out."""
    remove: dict[str, str] = Field(default_factory=dict)
    """Text that is taken out of a column."""
    empty: dict[str, str] = Field(default_factory=dict)
    """Text that stands for an empty cell of a column."""

    @model_validator(mode="after")
    def _check(self) -> "ColumnsConfig":
        sources = [bool(self.images), self.join is not None, self.video is not None]
        if sum(sources) != 1:
            raise ValueError("say where the images are in exactly one way: images, join or video")
        if self.answers is None and self.box is None and self.mask is None:
            raise ValueError("nothing says what is right; give answers, box or mask")
        unknown = sorted(self.read() - self.types.keys() - {"split"})
        if unknown:
            raise ValueError(f"types lacks the columns {', '.join(unknown)}; give their types")
        return self

    def read(self) -> set[str]:
        """The columns that are read, before `each` makes new ones."""
        boxes = [box.column for box in (self.box, self.draw_box) if box is not None]
        video = [] if self.video is None else [*_names(self.video.path), *(self.video.segment or ())]
        named = {
            *self.id,
            *self.images,
            *self.each,
            *self.choices,
            *boxes,
            *video,
            *self.keep,
            *self.remove,
            *self.empty,
            *self.metadata.values(),
        }
        single = (
            self.mask,
            self.cluster,
            self.join.column if self.join else None,
            self.answers.column if self.answers else None,
        )
        named |= {name for name in single if name is not None}
        return named - self.made()

    def made(self) -> set[str]:
        """Columns that `each` makes out of mappings."""
        return {name for column in self.each for name in _keys(self.types.get(column, ""))}


class TableSource(StrictModel):
    """Rows in a table: a Hugging Face data set (hub or local), parquet, or JSON lines beside an image folder."""

    type: Literal["table"] = "table"
    hub: str | None = None
    """Id on the Hugging Face hub; None: local only."""
    hub_legacy: str | None = None
    """Id before the data set moved; older caches use it."""
    alternatives: tuple[str, ...] = ()
    """Other copies, and where the raw data are."""
    big_vision: str | None = None
    """Name of the split in big_vision's configurations."""
    revision: str | None = None
    """Commit to pin; None: the newest, recorded in the result."""
    config: str | None = None
    """Configuration of the data set."""
    splits: tuple[str, ...] = Field(min_length=1)
    """Splits, one after the other; a row's split is the column `split`."""
    rows: int | None = Field(default=None, ge=1)
    """Rows that the split should have (after `keep`); None: unknown."""


class MiniSource(StrictModel):
    """The procedural mini suite."""

    type: Literal["mini"] = "mini"
    split: Literal["validation", "test"] = "test"
    """Split of the suite; no scene is in two of them."""
    families: tuple[Family, ...] = Field(default=("general", "resolution", "grounding", "video"), min_length=1)
    """Families to ask."""
    samples: int = Field(default=500, ge=1)
    """Samples per family."""
    seed: int = Field(default=0, ge=0)
    """Seed of the scenes."""


class NlvrSource(StrictModel):
    """NLVR (Suhr et al., ACL 2017) from a local folder."""

    type: Literal["nlvr"] = "nlvr"
    split: Literal["validation", "test"] = "test"
    """The corpus's test split, or the directories of its development split that are kept for validation."""
    view: Literal["boxes", "picture"] = "boxes"
    """Three images a prompt, one per box, or the whole picture as one."""
    questions: tuple[NlvrQuestion, ...] = Field(default=("statement", "count", "color", "size", "box"), min_length=1)
    """The true/false statement, and questions derived from the structured representation."""
    seed: int = Field(default=0, ge=0)
    """Seed of the choice among derived questions."""


class SamplesSource(StrictModel):
    """Parquet files with the columns of `parcelray.datasets.sample.Sample`, as the mini suite's export writes them."""

    type: Literal["samples"] = "samples"
    split: Literal["validation", "test"] = "test"
    """Folder of the split."""


class ReferenceScore(StrictModel):
    """A score that somebody printed."""

    model: str
    """Model and resolution, for example `paligemma2-3b-224`."""
    score: float
    """As printed, on the paper's scale."""
    std: float | None = None
    """Standard deviation over fine-tuning runs."""
    note: str = ""
    """What must be known to compare with it."""
    source: str
    """Where it is printed."""


class BenchmarkConfig(StrictModel):
    """One benchmark split."""

    name: str = Field(pattern=r"^[a-z0-9][A-Za-z0-9_]*$")
    """Name on the command line and in every result."""
    title: str = ""
    """Name that people use."""
    family: str
    """Group for aggregation: video, grounding, resolution_sensitive, general, caption, llava_suite, ..."""
    group: str | None = None
    """Splits of one benchmark that are reported together, for example `refcoco`."""
    sets: tuple[str, ...] = ()
    """Evaluation sets that it belongs to: parcel, paligemma, llava, local."""
    source: Annotated[TableSource | MiniSource | NlvrSource | SamplesSource, Field(discriminator="type")]
    """Where the rows are."""
    columns: ColumnsConfig | None = None
    """What the columns of a table mean; the other sources know."""
    prompts: dict[PromptFamily, str] = Field(default_factory=dict)
    """What each model family is asked; `{column}` stands for a column.

    Without one, a family cannot be evaluated on it.
    """
    open_prompts: dict[PromptFamily, str] = Field(default_factory=dict)
    """What is asked instead where a row has no choices."""
    max_new_tokens: int | dict[PromptFamily, int] = 32
    """Longest answer, tokens; of all families, or of each."""
    decoding: Literal["greedy", "beam", "likelihood"] = "greedy"
    """How answers are made."""
    num_beams: int = Field(default=1, ge=1)
    """Beams of a beam search."""
    metric: str | None = None
    """Metric and variant that the reference scores use, such as `anls:strict`; None where the samples name their own, or nothing can be scored."""
    other_metrics: tuple[str, ...] = ()
    """Metrics that other tools use on it."""
    report_by: Literal["family", "task"] | None = None
    """Results for each family or task of the samples, instead of one."""
    average_over: str | None = None
    """Metadata whose values weigh alike: the score is the mean of the scores of each value (a language)."""
    references: tuple[ReferenceScore, ...] = ()
    """Scores in print."""
    notes: tuple[str, ...] = ()
    """What one must know before one compares numbers."""
    unscorable: str | None = None
    """Why the platform cannot score it (no public answers, a paid judge); None: it can."""
    confidence: dict[str, Literal["high", "medium", "low"]] = Field(default_factory=dict)
    """How sure the facts are, by field; low: check on the first download."""
    facts: tuple[str, ...] = ()
    """Where the facts were read."""

    @field_validator("source", mode="before")
    @classmethod
    def _table(cls, value: object) -> object:
        return {"type": "table"} | value if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _check(self) -> "BenchmarkConfig":
        if isinstance(self.source, TableSource) != (self.columns is not None):
            raise ValueError(
                f"columns belong to a source of type table, and to no other; the source is {self.source.type}"
            )
        if self.columns is not None:
            legal = {*self.columns.types, *self.columns.made(), *OPTION_FIELDS, "split"}
            if (self.metric is None) == (self.unscorable is None):
                raise ValueError("give the metric, or say in unscorable why there is none")
            for family, prompt in (*self.prompts.items(), *self.open_prompts.items()):
                unknown = sorted(set(_names(prompt)) - legal)
                if unknown:
                    raise ValueError(
                        f"the prompt for {family} names {', '.join(unknown)}, which is no column; legal:"
                        f" {', '.join(sorted(legal))}"
                    )
        if (self.decoding == "beam") != (self.num_beams > 1):
            raise ValueError(
                f"decoding {self.decoding} does not go with num_beams {self.num_beams}; a beam search has at least two"
            )
        return self

    def longest_answer(self, family: PromptFamily) -> int:
        """Tokens of the longest answer of a model family."""
        return self.max_new_tokens if isinstance(self.max_new_tokens, int) else self.max_new_tokens.get(family, 32)


def _names(template: str) -> list[str]:
    return [name for _, name, _, _ in Formatter().parse(template) if name]


def _keys(type_text: str) -> list[str]:
    """Keys of a list of mappings: `list<struct<question: string, answer: string>>`."""
    _, found, inner = type_text.partition("list<struct<")
    return [part.split(":")[0].strip() for part in inner.removesuffix(">>").split(",")] if found else []
