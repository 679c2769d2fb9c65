"""The table of `parcelray flops --reducer`: cost of each budget with a training-free reducer, and its own cost."""

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from parcelray.config.reducer import ReducerConfig
from parcelray.errors import UserError
from parcelray.profiling.backbone_shapes import BackboneShape, resolve_backbone
from parcelray.profiling.cost_table import LEFT_OUT, CostRow, check_workload
from parcelray.profiling.flops import BYTES_PER_MB, cost, default_text_tokens
from parcelray.profiling.reduction_flops import ReducedCost, reduced_cost

if TYPE_CHECKING:
    from rich.table import Table

REDUCERS: tuple[str, ...] = tuple(kind.model_fields["type"].default for kind in get_args(get_args(ReducerConfig)[0]))
"""Reducers that can be given by name, with their default settings."""

REDUCER_LEFT_OUT = ("sorting", "seeding", "averaging", "vector norms")
"""Operations of reducers that are not counted, in addition to `LEFT_OUT`."""

_REDUCER_ADAPTER: TypeAdapter[ReducerConfig] = TypeAdapter(ReducerConfig)


class ReductionRow(CostRow[ReducedCost]):
    """The cost of one budget and number of frames with a reducer."""

    @property
    def layers(self) -> str:
        """The visual tokens in the layers of the decoder, such as `576 x 2, 29 x 30` for 2 and then 30 layers."""
        return ", ".join(f"{count:,} x {len(list(same))}" for count, same in groupby(self.cost.tokens_by_layer))

    def to_dict(self) -> dict[str, Any]:
        """Returns all numbers of the row as a dictionary; FLOPs and bytes are exact."""
        own = {"visual_tokens_by_layer": list(self.cost.tokens_by_layer), "reducer_flops": self.cost.reducer}
        return super().to_dict() | own


@dataclass(frozen=True, slots=True)
class ReductionTable:
    """The costs of one backbone and reducer by budget and number of frames."""

    backbone: BackboneShape
    reducer: ReducerConfig
    rows: tuple[ReductionRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns backbone, reducer, rows and the operations that are not counted as a dictionary."""
        return {
            "backbone": asdict(self.backbone),
            "reducer": self.reducer.model_dump(mode="json"),
            "left_out": [*LEFT_OUT, *REDUCER_LEFT_OUT],
            "rows": [row.to_dict() for row in self.rows],
        }

    def to_rich(self) -> "Table":
        """Returns a table for the console: a row per budget and number of frames, and a column per part (GFLOP)."""
        from rich.table import Table

        shape = self.backbone
        table = Table(
            title=f"{shape.name} at {shape.image_size} px ({shape.num_patches} patches), reducer {self.reducer.type}",
            caption="GFLOP of one prefill; one multiply-add = 2 FLOPs (arXiv 2605.30126, Appendix C). Layers: visual"
            " tokens x number of decoder layers. Not counted: " + ", ".join((*LEFT_OUT, *REDUCER_LEFT_OUT)) + ".",
        )
        table.add_column("tokens")
        for name in ("layers", "vision tower", "projector", "reducer", "decoder", "head", "total", "saved"):
            table.add_column(name, justify="right")
        table.add_column("KV cache, MB", justify="right")
        for row in self.rows:
            model = row.cost.model
            parts = (model.vision_encoder, model.projection, row.cost.reducer, model.decoder, model.output_head)
            frames = "" if row.num_frames == 1 else f"\n{row.num_frames} frames"
            table.add_row(
                f"{shape.num_patches} -> {row.num_visual_tokens}{frames}\n{row.num_text_tokens} text",
                row.layers.replace(", ", "\n"),
                *(f"{flops / 1e9:,.3f}" for flops in (*parts, row.cost.total)),
                f"{row.flops_saving:.1%}",
                f"{model.kv_cache_bytes / BYTES_PER_MB:,.1f}",
            )
        return table


def build_reduced(
    backbone: str,
    reducer: str | ReducerConfig,
    *,
    resolution: int | None = None,
    budgets: Sequence[int] = (64,),
    frames: Sequence[int] = (1,),
    text_tokens: int | None = None,
) -> ReductionTable:
    """Computes the cost of every budget at every number of frames with a training-free reducer.

    Args:
        backbone: name from `PRESETS`, `mini`, or a folder with a config.json.
        reducer: name from `REDUCERS`, a configuration, or one as YAML, such as `{type: prumerge, spatial: true}`.
        resolution: side of the image in pixels; None: the backbone's default.
        budgets: budgets, visual tokens per frame.
        frames: numbers of frames: 1 for an image, more for a video.
        text_tokens: length of the text prompt in tokens; None: as in the paper (129 with an image, 65 with a video).

    Raises:
        UserError: the backbone or reducer is unknown, they do not fit each other, or a number is illegal.
        UnsupportedBudgetError: the reducer does not support a budget.
    """
    shape = resolve_backbone(backbone, resolution)
    config = reducer_from_text(reducer) if isinstance(reducer, str) else reducer
    check_workload(budgets, frames)
    rows = []
    for num in frames:
        num_text = default_text_tokens(num) if text_tokens is None else text_tokens
        uncompressed = cost(shape, None, shape.num_patches, num, num_text)
        rows += [
            ReductionRow(budget, num, num_text, reduced_cost(shape, config, budget, num, num_text), uncompressed)
            for budget in budgets
        ]
    return ReductionTable(shape, config, tuple(rows))


def reducer_from_text(text: str) -> ReducerConfig:
    """Returns the configuration of a reducer given by name, or as a YAML mapping with the key `type`.

    Raises:
        UserError: the name is unknown, or the mapping is not a legal configuration.
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        content = text
    name = content.get("type") if isinstance(content, dict) else content
    if name not in REDUCERS:
        close = difflib.get_close_matches(str(name), REDUCERS, n=1)
        raise UserError(
            f"Unknown reducer {name!r}: choose one of"
            f" {', '.join(REDUCERS)}{f'; did you mean {close[0]}?' if close else '.'}"
        )
    try:
        return _REDUCER_ADAPTER.validate_python(content if isinstance(content, dict) else {"type": name})
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(
            f"The reducer {text!r} is not legal: {'.'.join(map(str, problem['loc'][1:]))}: {problem['msg']}; correct"
            " this setting."
        ) from error
