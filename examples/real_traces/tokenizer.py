"""Train a sentencepiece vocabulary on the text of a store.

`python -m examples.real_traces.tokenizer STORE OUT.model 8000`
"""

import sys
from pathlib import Path

import sentencepiece

from distill_jax.traces.store import TraceStore


def main(store: str, out: str, size: int) -> None:
    """Write OUT (a `.model` file) with `<think>` and `</think>` as single tokens."""
    texts = (s.text for t in TraceStore.open(store).traces() for s in t.segments)
    lines = (line for text in texts for line in text.splitlines() if line.strip())
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=out.removesuffix(".model"), vocab_size=size, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=["<think>", "</think>", "\n"], num_threads=1, input_sentence_size=200_000,
        minloglevel=2)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
