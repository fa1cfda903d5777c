"""What the lifted loss holds on one device. Bytes throughout."""

from distill_jax.objective.chunks import chunk_size
from distill_jax.objective.lift import CHUNK


def lift_bytes(*, tokens: int, vocab: int, width: int, chunk: int = CHUNK, itemsize: int = 2,
               trainable: bool = True, copies: int = 1) -> int:
    """Peak memory of one source in `lift_sum`: temporaries and the head's gradient, not parameters or hidden states.

    tokens     on this device
    itemsize   bytes of the compute dtype (2 for bf16)
    trainable  False for a frozen teacher: only its logits and its head
    copies     how often a chunk's logits and the head in the compute dtype exist at once: 2 where the compiler lays
               them out anew between products (TPU)
    Per token of a chunk and vocabulary entry: float32 logits, their gradient in the compute dtype (in place when that
    is float32), and one byte of membership in the kept ids. Per entry of the head: its copy in the compute dtype and
    the float32 gradient.
    """
    gradient = itemsize % 4 + 1 if trainable else 0
    logits = copies * chunk_size(tokens, chunk) * vocab * (4 + gradient)
    head = vocab * width * (copies * itemsize + (4 if trainable else 0))
    return logits + head + (tokens * width * itemsize if trainable else 0)
