"""From token ids to text, piece by piece: whole characters only, stop texts held back, white space at the ends left out."""

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one answer while it grows.

    Args:
        tokenizer: of the model.
        stop: texts that end the answer and are no part of it.
        live: whether the text is wanted before the end. If not, and nothing can stop it, it is decoded once, by
            `finish`.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), *, live: bool = True) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._live = live or bool(stop)
        self._ids: list[int] = []
        # Tokens up to `_read` are in `_text`. Those from `_context` on are decoded again with the next one, because a
        # tokenizer may write a token otherwise at the start of a text.
        self._context = 0
        self._read = 0
        self._text = ""
        self._sent = 0
        self.stopped = False
        """Whether a stop text has come."""

    @property
    def text(self) -> str:
        """All that was sent."""
        return self._text[: self._sent].strip()

    def push(self, token_id: int) -> str:
        """One more token; returns the text that is certain now and was not sent before."""
        self._ids.append(token_id)
        if not self._live:
            return ""
        self._decode(final=False)
        return self._release(final=False)

    def finish(self) -> str:
        """The rest, at the end of the answer."""
        if not self.stopped:
            self._decode(final=True)
        return self._release(final=True)

    def _decode(self, *, final: bool) -> None:
        before = self._decoded(self._ids[self._context : self._read])
        after = self._decoded(self._ids[self._context :])
        if len(after) <= len(before) or (after.endswith(_INCOMPLETE) and not final):
            return
        self._text += after[len(before) :]
        self._context, self._read = self._read, len(self._ids)
        places = [place for place in (self._text.find(stop, self._sent) for stop in self._stop) if place >= 0]
        if places:
            self._text = self._text[: min(places)]
            self.stopped = True

    def _release(self, *, final: bool) -> str:
        end = len(self._text) if final or self.stopped else self._certain()
        piece = self._text[self._sent : end]
        if self._sent == 0 or not self._text[: self._sent].strip():
            piece = piece.lstrip()
        self._sent = end
        return piece.rstrip() if final or self.stopped else piece

    def _certain(self) -> int:
        """Characters that are neither the start of a stop text, nor white space that may yet prove to be that of the end."""
        held = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._text) - self._sent), held, -1):
                if self._text.endswith(stop[:length]):
                    held = length
                    break
        return max(self._sent, len(self._text[: len(self._text) - held].rstrip()))

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""
