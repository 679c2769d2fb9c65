"""Number words as digits."""

_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)

NUMERALS = {"none": "0"} | {word: str(value) for value, word in enumerate(_WORDS)}
"""None and zero to twenty."""
