"""ANLS: average normalised Levenshtein similarity (Biten et al., ICCV 2019, equation 1).

s = 1 - NL if NL < 0.5 else 0, with NL = edit distance / longer length. The score of a sample is the best over its
answers.

Variants:
    paper: NL < 0.5, on lower-cased text (equation 1; big_vision on DocVQA and ST-VQA). An empty answer matches only an
        empty prediction.
    permuted: like paper, but the parts of an answer with ", " may be in any order (big_vision on InfographicVQA). Exact
        for up to 10 parts. For 11 to 20 parts, a beam search over the order (64 sets of parts of each size are kept).
        For more, the assignment approximation: the parts of the answer are assigned to those of the prediction with
        the least sum of edit distances, and only that order is compared. The prediction is split at ", " and also at
        commas, semicolons and line ends, and the better order counts. Both approximations give a lower bound of the
        score, and a prediction that is the answer in another order still scores 1.
    docvqa_server: the script of the Robust Reading Competition's server, which lmms-eval, VLMEvalKit and LLaVA use. A
        similarity of exactly 0.5 counts. The distance is computed on lower-cased text with squeezed spaces, and divided
        by the length of the longer raw text in upper case.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from parcelray.benchmarks.metrics.base import UNSCORED, Judgement, PerSampleMetric, variants
from parcelray.datasets.sample import Sample

_THRESHOLD = 0.5
_SEPARATOR = ", "
_LIST = re.compile(r"\s*[,;\n]\s*")
EXACT_PARTS = 10
"""Largest number of parts for which `permuted` is exact."""
BEAM_PARTS = 20
"""Largest number of parts for the beam search, whose cost grows with the cube of the number."""
_BEAM = 64

Row = NDArray[np.int32]
"""Edit distances of a text to every prefix of the prediction, of shape (1 + length of the prediction)."""


def edit_distance(first: str, second: str) -> int:
    """Returns the Levenshtein distance: insertions, deletions and substitutions cost 1 each."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, 1):
        previous, row[0] = row[0], i
        for j, right in enumerate(second, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    return row[-1]


def paper(prediction: str, answer: str) -> float:
    """Returns the similarity by the paper's rule on lower-cased text."""
    given, target = prediction.lower(), answer.lower()
    if not target:
        return float(not given)
    return _below_threshold(edit_distance(given, target) / max(len(given), len(target)))


def docvqa_server(prediction: str, answer: str) -> float:
    """Returns the similarity by the server's rule: squeezed text, raw upper-cased lengths, threshold included."""
    longest = max(len(prediction.upper()), len(answer.upper()))
    if not longest:
        return 1.0
    similarity = 1.0 - edit_distance(_squeezed(prediction), _squeezed(answer)) / longest
    return similarity if similarity >= _THRESHOLD else 0.0


def permuted(prediction: str, answer: str) -> float:
    """Returns the best similarity over all orders of the comma-separated parts of an answer."""
    given, target = prediction.lower(), answer.lower()
    longest = max(len(given), len(target))
    if not target or abs(len(given) - len(target)) >= _THRESHOLD * longest:
        return paper(prediction, answer)
    return _below_threshold(permuted_distance(target.split(_SEPARATOR), given) / longest)


def permuted_distance(parts: Sequence[str], text: str) -> int:
    """Returns the least edit distance between a text and the parts, joined by ", " in any order.

    Dynamic programming over subsets: the best distances of a set of parts to all prefixes of the text do not depend on
    the parts that follow. All sets of one size are extended together. Of more than 10 parts, only the most promising
    sets of each size are kept; of more than 20, only two orders are compared (see `_assigned`). The result is then an
    upper bound of the distance.
    """
    if len(parts) > BEAM_PARTS:
        # The second split is for predictions that separate their parts in another way.
        orders = {_assigned(parts, given) for given in (text.split(_SEPARATOR), _LIST.split(text))}
        return min(_distances(text, list(orders)))
    # A separator precedes every part here; the one in front of the first part is compared with itself.
    letters = np.array([ord(letter) for letter in _SEPARATOR + text], dtype=np.int64)
    rows: dict[int, Row] = {0: np.arange(len(letters) + 1, dtype=np.int32)}
    for _ in parts:
        longer: dict[int, Row] = {}
        for number, part in enumerate(parts):
            sets = [chosen for chosen in rows if not chosen >> number & 1]
            if sets:
                extended = _extended(np.stack([rows[chosen] for chosen in sets]), _SEPARATOR + part, letters)
                for chosen, row in zip(sets, extended, strict=True):
                    key = chosen | 1 << number
                    longer[key] = np.minimum(longer[key], row) if key in longer else row
        rows = longer if len(parts) <= EXACT_PARTS else _most_promising(longer, parts)
    return int(rows[(1 << len(parts)) - 1][-1])


def _assigned(parts: Sequence[str], given: Sequence[str]) -> str:
    """Joins the parts in the order of the given texts to which they are assigned with the least sum of distances.

    Parts without a text follow at the end.
    """
    chosen, places = linear_sum_assignment([_distances(part, given) for part in parts])
    place = dict(zip(chosen.tolist(), places.tolist(), strict=True))
    return _SEPARATOR.join(
        parts[number] for number in sorted(range(len(parts)), key=lambda number: place.get(number, len(given)))
    )


def _distances(text: str, others: Sequence[str]) -> list[int]:
    """Returns the same as `edit_distance` with each of the other texts, at once."""
    letters_SL = np.full((len(others), max(map(len, others))), -1, dtype=np.int64)
    for row, other in zip(letters_SL, others, strict=True):
        row[: len(other)] = [ord(letter) for letter in other]
    first = np.arange(letters_SL.shape[1] + 1, dtype=np.int32)
    rows = _extended(np.tile(first, (len(others), 1)), text, letters_SL)
    return [int(row[len(other)]) for row, other in zip(rows, others, strict=True)]


def _extended(rows_SL: NDArray[np.int32], addition: str, letters: NDArray[np.int64]) -> NDArray[np.int32]:
    """Returns the distances after a text was appended to each of S texts; L: prefixes of the prediction.

    The letters of the prediction have shape (L - 1,), or (S, L - 1) if each text has its own.
    """
    positions = np.arange(rows_SL.shape[1], dtype=np.int32)
    for letter in addition:
        new_SL = rows_SL + 1
        np.minimum(new_SL[:, 1:], rows_SL[:, :-1] + (letters != ord(letter)), out=new_SL[:, 1:])
        # Insertions: min over k <= j of new[k] + j - k.
        rows_SL = np.minimum.accumulate(new_SL - positions, axis=1) + positions
    return rows_SL


def _most_promising(rows: dict[int, Row], parts: Sequence[str]) -> dict[int, Row]:
    """Keeps the sets with the smallest lower bounds of the final distance: the texts that remain differ in length."""
    lengths = np.array([len(_SEPARATOR + part) for part in parts])
    missing_S = [sum(length for number, length in enumerate(lengths) if not chosen >> number & 1) for chosen in rows]
    rows_SL = np.stack(list(rows.values()))
    remaining_L = np.arange(rows_SL.shape[1])[::-1]
    bounds_S = (rows_SL + np.abs(np.array(missing_S)[:, None] - remaining_L)).min(axis=1)
    kept = set(np.argsort(bounds_S, kind="stable")[:_BEAM].tolist())
    return {chosen: row for index, (chosen, row) in enumerate(rows.items()) if index in kept}


def _below_threshold(distance: float) -> float:
    return 1.0 - distance if distance < _THRESHOLD else 0.0


def _squeezed(text: str) -> str:
    return " ".join(text.strip().lower().split())


def _best(similarity: Callable[[str, str], float]) -> Callable[[str, Sample], Judgement]:
    def judge(prediction: str, sample: Sample) -> Judgement:
        if not sample.answers:
            return UNSCORED
        return Judgement(max(similarity(prediction, answer) for answer in sample.answers))

    return judge


ANLS = variants(
    PerSampleMetric("anls", variant, _best(similarity))
    for variant, similarity in (("paper", paper), ("permuted", permuted), ("docvqa_server", docvqa_server))
)
