"""What the lifted loss holds on one device, and the chunk that fits a budget. Bytes throughout."""

from distill_jax.objective.chunks import chunk_size


def lift_bytes(*, tokens: int, vocab: int, width: int, chunk: int, itemsize: int = 2, teacher: bool = False,
               train_head: bool = True) -> int:
    """Estimated peak temporaries of `lift_sum` with gradients, parameters and hidden states not counted.

    tokens     on this device
    itemsize   bytes of the compute dtype (2 for bf16)
    teacher    a full teacher distribution is computed beside the student's
    train_head False under LoRA: no head gradient
    Per token of a chunk: float32 logits and their gradient, the gradient once more in the compute dtype, and one byte
    of membership in the kept ids. Per vocabulary entry: the gathered head and its float32 gradient.
    """
    per_logit = 4 + 4 + itemsize + 1 + (4 if teacher else 0)
    head = vocab * width * (itemsize + (4 if train_head else 0))
    return chunk_size(tokens, chunk) * vocab * per_logit + head + tokens * width * itemsize


def pick_chunk(*, budget: int, tokens: int, vocab: int, width: int, itemsize: int = 2, teacher: bool = False,
               train_head: bool = True) -> int:
    """Largest power of two in 64..8192 whose `lift_bytes` stay under `budget`; 64 if none does."""
    for power in range(13, 6, -1):
        need = lift_bytes(tokens=tokens, vocab=vocab, width=width, chunk=2**power, itemsize=itemsize,
                          teacher=teacher, train_head=train_head)
        if need <= budget:
            return 2**power
    return 64
