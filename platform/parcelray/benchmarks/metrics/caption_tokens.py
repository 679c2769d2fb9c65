"""Captions as tokens by Penn Treebank rules, without a Java runtime.

Follows what coco-caption does to captions: the Stanford tokenizer in lower case, then without its list of punctuation
tokens. Clitics are split off (`do n't`, `man 's`), numbers, abbreviations, file names and words with hyphens or slashes
stay whole, brackets become `-lrb-` and the like (which the list of punctuation, in capitals, does not catch). Runs of
`?` and `!` stay, for the same reason.
"""

import re

_REMOVED = frozenset({'"', "''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"})
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_TYPOGRAPHY = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": " -- ", "\u2014": " -- ", "\u2026": "..."}
)
_ABBREVIATIONS = (
    "mr|mrs|ms|dr|prof|st|ave|blvd|jr|sr|vs|etc|inc|ltd|co|corp|dept|est|gen|gov|sen|rep|rev|lt|col|sgt|capt|mt|ft|"
    "jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec"
)
_TOKEN = re.compile(
    rf"""
    <[^<>\s]+>                                     # a tag
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)+                 # an address
    | (?:https?://|www\.)[^\s,;]+
    | (?:[^\W\d_]\.){{2,}}                         # u.s.
    | ph\.d\.?
    | (?:{_ABBREVIATIONS})\.(?=\s|,|$)
    | no\.(?=\s*\d)
    | [@\#][^\W\d]\w*                              # names and tags
    | \d+(?:[.,:/]\d+)*(?:[\w/-]*\w)?              # 3.5-inch, 1,000, 10:30, 1/2
    | '(?:tis|twas)\b | n't\b | y'(?=all\b)
    | o'clock\b | ma'am\b | [odl]'(?=[^\W\d_])\w+
    | [^\W\d_]\w*(?:[-/._&]\w+)*                   # a word, and its parts
    | '(?:s|re|ve|ll|d|m)\b
    | '\d0s | \.{{2,}} | -{{2,}} | [?!]+ | \S
    """,
    re.VERBOSE,
)
_NEGATION = re.compile(r"(?<=[^\W\d_])n't\b")
_PAIRS = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "wanna": ("wan", "na"),
    "gimme": ("gim", "me"),
    "lemme": ("lem", "me"),
    "'tis": ("'t", "is"),
    "'twas": ("'t", "was"),
}


def caption_tokens(text: str) -> list[str]:
    """A caption's tokens in lower case, punctuation removed."""
    clean = _NEGATION.sub(" n't", text.lower().translate(_TYPOGRAPHY))
    tokens = (part for token in _TOKEN.findall(clean) for part in _PAIRS.get(token, (_BRACKETS.get(token, token),)))
    return [token for token in tokens if not _is_removed(token)]


def _is_removed(token: str) -> bool:
    return token in _REMOVED or not token.strip(".") or not token.strip("-")
