"""What the lifted loss holds on one device, and which of its two loops that decides. Bytes throughout."""

from typing import Literal

CHUNK = 512
"""Tokens per device whose logits exist at a time. The head's gradient is read and written once a chunk, so 1,024 is a
little faster on large vocabularies; for what it costs in memory see `lift_bytes`."""

GROUP = 8192
"""Tokens per device that the loop over the vocabulary takes at a time."""

BUDGET = 3 * 10**9
"""What one source may hold before "auto" takes the slower loop (PERFORMANCE.md: loss temporaries <= 3 GB)."""

Loop = Literal["auto", "tokens", "vocabulary"]
"""What the lifted loss loops over.

tokens      chunks of tokens, all ids at once: three products of the head's size, and a copy of the head in the compute
            dtype. For every row loss
vocabulary  chunks of ids, up to `GROUP` tokens at once: the head is never copied or gathered whole, at the price of a
            fourth product. For row losses that read the target's outcomes, the token and one tail
auto        "tokens", unless that would hold more than `BUDGET` and "vocabulary" can be had and holds less
"""


def lift_bytes(*, tokens: int, vocab: int, width: int, chunk: int = CHUNK, itemsize: int = 2,
               trainable: bool = True, copies: int = 1, loop: Loop = "tokens", parts: int = 1, shards: int = 1) -> int:
    """Peak memory of one source in `lift_sum`: temporaries and the head's gradient, not parameters or hidden states.

    tokens     on this device (those of the whole `tensor` axis where the vocabulary is cut over it)
    itemsize   bytes of the compute dtype (2 for bf16)
    trainable  False for a frozen teacher: only its logits and its head
    copies     how often a chunk's logits and the head in the compute dtype exist at once: 2 where the compiler lays
               them out anew between products (TPU)
    parts      devices that the vocabulary is cut over
    shards     devices that the head's width is cut over (`fsdp`)
    Per token of a chunk and vocabulary entry: float32 logits, their gradient in the compute dtype (in place when that
    is float32), and one byte of membership in the kept ids. Per entry of the head: its copy in the compute dtype and
    the float32 gradient; over the vocabulary both are of one block, but for the gradient of this device's share.
    """
    gradient = itemsize % 4 + 1 if trainable else 0
    chunk, vocab = chunk * parts, -(-vocab // parts)
    hidden = tokens * width * itemsize if trainable else 0
    per_entry = width * (copies * itemsize + (4 if trainable else 0))
    if loop == "vocabulary":
        group = chunk_size(tokens, max(chunk, GROUP))
        block = block_size(vocab, group, chunk)
        share = vocab * width * 4 // shards if trainable else 0
        return group * (block * (4 + gradient) + 4 * width) + block * per_entry + share + hidden
    return copies * chunk_size(tokens, chunk) * vocab * (4 + gradient) + vocab * per_entry + hidden


def chunk_size(count: int, chunk: int) -> int:
    """Tokens of a turn: at most `chunk` (rounded up to 8), turns of equal size so that the last is not mostly air."""
    turns = max(1, -(-count // max(8, chunk)))
    size = -(-count // turns)
    return max(1, min(size + -size % 8, count))


def block_size(vocab: int, tokens: int, chunk: int) -> int:
    """Ids of a block such that its logits of `tokens` are half as many as those of `chunk` over the vocabulary: with
    8,192 tokens still wide enough for the products."""
    return chunk_size(vocab, vocab * chunk // max(1, 2 * tokens))
