"""How answers are made: what a benchmark asks for, and part of the key of every answer."""

import json
from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How answers are made; part of every key."""

    max_new_tokens: int = 32
    """Longest answer, tokens; longer ones are cut off, and counted."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the model."""
    decoding: Literal["greedy", "beam", "likelihood"] = "greedy"
    """The likeliest token at every place; beam search; or the likeliest of the sample's choices."""
    num_beams: int = 1
    """Beams of a beam search."""
    reducer: str | None = None
    """JSON of the training-free reducer's configuration; None: the model's own connector gives the budget."""

    anchor_grid: int | None = None
    """Of a supernet over splits: side of the anchor grid; None: the model's routing."""

    def to_json(self) -> str:
        """Canonical text, without what is unset."""
        return json.dumps({key: value for key, value in asdict(self).items() if value is not None}, sort_keys=True)


GREEDY = GenerationSettings()
"""The defaults."""
