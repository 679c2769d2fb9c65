"""A 5 x 7 pixel font of capital letters and digits, and a closed lexicon."""

from functools import cache

import numpy as np

from parcelray.datasets.mini.drawing import Mask

_GLYPHS = {
    "a": ".###. #...# #...# ##### #...# #...# #...#",
    "b": "####. #...# #...# ####. #...# #...# ####.",
    "c": ".#### #.... #.... #.... #.... #.... .####",
    "d": "####. #...# #...# #...# #...# #...# ####.",
    "e": "##### #.... #.... ####. #.... #.... #####",
    "f": "##### #.... #.... ####. #.... #.... #....",
    "g": ".#### #.... #.... #.### #...# #...# .####",
    "h": "#...# #...# #...# ##### #...# #...# #...#",
    "i": "##### ..#.. ..#.. ..#.. ..#.. ..#.. #####",
    "j": "..### ...#. ...#. ...#. ...#. #..#. .##..",
    "k": "#...# #..#. #.#.. ##... #.#.. #..#. #...#",
    "l": "#.... #.... #.... #.... #.... #.... #####",
    "m": "#...# ##.## #.#.# #.#.# #...# #...# #...#",
    "n": "#...# ##..# ##..# #.#.# #..## #..## #...#",
    "o": ".###. #...# #...# #...# #...# #...# .###.",
    "p": "####. #...# #...# ####. #.... #.... #....",
    "q": ".###. #...# #...# #...# #.#.# #..#. .##.#",
    "r": "####. #...# #...# ####. #.#.. #..#. #...#",
    "s": ".#### #.... #.... .###. ....# ....# ####.",
    "t": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
    "u": "#...# #...# #...# #...# #...# #...# .###.",
    "v": "#...# #...# #...# #...# .#.#. .#.#. ..#..",
    "w": "#...# #...# #...# #.#.# #.#.# ##.## #...#",
    "x": "#...# #...# .#.#. ..#.. .#.#. #...# #...#",
    "y": "#...# #...# .#.#. ..#.. ..#.. ..#.. ..#..",
    "z": "##### ....# ...#. ..#.. .#... #.... #####",
    "0": ".###. #..## #.#.# #.#.# #.#.# ##..# .###.",
    "1": "..#.. .##.. #.#.. ..#.. ..#.. ..#.. #####",
    "2": ".###. #...# ....# ...#. ..#.. .#... #####",
    "3": "####. ....# ....# .###. ....# ....# ####.",
    "4": "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
    "5": "##### #.... ####. ....# ....# #...# .###.",
    "6": "..##. .#... #.... ####. #...# #...# .###.",
    "7": "##### ....# ...#. ...#. ..#.. ..#.. ..#..",
    "8": ".###. #...# #...# .###. #...# #...# .###.",
    "9": ".###. #...# #...# .#### ....# ...#. .##..",
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
GLYPH_HEIGHT = 7
_GLYPH_WIDTH = 5
_PITCH = {1: 8, 2: 12}

_WORDS = """
cat dog sun box key jug map pen fox bus cup hat ice jam van web zoo axe lion fish tree bird milk moon ship rain snow
lamp desk door book king quiz yarn leaf gold rock wolf duck frog
"""
LEXICON = tuple(_WORDS.split())


def text_width(text: str, scale: int) -> int:
    """Width of a line of text in pixels. The character pitch is a multiple of the 4-pixel patch at both scales."""
    return _PITCH[scale] * (len(text) - 1) + _GLYPH_WIDTH * scale


@cache
def _glyph(character: str, scale: int) -> Mask:
    rows = _GLYPHS[character].split()
    bitmap = np.array([[dot == "#" for dot in row] for row in rows], dtype=np.float32)
    return bitmap.repeat(scale, axis=0).repeat(scale, axis=1)


def text_glyphs(text: str, scale: int) -> list[tuple[int, Mask]]:
    """Lists the left offset in pixels and the mask [7 * scale, 5 * scale] of each character other than spaces."""
    return [
        (_PITCH[scale] * index, _glyph(character, scale)) for index, character in enumerate(text) if character != " "
    ]
