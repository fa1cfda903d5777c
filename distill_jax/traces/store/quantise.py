"""Log-probabilities in one, two or four bytes, and the mass that was not kept.

Grids (`u8`, `u16`): x = -log p is stored as c with x ~ X (c/N)^2, the nearest grid point. The spacing grows like
sqrt(x), which makes the expected squared error of log p proportional to x, so the whole cost is proportional to the
entropy. With spacing D(x) = 2 sqrt(x X)/N + X/N^2 and |error| <= D/2,

    KL(p || decoded) <= 1/2 sum_i p_i (D(x_i)/2)^2 (1 + O(D))    worst case, a third of it on average
                      ~ X / (2 N^2) * H(p)                        H = entropy of the kept part, nats

u8 (X = 24, N = 255): 1.8e-4 H at worst, 6e-5 H on average. u16 (X = 96, N = 65,535): 1.1e-8 H. p below exp(-X) is
stored as exp(-X). This holds because the first-order term is removed: the tail mass is stored by itself and a decoded
row is scaled so that its kept mass is one minus that tail, the mass the teacher gave it (it is never renormalised
to 1).

`f16` rounds down to half precision, `f32` is exact; neither is scaled. In every precision but `f32` (which sums to what
it was given, rounding included) the decoded probabilities of a token sum to at most 1.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

TAIL_STEPS = 65535
TAIL_FLOOR_BITS = 20
"""Tails are stored as 2^(-20 (1 - c/65535)): relative error 1.1e-4, and no smaller than 2^-20 (9.5e-7), which also
leaves room for float32 rounding of the kept log-probs below a total of 1."""


class Precision(NamedTuple):
    """bytes a value, and for grids the number of steps N and the range X in nats (0: a float type)."""

    width: int
    steps: int = 0
    range: float = 0.0

    @property
    def code(self) -> np.dtype:
        """Unsigned integer type of the stored codes."""
        return np.dtype(f"<u{self.width}")


PRECISIONS = {"u8": Precision(1, 255, 24.0), "u16": Precision(2, 65535, 96.0), "f16": Precision(2),
              "f32": Precision(4)}


@cache
def grid(precision: str) -> np.ndarray:
    """float64 [N + 1]: the log-probs of a grid, descending from 0."""
    p = PRECISIONS[precision]
    return -p.range * (np.arange(p.steps + 1) / p.steps) ** 2


@cache
def _tables(precision: str) -> tuple[np.ndarray, np.ndarray]:
    """float32 log-probs and probabilities of the codes of a grid."""
    g = grid(precision)
    return g.astype(np.float32), np.exp(g).astype(np.float32)


def encode(logprobs: np.ndarray, precision: str) -> np.ndarray:
    """float log-probs <= 0 to unsigned codes of the same shape."""
    p = PRECISIONS[precision]
    if precision == "f32":
        return np.ascontiguousarray(logprobs, "<f4").view("<u4")
    if precision == "f16":
        half = np.clip(logprobs, -65504.0, 0.0).astype("<f2")
        half = np.where(half > logprobs, np.nextafter(half, np.float16(-np.inf)), half)
        return np.ascontiguousarray(half).view("<u2")
    x = np.clip(-np.asarray(logprobs, np.float32), np.float32(0), np.float32(p.range))
    below = np.minimum((np.sqrt(x * np.float32(p.steps**2 / p.range))).astype(np.int32), p.steps - 1)
    return (below + (x > _middles(precision)[below])).astype(p.code)


@cache
def _middles(precision: str) -> np.ndarray:
    """float32 [N]: the middle between each grid point and the next."""
    points = -grid(precision)
    return (0.5 * (points[1:] + points[:-1])).astype(np.float32)


def decode(codes: np.ndarray, precision: str, out: np.ndarray | None = None) -> np.ndarray:
    """Codes to new float32 log-probs, in `out` (contiguous) where it is given."""
    if precision in ("f32", "f16"):
        values = codes.view("<f4" if precision == "f32" else "<f2")
        if out is None:
            return values.astype(np.float32)
        out[...] = values
        return out
    return _looked_up(precision, 0, codes, out)


def probabilities(codes: np.ndarray, precision: str) -> np.ndarray:
    """Codes of a grid to float32 probabilities."""
    return _looked_up(precision, 1, codes)


@cache
def _pair_table(precision: str, which: int) -> np.ndarray:
    """uint64 [65536]: two neighbouring entries of a one-byte grid's table, by the two codes seen as one uint16."""
    both = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    return _tables(precision)[which][both].view(np.uint64)


def _looked_up(precision: str, which: int, codes: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """`_tables(precision)[which][codes]`; codes of one byte two at a time, which takes half as long."""
    if codes.itemsize > 1 or codes.size % 2 or not codes.flags.c_contiguous:
        return np.take(_tables(precision)[which], codes, out=out, mode="clip")  # a table has an entry for every code
    into = np.empty(codes.shape, np.float32) if out is None else out
    np.take(_pair_table(precision, which), codes.reshape(-1).view(np.uint16), mode="clip",
            out=into.reshape(-1).view(np.uint64))
    return into


_EVEN, _EACH = np.uint64(0x00FF00FF00FF00FF), np.uint64(0x0001000100010001)


def running_sum(delta: np.ndarray) -> np.ndarray:
    """`np.cumsum(delta, dtype=delta.dtype)` of unsigned [n]; of bytes eight at a time, which takes a third as long.

    The even and the odd bytes of a word are four sums of 16 bits each, which no carry leaves: a product with 1 in each
    lane adds to a lane all lanes below it.
    """
    if delta.dtype != np.uint8 or len(delta) < 64:
        return np.cumsum(delta, dtype=delta.dtype)
    words = np.zeros(-(-len(delta) // 8), "<u8")
    words.view(np.uint8)[:len(delta)] = delta
    odd = words >> np.uint64(8)
    odd &= _EVEN
    odd *= _EACH
    words &= _EVEN
    words *= _EACH
    whole = words + odd
    whole >>= np.uint64(48)  # sum of a word's bytes, modulo 256 below
    words[1:] += np.cumsum(whole, dtype=np.uint8)[:-1] * _EACH
    upto_odd = words + odd
    upto_odd &= _EVEN
    upto_odd <<= np.uint64(8)
    odd <<= np.uint64(16)
    words += odd
    words &= _EVEN
    words |= upto_odd
    return words.astype("<u8", copy=False).view(np.uint8)[:len(delta)]


def encode_tail(tail: np.ndarray) -> np.ndarray:
    """Tail mass in [0,1] to uint16."""
    bits = -np.log2(np.clip(np.asarray(tail, np.float64), 2.0**-TAIL_FLOOR_BITS, 1.0))
    return np.rint((1.0 - bits / TAIL_FLOOR_BITS) * TAIL_STEPS).astype("<u2")


@cache
def _tail_table() -> np.ndarray:
    return np.exp2(-TAIL_FLOOR_BITS * (1.0 - np.arange(TAIL_STEPS + 1) / TAIL_STEPS)).astype(np.float32)


def decode_tail(codes: np.ndarray) -> np.ndarray:
    """uint16 to float32 tail mass."""
    return _tail_table()[codes]
