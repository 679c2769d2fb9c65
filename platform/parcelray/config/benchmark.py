"""Configuration of one benchmark split: the source of its rows, the meaning of their columns, prompts and metrics."""

from collections.abc import Iterable, Mapping
from string import Formatter
from typing import Annotated, Literal, TypeVar

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from parcelray.config.base import BY_KEY, StrictModel
from parcelray.config.data import ConversationsDataConfig, Family, HubDataConfig, NlvrQuestion

PromptFamily = Literal["paligemma", "llava"]
"""Model families that have their own prompt templates."""
T = TypeVar("T")
ByFamily = Annotated[
    Annotated[T, Tag("one value")] | Annotated[dict[PromptFamily, T], Tag(BY_KEY)],
    Discriminator(lambda value: BY_KEY if isinstance(value, dict) else "one value"),
]
"""One value for all prompt families, or a mapping with one value per family; see `of_family`."""
AnswerForm = Literal[
    "text",
    "list",
    "records",
    "literal",
    "letter",
    "choice_text",
    "choice_letter",
    "option_text",
    "option_letter",
    "truth",
]
"""Formats of a column of answers."""
BoxForm = Literal["location_tokens", "corners"]
"""Forms in which a model writes a box."""
OPTION_FIELDS = ("options_lines", "options_tabs", "options_inline")
"""Template fields in addition to columns: the choices as `A. x` lines, separated by tabs, or as `(A) x, (B) y`."""


class VideoConfig(StrictModel):
    """Frame sampling of a video: every `stride`-th frame from the start of the video or segment.

    A video with too few frames is repeated until there are enough.
    """

    path: str
    """Video file or folder of frames, relative to the data folder; may contain columns: `videos/v_{video_name}.mp4`."""
    frames: int = Field(ge=1)
    """Number of frames per video."""
    stride: int = Field(ge=1)
    """Distance between two sampled frames, in frames."""
    segment: tuple[str, str] | None = None
    """Columns with start and end of the segment in seconds; None: the whole video."""


class JoinConfig(StrictModel):
    """Join with a separate table of images."""

    config: str
    """Configuration (folder) of the image table."""
    column: str
    """Column of the question table with the key of the image."""
    key: str = "id"
    """Key column of the image table."""
    image: str = "image"
    """Image column of the image table."""


class AnswersConfig(StrictModel):
    """The column of the correct answers, and the expected answers that are made of it.

    `form`, `template` and `drop_empty` take one value for all prompt families, or a mapping with one value per family.
    """

    column: str
    """Column with the answers."""
    form: ByFamily[AnswerForm] = "text"
    """Format of the column.

    `text`: one answer; `list`: several answers; `records`: a list of mappings; `literal`: a Python list in a string;
    `letter`: the letter of a choice, or one answer if the row has no choices; `choice_text`, `choice_letter`: the index
    of a choice, from 0, and whether the prompt asks for its text or its letter; `option_text`, `option_letter`: the
    same for the text of a choice; `truth`: true or false.
    """
    field: str | None = None
    """Key of the answer in each mapping, for the format `records`."""
    template: ByFamily[str] = "{answer}"
    """Template of the expected output, for example `The answer is {answer}.`"""
    drop_empty: ByFamily[bool] = False
    """Whether empty answers are dropped if there are several."""


class BoxConfig(StrictModel):
    """The column of a box in the image, and its format."""

    column: str
    """Column with four numbers."""
    form: Literal["xywh", "xyxy", "yxyx"] = "xywh"
    """Order of the four numbers."""
    unit: Literal["pixels", "fractions"] = "pixels"
    """Unit of the numbers: pixels, or fractions of the image's sides."""
    answer: ByFamily[BoxForm] = "location_tokens"
    """Form of the expected answer, for all prompt families or by family; a box that is drawn has none.

    `location_tokens`: `<loc0102><loc0205><loc0511><loc0614>`, top, left, bottom, right in 1/1023 of the image's sides
    (PaliGemma); `corners`: `[0.2, 0.1, 0.6, 0.5]`, left, top, right, bottom in fractions of the sides (LLaVA).
    """


class ColumnsConfig(StrictModel):
    """The meaning of the columns of a table."""

    types: dict[str, str]
    """Arrow types of the columns that are read.

    For example string, int64, image, list<string> or struct<bytes: binary, path: string>.
    """
    id: tuple[str, ...] = ()
    """Columns that identify a row; empty: the row number."""
    images: tuple[str, ...] = ()
    """Columns with an image or a list of images, in the order of the prompt; empty cells are skipped."""
    join: JoinConfig | None = None
    """Separate table of the images."""
    video: VideoConfig | None = None
    """Video whose frames are the images."""
    each: tuple[str, ...] = ()
    """Columns of lists of equal length; each list entry is a separate question, and keys of mappings become columns."""
    answers: AnswersConfig | None = None
    """Correct answers; None if the target is a box or a mask."""
    choices: tuple[str, ...] = ()
    """One column with a list of choices (or a list in a string), or one column per choice.

    An empty choice is not shown in prompts; the choices after it keep their letters.
    """
    box: BoxConfig | None = None
    """Target box."""
    mask: str | None = None
    """Column of the target mask: polygons in pixels, or COCO run lengths."""
    draw_box: BoxConfig | None = None
    """Box that is drawn into the image, in red and one pixel wide."""
    cluster: str | None = None
    """Column whose value is equal for questions about the same image; None: the images are compared."""
    metadata: dict[str, str] = Field(default_factory=dict)
    """Columns that the metric reads, by the metadata names that the metric expects."""
    keep: dict[str, tuple[str | int | bool, ...]] = Field(default_factory=dict)
    """Row filter: accepted values by column; other rows are dropped."""
    remove: dict[str, str] = Field(default_factory=dict)
    """Text to remove from the values, by column."""
    empty: dict[str, str] = Field(default_factory=dict)
    """Replacement of empty cells (also NaN and `nan`, as pandas writes them), by column."""

    @model_validator(mode="after")
    def _check(self) -> "ColumnsConfig":
        sources = [bool(self.images), self.join is not None, self.video is not None]
        if sum(sources) != 1:
            raise ValueError(f"{sum(sources)} sources of images are set; set exactly one of images, join and video")
        if self.answers is None and self.box is None and self.mask is None:
            raise ValueError("no target is set; set answers, box or mask")
        unknown = sorted(self.read() - self.types.keys() - {"split"})
        if unknown:
            raise ValueError(f"types lacks the columns {', '.join(unknown)}; add their types")
        return self

    def read(self) -> set[str]:
        """Names of the columns to read, without those that `each` creates."""
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
        """Names of the columns that `each` creates from mappings."""
        return {name for column in self.each for name in _keys(self.types.get(column, ""))}


class TableSource(StrictModel):
    """Rows of a table: a Hugging Face data set (hub or local), parquet, or JSON lines next to an image folder."""

    type: Literal["table"] = "table"
    hub: str | None = None
    """Data set id on the Hugging Face hub; None: local only."""
    hub_legacy: str | None = None
    """Earlier id of a data set that was renamed; older caches use it."""
    alternatives: tuple[str, ...] = ()
    """Other copies, and the source of the raw data."""
    big_vision: str | None = None
    """Name of the split in the configurations of big_vision."""
    revision: str | None = None
    """Commit to pin; None: the newest, which is recorded in the result."""
    config: str | None = None
    """Name of the data set's configuration."""
    splits: tuple[str, ...] = Field(min_length=1)
    """Splits to concatenate; the column `split` holds the split of a row."""
    rows: int | None = Field(default=None, ge=1)
    """Expected number of rows after `keep`; None: unknown."""


class MiniSource(StrictModel):
    """The procedural mini suite."""

    type: Literal["mini"] = "mini"
    split: Literal["validation", "test"] = "test"
    """Split of the suite; the splits share no scene."""
    families: tuple[Family, ...] = Field(default=("general", "resolution", "grounding", "video"), min_length=1)
    """Task families to evaluate."""
    samples: int = Field(default=500, ge=1)
    """Number of samples per family."""
    seed: int = Field(default=0, ge=0)
    """Seed of the scenes."""


class NlvrSource(StrictModel):
    """NLVR (Suhr et al., ACL 2017) from a local folder."""

    type: Literal["nlvr"] = "nlvr"
    split: Literal["validation", "test"] = "test"
    """`test`: the corpus's test split; `validation`: the held-out directories of its development split."""
    view: Literal["boxes", "picture"] = "boxes"
    """`boxes`: three images per prompt, one per box; `picture`: the whole picture as one image."""
    questions: tuple[NlvrQuestion, ...] = Field(default=("statement", "count", "color", "size", "box"), min_length=1)
    """Kinds of questions: the true/false statement, and those derived from the structured representation."""
    seed: int = Field(default=0, ge=0)
    """Seed of the derived questions and of the validation directories."""


class SamplesSource(StrictModel):
    """Parquet files with the columns of `parcelray.datasets.sample.Sample`, such as an export of the mini suite."""

    type: Literal["samples"] = "samples"
    split: Literal["validation", "test"] = "test"
    """Split to evaluate, which is also the name of its folder."""


class RowsSource(StrictModel):
    """The user's own rows of conversations or questions, as a training reads them: each turn is one question."""

    type: Literal["rows"] = "rows"
    data: Annotated[ConversationsDataConfig | HubDataConfig, Field(discriminator="type")] | None = None
    """The rows, as in the section `data` of a training."""
    split: Literal["train", "validation", "test", "all"] = "test"
    """Split of `data.held_out` to evaluate; `all`: every row."""


class EasyVqaSource(StrictModel):
    """easy-VQA (Victor Zhou, 2019, MIT): questions about one coloured shape; the package `easy-vqa` has the files."""

    type: Literal["easy_vqa"] = "easy_vqa"
    split: Literal["train", "test"] = "test"
    """Split of the package to read."""


class ReferenceScore(StrictModel):
    """A published score."""

    model: str
    """Model and resolution, for example `paligemma2-3b-224`."""
    score: float
    """Score as published, on the scale of the publication."""
    std: float | None = None
    """Standard deviation over fine-tuning runs; None: not published."""
    note: str = ""
    """Caveats for comparisons with this score."""
    source: str
    """Publication of the score."""


class BenchmarkConfig(StrictModel):
    """Configuration of one benchmark split."""

    name: str = Field(pattern=r"^[a-z0-9][A-Za-z0-9_]*$")
    """Name on the command line and in every result."""
    title: str = ""
    """Display name."""
    family: str
    """Group for aggregation: video, grounding, resolution_sensitive, general, caption, llava_suite, ..."""
    group: str | None = None
    """Name of the benchmark whose splits are reported together, for example `refcoco`; None: reported alone."""
    sets: tuple[str, ...] = ()
    """Evaluation sets that contain the split: parcel, paligemma, llava, local."""
    source: Annotated[
        TableSource | MiniSource | NlvrSource | SamplesSource | RowsSource | EasyVqaSource, Field(discriminator="type")
    ]
    """Source of the rows."""
    columns: ColumnsConfig | None = None
    """Meaning of the columns, for sources of type table only."""
    prompts: dict[PromptFamily, str] = Field(default_factory=dict)
    """Prompt template by model family; `{column}` inserts the value of a column.

    A family without a template cannot be evaluated on the split.
    """
    open_prompts: dict[PromptFamily, str] = Field(default_factory=dict)
    """Prompt template by model family for rows without choices."""
    max_new_tokens: ByFamily[int] = 32
    """Largest number of tokens of an answer, for all families or by family."""
    decoding: Literal["greedy", "beam", "likelihood"] = "greedy"
    """Decoding method."""
    num_beams: int = Field(default=1, ge=1)
    """Number of beams of a beam search."""
    metric: ByFamily[str] | None = None
    """Metric and variant such as `exact_match:raw`, for all prompt families or by family.

    It fits the answers that the family's prompt asks for, by the rule of the family's published scores. None: the
    samples name their metric, or the split cannot be scored.
    """
    other_metrics: tuple[str, ...] = ()
    """Further metrics that other tools use for the split."""
    report_by: Literal["family", "task"] | None = None
    """Field of the samples by which results are reported separately; None: one result."""
    average_over: str | None = None
    """Metadata field (such as a language) for macro-averaging: the score is the mean of the scores of its values."""
    references: tuple[ReferenceScore, ...] = ()
    """Published scores."""
    notes: tuple[str, ...] = ()
    """Caveats for comparisons of scores."""
    unscorable: str | None = None
    """Reason why the platform cannot score the split (no public answers, a paid judge); None: it can."""
    confidence: dict[str, Literal["high", "medium", "low"]] = Field(default_factory=dict)
    """Confidence in the facts of this configuration, by field; low: check on the first download."""
    facts: tuple[str, ...] = ()
    """Sources of the facts of this configuration."""

    @field_validator("source", mode="before")
    @classmethod
    def _table(cls, value: object) -> object:
        return {"type": "table"} | value if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _check(self) -> "BenchmarkConfig":
        if isinstance(self.source, TableSource) != (self.columns is not None):
            raise ValueError(
                f"columns are required for a source of type table and illegal for others; the type is"
                f" {self.source.type}"
            )
        if self.columns is not None:
            legal = {*self.columns.types, *self.columns.made(), *OPTION_FIELDS, "split"}
            if (self.metric is None) == (self.unscorable is None):
                raise ValueError("set either metric, or unscorable with the reason why there is no metric")
            for family, prompt in (*self.prompts.items(), *self.open_prompts.items()):
                unknown = sorted(set(_names(prompt)) - legal)
                if unknown:
                    raise ValueError(
                        f"the prompt for {family} uses {', '.join(unknown)}, which is not a column; legal:"
                        f" {', '.join(sorted(legal))}"
                    )
        for key, value in self._family_values():
            _check_families(key, value, self.prompts)
        if (self.decoding == "beam") != (self.num_beams > 1):
            raise ValueError(
                f"decoding {self.decoding} is incompatible with num_beams {self.num_beams}; legal: beam with at least"
                " 2 beams, other methods with 1"
            )
        return self

    def longest_answer(self, family: PromptFamily) -> int:
        """Largest number of tokens of an answer, for a model family."""
        return self.max_new_tokens if isinstance(self.max_new_tokens, int) else self.max_new_tokens.get(family, 32)

    def metric_of(self, family: PromptFamily) -> str | None:
        """Metric and variant that score the answers to the prompts of a family; None: see `metric`."""
        return None if self.metric is None else of_family(self.metric, family)

    def metrics(self) -> tuple[str, ...]:
        """Metrics of all prompt families, without repetition; empty: see `metric`."""
        if self.metric is None:
            return ()
        return tuple(dict.fromkeys(self.metric.values())) if isinstance(self.metric, dict) else (self.metric,)

    def _family_values(self) -> Iterable[tuple[str, object]]:
        """Settings that every family with a prompt must have, by their key paths."""
        yield "metric", self.metric
        answers, box = (self.columns.answers, self.columns.box) if self.columns is not None else (None, None)
        if answers is not None:
            yield "columns.answers.form", answers.form
            yield "columns.answers.template", answers.template
            yield "columns.answers.drop_empty", answers.drop_empty
        if box is not None:
            yield "columns.box.answer", box.answer


def of_family(value: T | Mapping[PromptFamily, T], family: PromptFamily) -> T:
    """Returns the value of a setting for a prompt family: the family's own, or the one for all families."""
    return value[family] if isinstance(value, Mapping) else value


def _check_families(key: str, value: object, prompts: dict[PromptFamily, str]) -> None:
    if not isinstance(value, dict) or value.keys() == prompts.keys():
        return
    missing, unused = [name for name in prompts if name not in value], [name for name in value if name not in prompts]
    problem = f"has no value for {', '.join(missing)}" if missing else f"has a value for {', '.join(unused)}"
    raise ValueError(
        f"{key} {problem}, but prompts are given for {', '.join(prompts) or 'no family'}; give one value per family"
        " with a prompt, or a single value for all families"
    )


def _names(template: str) -> list[str]:
    return [name for _, name, _, _ in Formatter().parse(template) if name]


def _keys(type_text: str) -> list[str]:
    """Reads the keys from the type of a list of mappings, such as `list<struct<question: string, answer: string>>`."""
    _, prefix, inner = type_text.partition("list<struct<")
    return [part.split(":")[0].strip() for part in inner.removesuffix(">>").split(",")] if prefix else []
