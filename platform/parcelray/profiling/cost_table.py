"""The tables of `parcelray flops`: every term of the cost model by budget, and the savings against no compression."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, get_args

from pydantic import TypeAdapter

from parcelray.config.connector import ConnectorConfig, IdentityConnectorConfig
from parcelray.errors import UserError
from parcelray.profiling.backbone_shapes import BackboneShape, resolve_backbone
from parcelray.profiling.connector_flops import supported_budgets
from parcelray.profiling.flops import BYTES_PER_MB, CostBreakdown, cost, default_text_tokens

if TYPE_CHECKING:
    from rich.table import Table

CONNECTORS: tuple[str, ...] = tuple(
    kind.model_fields["type"].default for kind in get_args(get_args(ConnectorConfig)[0])
)
"""Connectors that can be given by name, with their default settings."""
DEFAULT_CONNECTOR = "parcel"
LEFT_OUT = (
    "patch embedding",
    "pooling",
    "normalisation",
    "activation",
    "softmax",
    "biases",
    "rotary positions",
    "output head over the image tokens",
)
"""Operations that the paper's cost model does not count."""

_CONNECTOR_ADAPTER: TypeAdapter[ConnectorConfig] = TypeAdapter(ConnectorConfig)


class PrefillCost(Protocol):
    """The cost of one prefill, with a connector or with a reducer."""

    @property
    def total(self) -> int:
        """FLOPs of the whole prefill."""

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the KV cache."""

    def terms(self) -> dict[str, int]:
        """The FLOP terms by name; they sum to `total`."""


CostT = TypeVar("CostT", bound=PrefillCost)


@dataclass(frozen=True, slots=True)
class CostRow(Generic[CostT]):
    """The cost of one budget and number of frames."""

    num_visual_tokens: int
    """Budget, visual tokens per frame; for a reducer inside the decoder, the mean over its layers."""
    num_frames: int
    num_text_tokens: int
    cost: CostT
    uncompressed: CostBreakdown
    """Cost of the same prompt with all patches as visual tokens, without connector and reducer."""

    @property
    def flops_saving(self) -> float:
        """Fraction of the uncompressed FLOPs that is saved; negative if the compression costs more than it saves."""
        return 1 - self.cost.total / self.uncompressed.total

    @property
    def kv_saving(self) -> float:
        """Fraction of the uncompressed KV cache that is saved."""
        return 1 - self.cost.kv_cache_bytes / self.uncompressed.kv_cache_bytes

    def to_dict(self) -> dict[str, Any]:
        """Returns all numbers of the row as a dictionary; FLOPs and bytes are exact."""
        return {
            "num_visual_tokens": self.num_visual_tokens,
            "num_frames": self.num_frames,
            "num_text_tokens": self.num_text_tokens,
            "terms": self.cost.terms(),
            "total_flops": self.cost.total,
            "kv_cache_bytes": self.cost.kv_cache_bytes,
            "uncompressed_flops": self.uncompressed.total,
            "uncompressed_kv_cache_bytes": self.uncompressed.kv_cache_bytes,
            "flops_saving": self.flops_saving,
            "kv_saving": self.kv_saving,
        }


@dataclass(frozen=True, slots=True)
class CostTable:
    """The costs of one backbone and connector by budget and number of frames."""

    backbone: BackboneShape
    connector: str
    rows: tuple[CostRow[CostBreakdown], ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns backbone, connector, rows and the operations that are not counted as a dictionary."""
        return {
            "backbone": asdict(self.backbone),
            "connector": self.connector,
            "left_out": list(LEFT_OUT),
            "rows": [row.to_dict() for row in self.rows],
        }

    def to_json(self) -> str:
        """Returns `to_dict` as JSON."""
        return json.dumps(self.to_dict())

    def to_rich(self) -> "Table":
        """Returns a table for the console: a column per budget and number of frames, and a row per term (GFLOP)."""
        from rich.table import Table

        shape = self.backbone
        table = Table(
            title=f"{shape.name} at {shape.image_size} px ({shape.num_patches} patches), connector {self.connector}",
            caption="One multiply-add = 2 FLOPs (arXiv 2605.30126, Appendix C). Not counted: "
            + ", ".join(LEFT_OUT)
            + ".",
        )
        table.add_column("GFLOP")
        for row in self.rows:
            frames = "image" if row.num_frames == 1 else f"{row.num_frames} frames"
            table.add_column(f"{row.num_visual_tokens} tokens\n{frames}\n{row.num_text_tokens} text", justify="right")
        terms = [row.cost.terms() for row in self.rows]
        for name in terms[0] if terms else ():
            table.add_row(name.replace("_", " "), *(f"{row_terms[name] / 1e9:,.3f}" for row_terms in terms))
        table.add_section()
        table.add_row("total, TFLOP", *(f"{row.cost.total / 1e12:,.4g}" for row in self.rows))
        table.add_row("KV cache, MB (bf16)", *(f"{row.cost.kv_cache_bytes / BYTES_PER_MB:,.4g}" for row in self.rows))
        table.add_row("FLOPs saved", *(f"{row.flops_saving:.1%}" for row in self.rows))
        table.add_row("KV cache saved", *(f"{row.kv_saving:.1%}" for row in self.rows))
        return table


def build(
    backbone: str,
    *,
    resolution: int | None = None,
    budgets: Sequence[int] | None = None,
    frames: Sequence[int] = (1,),
    connector: str | ConnectorConfig = DEFAULT_CONNECTOR,
    text_tokens: int | None = None,
) -> CostTable:
    """Computes the cost of every budget at every number of frames.

    Args:
        backbone: name from `PRESETS`, `mini`, or a folder with a config.json.
        resolution: side of the image in pixels; None: the backbone's default.
        budgets: budgets, visual tokens per frame; None: those of 16, 64 and 256 that the connector supports, or all its
            budgets if it supports none of them.
        frames: numbers of frames: 1 for an image, more for a video.
        connector: name from `CONNECTORS`, or the configuration of any connector.
        text_tokens: length of the text prompt in tokens; None: as in the paper (129 with an image, 65 with a video).

    Raises:
        UserError: the backbone or connector is unknown, the resolution is not a multiple of the patch size, or a number
            is illegal.
        UnsupportedBudgetError: the connector does not support a budget.
    """
    shape = resolve_backbone(backbone, resolution)
    config = connector_from_name(connector) if isinstance(connector, str) else connector
    if budgets is None:
        legal = supported_budgets(config, shape)
        budgets = [budget for budget in (16, 64, 256) if budget in legal] or legal
    check_workload(budgets, frames)
    return CostTable(
        shape, config.type, tuple(_row(shape, config, budget, num, text_tokens) for num in frames for budget in budgets)
    )


def check_workload(budgets: Sequence[int], frames: Sequence[int]) -> None:
    """Raises `UserError` if there is no budget or no number of frames, or if a number of frames is below 1."""
    if not budgets or not frames:
        raise UserError(
            "No budget or no number of frames is given; give at least one of each, such as budgets 16,64,256 and"
            " frames 1."
        )
    if min(frames) < 1:
        raise UserError(f"{min(frames)} frames is below 1; give 1 for an image, or the number of frames of a video.")


def connector_from_name(name: str) -> ConnectorConfig:
    """Returns the default configuration of a connector of `CONNECTORS`.

    Raises:
        UserError: the name is not in `CONNECTORS`.
    """
    if name not in CONNECTORS:
        close = difflib.get_close_matches(name, CONNECTORS, n=1)
        raise UserError(
            f"Unknown connector {name!r}: choose one of"
            f" {', '.join(CONNECTORS)}{f'; did you mean {close[0]}?' if close else '.'}"
        )
    return _CONNECTOR_ADAPTER.validate_python({"type": name})


def _row(
    shape: BackboneShape, config: ConnectorConfig, budget: int, num_frames: int, text_tokens: int | None
) -> CostRow[CostBreakdown]:
    num_text = default_text_tokens(num_frames) if text_tokens is None else text_tokens
    compressed = cost(shape, config, budget, num_frames, num_text)
    uncompressed = cost(shape, IdentityConnectorConfig(), shape.num_patches, num_frames, num_text)
    return CostRow(budget, num_frames, num_text, compressed, uncompressed)
