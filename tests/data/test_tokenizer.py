"""Ids and byte spans against reference encodings, and what two tokenizers have in common."""

import numpy as np
import pytest

from distill_jax.data.spans import byte_positions, from_starts, token_starts
from distill_jax.data.tokenizer import load_tokenizer, same_real_ids

BYTE_LEVEL = ("gpt2", "qwen2.5", "deepseek_r1")
PIECES = ("t5", "mistral_v1", "mistral_v3", "spm_test_1k", "hf_bytefallback")


def is_partition(spans: np.ndarray, total: int) -> bool:
    if len(spans) == 0:
        return True
    return bool(spans[0, 0] == 0 and spans[-1, 1] == total and (spans[1:, 0] == spans[:-1, 1]).all()
                and (spans[:, 0] <= spans[:, 1]).all())


@pytest.mark.parametrize("name", BYTE_LEVEL + PIECES)
def test_golden_multi(load, golden, name):
    """Ids equal the reference libraries'; byte spans reduce to their character offsets."""
    tok = load(name)
    for row in golden:
        ids, spans = tok.encode(row["text"])
        assert ids.tolist() == row["ids"][name], row["id"]
        raw = row["text"].encode()
        assert is_partition(spans, len(raw)), row["id"]
        where = byte_positions(row["text"])
        want = np.array(row["offsets"][name], int).reshape(-1, 2)
        if name in BYTE_LEVEL:  # characters a token touches: first byte's and last byte's
            assert b"".join(tok.token_bytes(i) for i in ids) == raw
            first = np.searchsorted(where, spans[:, 0], "right") - 1
            last = np.searchsorted(where, spans[:, 1], "left")
            assert np.array_equal(np.stack([first, last], 1), want), row["id"]
        else:  # sentencepiece: whole characters; blanks it drops belong to the token before
            starts = np.searchsorted(where, spans[:, 0], "right") - 1
            assert np.array_equal(starts[1:], want[1:, 0]), row["id"]
            ends = np.searchsorted(where, spans[:, 1], "right") - 1
            gap = [row["text"][a:b] for a, b in zip(want[:, 1], ends) if a < b and a in want[:, 0]]
            assert all(not g.strip() for g in gap), (row["id"], gap)


@pytest.mark.parametrize(("name", "file"), [("gpt2", "gpt-2"), ("qwen2.5", "qwen2"), ("qwen2.5", "deepseek-r1-qwen")])
def test_golden_llamacpp(load, tokenizers_dir, name, file):
    folder = tokenizers_dir / "golden_llamacpp"
    texts = (folder / f"{file}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    rows = [[int(i) for i in line.split()] for line in (folder / f"{file}.out").read_text().splitlines()]
    assert len(rows) >= 45
    for text, want in zip(texts, rows):
        assert load(name).encode(text)[0].tolist() == want, text


def test_spans_split_characters_into_their_bytes(load):
    for name in ("qwen2.5", "mistral_v3", "hf_bytefallback"):
        tok = load(name)
        text = "a \U0001f999 b"
        _, spans = tok.encode(text)
        raw = text.encode()
        assert is_partition(spans, len(raw))
        inside = [(s, e) for s, e in spans.tolist() if e - s and b"\xf0\x9f\xa6\x99".find(raw[s:e].lstrip()) >= 0]
        assert len(inside) >= 2 and all(e - s <= 4 for s, e in inside), name


def test_normalised_text_keeps_a_partition(load):
    """Qwen composes e + accent (NFC): the two characters of the text belong to one token's span."""
    tok = load("qwen2.5")
    text = "cafe\u0301 au lait \U0001f999"
    ids, spans = tok.encode(text)
    assert ids.tolist() == tok.encode("caf\u00e9 au lait \U0001f999")[0].tolist()
    assert is_partition(spans, len(text.encode()))
    word = [text.encode()[s:e] for s, e in spans.tolist()]
    assert b"".join(word) == text.encode() and any("\u0301".encode() in w for w in word)


def test_starts_by_hand():
    # "x" + 4-byte character in three tokens that overlap (Hugging Face), then a dropped blank before "b"
    offsets = np.array([[0, 1], [1, 5], [1, 5], [1, 5], [6, 7]])
    starts = token_starts(offsets, np.array([1, 2, 1, 1, 1]), np.zeros(5, bool))
    assert from_starts(starts, 8).tolist() == [[0, 1], [1, 3], [3, 4], [4, 6], [6, 8]]
    # lengths that do not add up: as reported
    starts = token_starts(offsets, np.array([1, 9, 9, 9, 1]), np.zeros(5, bool))
    assert from_starts(starts, 8).tolist() == [[0, 1], [1, 1], [1, 1], [1, 6], [6, 8]]
    # byte fallback (sentencepiece): empty up to the last byte
    offsets = np.array([[0, 0], [0, 0], [0, 0], [0, 4]])
    starts = token_starts(offsets, np.ones(4, int), np.ones(4, bool))
    assert from_starts(starts, 4).tolist() == [[0, 1], [1, 2], [2, 3], [3, 4]]
    assert from_starts(np.zeros(0, int), 4).shape == (0, 2)


def test_real_ids(load):
    assert (load("qwen2.5").real, load("qwen3").real, load("deepseek_r1").real) == (151_665, 151_669, 128_815)
    assert (load("gpt2").real, load("mistral_v3").real) == (50_257, 32_768)
    q = load("qwen2.5")
    assert q.eos_ids == (151_645, 151_643) and q.bos_id is None and q.pad_id == 151_643
    assert load("deepseek_r1").eos_ids == (1,) and load("deepseek_r1").bos_id == 0


def test_same_real_ids_says_what_differs(load):
    q, q3 = load("qwen2.5"), load("qwen3")
    assert same_real_ids(q, q) == [] and same_real_ids(q.info(), q) == []
    lines = same_real_ids(q, q3)
    assert q.base_hash == q3.base_hash
    assert lines[0].startswith("number of real ids: 151,665") and "id 151667: None against '<think>'" in lines
    assert "the learned vocabularies differ" in same_real_ids(q, load("gpt2"))


@pytest.mark.parametrize("name", ["qwen2.5", "deepseek_r1", "mistral_v3", "torchtitan_tiny"])
def test_save_and_load(load, name, tmp_path):
    tok = load(name)
    tok.save(tmp_path / "model")
    back = load_tokenizer(tmp_path)  # a run directory
    assert (back.hash, back.eos_ids, back.bos_id, back.chat.id) == (tok.hash, tok.eos_ids, tok.bos_id, tok.chat.id)


@pytest.mark.parametrize("name", ["qwen2.5", "mistral_v3", "gpt2", "deepseek_r1"])
def test_decode_inverts_encode(load, golden, name):
    tok = load(name)
    for row in golden:
        text = row["decoded"].get(name, row["text"])
        assert tok.decode(tok.encode(row["text"])[0]) == text
    assert tok.decode([*tok.encode("hi")[0], tok.real + 7]) == f"hi<{tok.real + 7}?>"


def test_world_tokenizers_split_completions_exactly(tmp_path):
    """Sentencepiece pieces as a tokenizer.json: the blank in front of each chunk is not text."""
    from distill_jax.data.render import prompt_ids, render, split_completion
    from distill_jax.traces.trace import simple_trace
    from distill_jax.traces.world.tokenizer import build_tokenizer
    tok = load_tokenizer(build_tokenizer(tmp_path, "rich"))
    for trace in (simple_trace("a b", "Klaus lives there.\nSo tea.", "tea"), simple_trace("a b", "", "tea")):
        row = render(trace, tok)
        back = split_completion(row.tokens[len(prompt_ids(trace, tok)):], tok)
        assert back == (trace.thinking, trace.answer, True)


def test_runs_of_several_stages_and_urls(tiny, tmp_path):
    """`run.json` names the stage whose model the run is; a URL is read like a folder."""
    tiny.save(tmp_path / "run" / "kd" / "model")
    (tmp_path / "run" / "run.json").write_text('{"final": "kd"}')
    for source in (tmp_path / "run", f"file://{tmp_path}/run", f"file://{tmp_path}/run/kd/model"):
        assert load_tokenizer(source).hash == tiny.hash, source
    with pytest.raises(ValueError, match=r"no tokenizer at file://.*/elsewhere"):
        load_tokenizer(f"file://{tmp_path}/elsewhere")


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="no such directory"):
        load_tokenizer("./nowhere/at/all")
    with pytest.raises(ValueError, match=r"no tokenizer in .*it holds \['a.txt'\]"):
        (tmp_path / "a.txt").write_text("x")
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="hub did not give it"):
        load_tokenizer("no-such-org/no-such-model")
