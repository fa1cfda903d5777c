"""Seeded choices, with the entropy of what was chosen."""

import hashlib
import math
import random
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def digest(*key: Any) -> int:
    """A 64-bit number from any printable key, the same on every machine and Python."""
    text = "\x1f".join(str(part) for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class Draw:
    """A stream of choices that is a pure function of its key.

    bits  log2 of the number of ways the choices so far could have gone: the exact entropy of a text whose every
          free choice went through this object
    """

    def __init__(self, *key: Any) -> None:
        self._random = random.Random(digest(*key))
        self.bits = 0.0

    def below(self, n: int) -> int:
        """Uniform integer in [0, n)."""
        self.bits += math.log2(n)
        return self._random.randrange(n)

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def distinct(self, n: int, count: int) -> list[int]:
        """`count` different integers below `n`, in random order."""
        self.bits += math.lgamma(n + 1) / math.log(2) - math.lgamma(n - count + 1) / math.log(2)
        return self._random.sample(range(n), count)

    def shuffled(self, items: Sequence[T]) -> list[T]:
        return [items[i] for i in self.distinct(len(items), len(items))]

    def chance(self, probability: float) -> bool:
        p = probability
        if 0.0 < p < 1.0:
            self.bits -= p * math.log2(p) + (1 - p) * math.log2(1 - p)
        return self._random.random() < p


def words(text: str) -> tuple[str, ...]:
    """A list of words, written as one string."""
    return tuple(text.split())
