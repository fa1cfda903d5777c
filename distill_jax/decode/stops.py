"""Stop strings: which token completes one of them."""

from collections.abc import Callable, Sequence
from functools import cache


class StopStrings:
    """Looks for strings in the bytes that tokens stand for, so that the token that completes one is known exactly,
    also where a token ends inside the string or goes on behind it.

    strings      none of them empty
    token_bytes  bytes of a token, as `data.tokenizer.Tokenizer.token_bytes` gives them
    """

    def __init__(self, strings: Sequence[str], token_bytes: Callable[[int], bytes]) -> None:
        self._strings = [s.encode() for s in strings]
        self._bytes = cache(token_bytes)
        self._keep = max(len(s) for s in self._strings) - 1

    def find(self, tokens: Sequence[int], before: bytes = b"") -> tuple[int | None, bytes]:
        """-> index of the first token with which the text holds a string (None: it does not), and what of the text to
        give as `before` with the tokens that follow."""
        pieces = [self._bytes(int(t)) for t in tokens]
        text = before + b"".join(pieces)
        found = [at + len(s) for s in self._strings if (at := text.find(s)) >= 0]
        if not found:
            return None, text[max(0, len(text) - self._keep):]
        end = len(before)
        for i, piece in enumerate(pieces):
            end += len(piece)
            if end >= min(found):
                return i, b""
        raise AssertionError("unreachable: what is kept of the text is shorter than any string in it")
