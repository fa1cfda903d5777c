"""The world's own tokenizer: a small sentencepiece model trained when it is built, written as Hugging Face files.

`compact` has exactly one token a word; `rich` is a unigram model with byte fallback. Both know the same special
tokens and a chat template in which the model itself opens `<think>` and ends its turn with `<end>`.
"""

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from distill_jax.traces.world import compact
from distill_jax.traces.world.generate import KINDS, RENDERINGS, WorldSpec, traces

PAD, UNK, END, USER, ASSISTANT, SYSTEM, THINK, END_THINK = SPECIALS = (
    "<pad>", "<unk>", "<end>", "<user>", "<assistant>", "<system>", "<think>", "</think>")
"""Special tokens in the order of their ids, from 0."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ '<system>' + message['content'] }}"
    "{%- elif message['role'] == 'user' -%}{{ '<user>' + message['content'] }}"
    "{%- else -%}{{ '<assistant>' + message['content'] + '<end>' }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<assistant>' }}{%- endif -%}")

RICH_VOCAB = 3072
SPACE = "\u2581"


def build_tokenizer(directory: str | Path, rendering: str = "compact", vocab_size: int = RICH_VOCAB) -> Path:
    """Train the tokenizer of a rendering and write `tokenizer.model`, `tokenizer.json`, `tokenizer_config.json`.

    Deterministic: the same rendering and size give the same bytes. `vocab_size` counts special tokens and the 256
    bytes of `rich`; `compact` has as many tokens as it has words. Raises ValueError for an unknown rendering, or
    where the directory holds another tokenizer: nothing is overwritten.
    """
    if rendering not in RENDERINGS:
        raise ValueError(f"unknown rendering {rendering!r}; known: {list(RENDERINGS)}")
    out = Path(directory)
    model = _train(rendering, vocab_size)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 20, "pad_token": PAD, "unk_token": UNK, "eos_token": END,
        "chat_template": CHAT_TEMPLATE,
    }
    _write(out, {"tokenizer.model": model, "tokenizer.json": _to_fast(model, rendering).to_str(pretty=True).encode(),
                 "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode()})
    return out


def _write(out: Path, files: dict[str, bytes]) -> None:
    """Each file whole or not at all, none in the place of another one."""
    other = [n for n, data in files.items() if (out / n).exists() and (out / n).read_bytes() != data]
    if other:
        raise ValueError(f"{out} holds another tokenizer ({', '.join(other)}); choose another folder or remove it")
    out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        part = out / f".{name}.part"
        try:
            part.write_bytes(data)
            part.replace(out / name)
        finally:
            part.unlink(missing_ok=True)


def corpus(rendering: str) -> Iterator[str]:
    """Lines the tokenizer is trained on: training questions of every kind, or every word of `compact`."""
    if rendering == "compact":
        # Descending counts give the words fixed ids, in the order of the vocabulary.
        words = compact.vocabulary()
        for i, word in enumerate(words):
            yield " ".join([word] * (len(words) - i))
        return
    seen: set[str] = set()
    for kind in KINDS:
        for style in ("minimal", "extended"):
            for t in traces(WorldSpec(kind=kind, k=4, rendering=rendering, style=style, seed=-1), 250):
                for line in f"{t.question}\n{t.thinking}\n{t.answer}".split("\n"):
                    seen.update(line.split())
                    yield line
    names = RENDERINGS[rendering].LEXICON.names
    yield from (name for of_type in names.values() for name in of_type)
    # sentencepiece proposes a piece only if two different words contain it, however often one of them occurs.
    yield from (word + "," for word in sorted(seen))


def _train(rendering: str, vocab_size: int) -> bytes:
    buffer = io.BytesIO()
    common = {
        "sentence_iterator": corpus(rendering), "model_writer": buffer, "num_threads": 1, "minloglevel": 2,
        "pad_id": 0, "unk_id": 1, "eos_id": 2, "bos_id": -1, "pad_piece": PAD, "unk_piece": UNK, "eos_piece": END,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    if rendering == "compact":
        sentencepiece.SentencePieceTrainer.train(
            # Control symbols here: a word model gives user-defined ones a second, spaced form.
            model_type="word", use_all_vocab=True, max_sentence_length=1 << 16, control_symbols=list(SPECIALS[3:]),
            vocab_size=len(SPECIALS) + len(compact.vocabulary()), **common)
    else:
        sentencepiece.SentencePieceTrainer.train(
            model_type="unigram", vocab_size=vocab_size, byte_fallback=True, split_digits=True,
            character_coverage=1.0, user_defined_symbols=list(SPECIALS[3:]), **common)
    return buffer.getvalue()


def _to_fast(model: bytes, rendering: str) -> Tokenizer:
    """The sentencepiece model as a `tokenizers` one with the same ids."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [(sp.id_to_piece(i), sp.get_score(i)) for i in range(sp.get_piece_size())]
    metaspace = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    text = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    if rendering == "compact":
        fast = Tokenizer(models.WordLevel({p: i for i, (p, _) in enumerate(pieces)}, unk_token=UNK))
        fast.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
        fast.decoder = text
    else:
        assert all(math.isfinite(s) for _, s in pieces)
        fast = Tokenizer(models.Unigram(pieces, unk_id=1, byte_fallback=True))
        fast.pre_tokenizer = metaspace
        fast.decoder = decoders.Sequence([decoders.ByteFallback(), text])
    # Thinking marks are text a reader wants to see; the other specials are dropped when decoding skips specials.
    fast.add_tokens([AddedToken(t, special=t not in (THINK, END_THINK), normalized=False) for t in SPECIALS])
    return fast
