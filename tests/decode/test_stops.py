"""Stop strings against a search in the text, token by token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_jax.decode import Sampling
from distill_jax.decode.stops import StopStrings

PIECES = [b"a", b"b", b"ab", b"ba", b"a b", b" ", b"", "é".encode()[:1], "é".encode()[1:]]


@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=30), st.integers(1, 7),
       st.lists(st.text("ab é", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_first_token_that_completes_one(tokens, step, strings):
    """However the tokens are handed over, also where a character is two tokens or a string ends inside one."""
    stops, before, found = StopStrings(strings, PIECES.__getitem__), b"", None
    for start in range(0, len(tokens), step):
        index, before = stops.find(tokens[start:start + step], before)
        if index is not None:
            found = start + index
            break
    whole = lambda n: b"".join(PIECES[t] for t in tokens[:n])
    want = next((n for n in range(len(tokens)) if any(s.encode() in whole(n + 1) for s in strings)), None)
    assert found == want


def test_bad_strings():
    for bad in ("</a>", ("a", "")):
        with pytest.raises(ValueError, match="stop_strings"):
            Sampling(stop_strings=bad)
