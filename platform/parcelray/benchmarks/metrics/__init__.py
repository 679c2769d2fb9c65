"""All metrics by name: `metric("vqa_accuracy")` is the default variant, `metric("vqa_accuracy:simple")` a named one."""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path

from parcelray.benchmarks.metrics.anls import ANLS
from parcelray.benchmarks.metrics.base import Metric
from parcelray.benchmarks.metrics.box_iou import BOX_IOU
from parcelray.benchmarks.metrics.cider import CIDER
from parcelray.benchmarks.metrics.counting import COUNTING
from parcelray.benchmarks.metrics.exact_match import EXACT_MATCH
from parcelray.benchmarks.metrics.gqa import GQA
from parcelray.benchmarks.metrics.mmbench import MMBENCH
from parcelray.benchmarks.metrics.mme import MME
from parcelray.benchmarks.metrics.mmmu import MMMU
from parcelray.benchmarks.metrics.multiple_choice import MULTIPLE_CHOICE
from parcelray.benchmarks.metrics.nlvr2 import NLVR2
from parcelray.benchmarks.metrics.pope import POPE
from parcelray.benchmarks.metrics.refseg_miou import REFSEG_MIOU, RefSegMiou
from parcelray.benchmarks.metrics.relaxed_accuracy import RELAXED_ACCURACY
from parcelray.benchmarks.metrics.rsvqa import RSVQA
from parcelray.benchmarks.metrics.vizwiz import VIZWIZ
from parcelray.benchmarks.metrics.vqa_accuracy import VQA_ACCURACY
from parcelray.errors import UserError

METRICS: Mapping[str, Mapping[str, Metric]] = {
    "anls": ANLS,
    "box_iou": BOX_IOU,
    "cider": CIDER,
    "counting": COUNTING,
    "exact_match": EXACT_MATCH,
    "gqa": GQA,
    "mmbench": MMBENCH,
    "mme": MME,
    "mmmu": MMMU,
    "multiple_choice": MULTIPLE_CHOICE,
    "nlvr2": NLVR2,
    "pope": POPE,
    "refseg_miou": REFSEG_MIOU,
    "relaxed_accuracy": RELAXED_ACCURACY,
    "rsvqa": RSVQA,
    "vizwiz": VIZWIZ,
    "vqa_accuracy": VQA_ACCURACY,
}
"""Variants of every metric by name; the first variant is the default."""

RENAMED: Mapping[str, str] = {"anls:strict": "anls:paper", "anls:lmms_eval": "anls:docvqa_server"}
"""Current names of variants by earlier names, which the samples of stored evaluations have."""


def metric(name: str, *, mask_decoder: Path | None = None) -> Metric:
    """Returns the metric of a name, with or without a variant.

    Args:
        name: `vqa_accuracy` (its default variant) or `vqa_accuracy:simple`.
        mask_decoder: .npz file with which `refseg_miou` decodes segmentation tokens; other metrics ignore it.

    Raises:
        UserError: the metric or the variant does not exist.
    """
    family, _, variant = RENAMED.get(name, name).partition(":")
    if family not in METRICS:
        raise UserError(f"There is no metric {family!r}{_similar(family, METRICS)}; legal: {', '.join(METRICS)}.")
    members = METRICS[family]
    if variant and variant not in members:
        raise UserError(
            f"{family} has no variant {variant!r}{_similar(variant, members)}; legal: {', '.join(members)}."
        )
    selected = members[variant] if variant else next(iter(members.values()))
    return dataclasses.replace(selected, mask_decoder=mask_decoder) if isinstance(selected, RefSegMiou) else selected


def _similar(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
