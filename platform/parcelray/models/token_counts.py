"""Counts the visual and text tokens of prompts.

Training, evaluation, the endpoint's `usage` and the planner all count with `count_tokens`. It imports no torch, because
the endpoint's ingress has no model.
"""

from typing import NamedTuple


class TokenCounts(NamedTuple):
    """Number of tokens of one prompt, or of several prompts together, without padding."""

    visual: int
    """Visual tokens of all images.

    For a reducer inside the decoder, whose layers hold different numbers: the mean over the layers.
    """
    prompt: int
    """Text tokens of the prompt, with the start token and the words of the prompt template."""
    answer: int = 0
    """Tokens of the answer with its end token; 0 without an answer."""

    @property
    def text(self) -> int:
        """Tokens of prompt and answer, without visual tokens."""
        return self.prompt + self.answer

    @property
    def total(self) -> int:
        """Length of the decoder's input."""
        return self.visual + self.text


def count_tokens(
    num_prompt_tokens: int, num_images: int, num_visual_tokens: int, num_answer_tokens: int = 0
) -> TokenCounts:
    """Counts the tokens of encoded prompts at a budget.

    Args:
        num_prompt_tokens: number of text tokens that `ElasticProcessor.encode_prompts` returned.
        num_images: number of images.
        num_visual_tokens: budget per image; 0: blind.
        num_answer_tokens: number of tokens that `ElasticProcessor.encode_answers` returned.
    """
    return TokenCounts(num_images * num_visual_tokens, num_prompt_tokens, num_answer_tokens)
