"""Per-sample metrics by the name that `Sample.metric` carries."""

from collections.abc import Callable

from parcelray.benchmarks.metrics.box_iou import box_accuracy
from parcelray.benchmarks.metrics.exact_match import exact_match
from parcelray.data.sample import Sample

METRICS: dict[str, Callable[[str, Sample], float]] = {"exact_match": exact_match, "box_iou": box_accuracy}
"""Name -> function of prediction and sample; NaN means that the sample cannot be scored."""
