"""Text normalisation of the official VQA scorer (visualqa.org/evaluation.html), with its quirks.

Number words and articles, contractions without their apostrophe, punctuation, and the extra step that EvalAI and the
m4c scorers do before all of it.
"""

import re

from parcelray.benchmarks.metrics.numerals import NUMERALS

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The official pattern's look-behind is malformed, so a digit before the full stop does not protect it.
_FULL_STOP = re.compile(r"\.(?!\d)")
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {word: digits for word, digits in NUMERALS.items() if int(digits) <= 10}
# The scorer's table holds each of these with one apostrophe dropped. Its entries with capitals (Im, Ive, Id've) can
# never match a lower-cased word and are not here.
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've"
    " he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't"
    " not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll"
    " somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd"
    " there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll"
    " what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's"
    " won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


# "somebody'd" loses its apostrophe in the official table; that is what the scorer does.
_RESTORED = {typed: word for word in _CONTRACTIONS.split() for typed in _without_one_apostrophe(word)} | {
    "somebody'd": "somebodyd"
}


def strip_spaces(text: str) -> str:
    """Newlines and tabs as spaces, none at the ends: the step that the scorer always takes."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize(text: str) -> str:
    """Punctuation, articles, number words and contractions as the official scorer treats them, in lower case."""
    words = [_NUMBERS.get(word, word) for word in _without_punctuation(text).lower().split()]
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def m4c_pre_step(text: str) -> str:
    """What EvalAI's and m4c's scorers do first: lower case, no commas and question marks, possessives apart."""
    return text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()


def _without_punctuation(text: str) -> str:
    number_with_comma = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        # A comma inside a number deletes every mark in the text: so the official code has it.
        deleted = number_with_comma or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if deleted else " ")
    return _FULL_STOP.sub("", cleaned)
