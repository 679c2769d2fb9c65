"""Exact match with any acceptable answer."""

from parcelray.data.sample import Sample


def normalize(text: str) -> str:
    """Lower case, single spaces, no full stop at the end: what a reader would call the same answer."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def exact_match(prediction: str, sample: Sample) -> float:
    """1 if the prediction is one of the acceptable answers after normalisation, else 0; NaN without answers."""
    if not sample.answers:
        return float("nan")
    return float(normalize(prediction) in {normalize(answer) for answer in sample.answers})
