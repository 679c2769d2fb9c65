"""GQA accuracy: exact match with the one answer of a question (Hudson and Manning, CVPR 2019).

Variants:
    official: equal strings (the official scorer; big_vision).
    llava: the prediction in lower case and without full stops at its end equals the answer (LLaVA's
        `convert_gqa_for_eval.py` before the official scorer).
    lmms_eval: case and ASCII punctuation are ignored, surrounding spaces are not.
    vlmevalkit: equal after stripping, in lower case.

Sub-scores: `binary` and `open` (structural type `query` is open), and one per structural and semantic type.

Metadata read: `types` (optional): a mapping in which `structural` and `semantic`, if present, are texts.
"""

from parcelray.benchmarks.metrics.base import UNSCORED, Judgement, PerSampleMetric, variants, wrong_metadata
from parcelray.benchmarks.metrics.exact_match import as_is, matcher, stripped, without_punctuation
from parcelray.datasets.sample import Sample

_KINDS = ("structural", "semantic")


def _groups(sample: Sample) -> tuple[str, ...]:
    types = sample.metadata.get("types")
    if types is None:
        return ()
    if not isinstance(types, dict) or not all(isinstance(types.get(kind), str | None) for kind in _KINDS):
        raise wrong_metadata(sample, "types", "a mapping with the texts `structural` and `semantic`, or null", "gqa")
    names = tuple(f"{kind}/{types[kind]}" for kind in _KINDS if types.get(kind))
    return ((("open" if types["structural"] == "query" else "binary"), *names)) if types.get("structural") else names


def _llava(prediction: str, sample: Sample) -> Judgement:
    return Judgement(float(prediction.rstrip(".").lower() in sample.answers)) if sample.answers else UNSCORED


GQA = variants(
    PerSampleMetric("gqa", variant, judge, _groups)
    for variant, judge in (
        ("official", matcher(as_is)),
        ("llava", _llava),
        ("lmms_eval", matcher(without_punctuation)),
        ("vlmevalkit", matcher(stripped)),
    )
)
