"""Generation settings: how the answers to a benchmark are generated; part of every prediction key."""

import json
from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """Settings of the generation of answers; part of every prediction key."""

    max_new_tokens: int = 32
    """Largest number of generated tokens; longer answers are cut off and counted."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the model."""
    decoding: Literal["greedy", "beam", "likelihood"] = "greedy"
    """`greedy`: the likeliest token at every position; `beam`: beam search; `likelihood`: the likeliest choice."""
    num_beams: int = 1
    """Number of beams of a beam search."""
    reducer: str | None = None
    """Configuration of the training-free reducer as JSON; None: the model's connector provides the budget."""
    anchor_grid: int | None = None
    """Side of the anchor grid, for a supernet over splits; None: the model's routing decides."""

    def to_json(self) -> str:
        """Returns the settings as canonical JSON, without the fields that are None."""
        return json.dumps({key: value for key, value in asdict(self).items() if value is not None}, sort_keys=True)


GREEDY = GenerationSettings()
"""The default settings."""
