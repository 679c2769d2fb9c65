"""Region labels of dense samples: the word that the model should predict for each part of an image, for training only.

A region is a box in pixels of the canvas with one word. The word of patches outside of all regions is `BACKGROUND`.
"""

from typing import Any

BACKGROUND = "."
_COLORS = ("dense_colors", "dense_bars", "dense_pair_lists", "dense_frames")
_SHAPES = ("dense_cell", "dense_detect", "dense_track")


def regions_of(prompt: str, task: str, objects: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]] | None:
    """Labels the regions of every image of a dense sample.

    Args:
        prompt: prompt of the sample; an end `colors` or `shapes` selects the aspect that the words describe.
        task: task of the sample, which selects the aspect otherwise; texts are labelled character by character.
        objects: for each image, name and box [top, left, bottom, right] of every object.

    Returns:
        For each image, a list of `{"box": [top, left, bottom, right], "word": word}`; None if the task has no regions.
    """
    if task in ("dense_spell", "dense_read"):
        return [[region for entry in image for region in _characters(entry["name"], entry["box"])] for image in objects]
    if task not in _COLORS and task not in _SHAPES and not prompt.endswith(("colors", "shapes")):
        return None
    word = 0 if task in _COLORS or prompt.endswith("colors") else 1
    return [[{"box": entry["box"], "word": entry["name"].split()[word]} for entry in image] for image in objects]


def _characters(text: str, box: list[int]) -> list[dict[str, Any]]:
    top, left, bottom, right = box
    width = (right - left) / len(text)
    return [
        {"box": [top, left + index * width, bottom, left + (index + 1) * width], "word": character}
        for index, character in enumerate(text)
        if character != " "
    ]
