"""A teacher's signal on another rendering of the same trace."""

import dataclasses

import numpy as np
import pytest

from distill_jax.core.batch import FOREIGN
from distill_jax.core.roles import ANSWER, SUPERVISED, THINK
from distill_jax.data import align
from distill_jax.data.render import Style, render
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.traces.store import HiddenRow, SampledRow, TokenRow, TopKRow
from distill_jax.traces.trace import simple_trace

TRACE = simple_trace("What is 12 + 30?", "12 plus 30 is 42.\nI check the result.", "The answer is 42.",
                     system="Be brief.")
WRITTEN = [int(r) for r in SUPERVISED]


def token_texts(tok, row, index):
    return [tok.token_bytes(int(row.tokens[i])) for i in index]


def test_same_tokenizer_other_template(tiny, tmp_path):
    """Every supervised token of the student finds its own event; every match is the same token."""
    tiny.save(tmp_path / "m")
    (tmp_path / "t.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}:")
    other = load_tokenizer(tmp_path / "m", chat_template=tmp_path / "t.jinja")
    source, target = render(TRACE, other), render(TRACE, tiny)
    assert source.text != target.text
    a = align.align(source, target)
    assert a.covered == a.supervised == int((np.isin(target.roles, WRITTEN) & (target.parts >= 0)).sum())
    hit = np.flatnonzero(a.index >= 0)
    assert token_texts(other, source, a.index[hit]) == token_texts(tiny, target, hit)
    missing = {tiny.decode([t]) for t in target.tokens[np.isin(target.roles, WRITTEN) & (a.index < 0)]}
    assert missing <= {"<|im_end|>"}  # the other template ends turns otherwise


def test_other_added_tokens(tiny, tiny_teacher):
    """R1-Distill-like: equal learned vocabulary, think tags as text, another end token."""
    mapping = align.token_map(tiny_teacher.info(), tiny.info())
    assert mapping is not None
    stop, end = tiny_teacher.eos_ids[0], tiny.eos_ids[0]
    assert mapping[stop] == end and (mapping[:stop - 3] == np.arange(stop - 3)).all()
    source, target = render(TRACE, tiny_teacher), render(TRACE, tiny)
    a = align.align(source, target, mapping)
    assert source.tokens[-1] == stop and target.tokens[-1] == end and a.index[-1] == len(source.tokens) - 1
    content = (target.parts >= 0) & np.isin(target.roles, WRITTEN)
    got = tiny.decode(target.tokens[content & (a.index >= 0)])
    assert (content & (a.index < 0)).sum() <= 2, got  # at most where text meets a tag
    assert not (a.index[np.isin(target.tokens, [tiny.id_of("<think>"), tiny.id_of("</think>")])] >= 0).any()
    assert 0.9 < a.covered / a.supervised <= 1.0


def test_repeated_words_keep_their_place(tiny):
    tr = simple_trace("check check", "check check check check", "check check")
    row = render(tr, tiny)
    assert align.align(row, row).index.tolist() == [
        i if p >= 0 or r in WRITTEN else -1 for i, (p, r) in enumerate(zip(row.parts, row.roles))]


def test_different_thinking_is_not_matched(tiny):
    """Bytes decide, not positions: text inserted before a token moves it to other bytes."""
    a = render(simple_trace("q", "one two three", "x"), tiny)
    b = render(simple_trace("q", "zero one two three", "x"), tiny)
    index = align.align(a, b).index
    assert not (index[b.parts == 1] >= 0).any() and (index[b.parts == 2] >= 0).all()


def test_gather_moves_signals_and_tail():
    ids = np.array([[5, 6], [7, 9], [8, -1]], np.int32)
    logprobs = np.log(np.array([[0.5, 0.25], [0.6, 0.3], [0.9, 1.0]])).astype(np.float32)
    mask = np.array([True, True, False])
    mapping = np.arange(10, dtype=np.int32)
    mapping[9] = -1  # the target has no such token
    row = TopKRow(ids=ids, logprobs=logprobs, mask=mask, tail=np.array([0.25, 0.1, 0.1], np.float32))
    got = align.gather(row, np.array([1, -1, 0, 2]), mapping)
    assert got.ids.tolist() == [[7, -1], [-1, -1], [5, 6], [-1, -1]] and got.mask.tolist() == [True, False, True, False]
    assert np.allclose(np.exp(got.logprobs), [[0.6, 0], [0, 0], [0.5, 0.25], [0, 0]])
    assert np.allclose(got.tail, [0.4, 1, 0.25, 1])  # 0.3 of the first, whose id is lost, goes to the tail
    foreign = align.gather(dataclasses.replace(row, ids=ids + FOREIGN), np.array([1]), mapping)
    assert foreign.ids.tolist() == [[FOREIGN + 7, FOREIGN + 9]]  # outcomes that no id of the student's stands for
    token = align.gather(TokenRow(logprobs=np.array([-1.0, -2.0, -3.0], np.float32), mask=mask), np.array([2, 1, -1]))
    assert token.logprobs.tolist() == [0, -2, 0] and token.mask.tolist() == [False, True, False]


def test_gather_of_draws_and_states():
    mapping = np.array([0, 1, -1, 3], np.int32)
    row = SampledRow(ids=np.array([[1, 2], [2, -1]], np.int32), mask=np.array([True, True]),
                     weights=np.array([[0.75, 0.25], [1, 0]], np.float32))
    got = align.gather(row, np.array([1, 0, -1]), mapping)
    assert got.mask.tolist() == [False, True, False]  # nothing is left of the first
    assert got.ids[1].tolist() == [1, -1] and got.weights[1].tolist() == [1, 0]
    same = align.gather(row, np.array([0, -1]))
    assert same.weights.tolist() == [[0.75, 0.25], [0, 0]] and same.ids[1].tolist() == [-1, -1]
    states = HiddenRow(states=np.arange(4, dtype=np.int8).reshape(2, 2), mask=np.array([True, False]),
                       scales=np.array([0.5, 1], np.float32))
    moved = align.gather(states, np.array([1, 0]))
    assert moved.states.tolist() == [[0, 0], [0, 1]] and moved.scales.tolist() == [0, 0.5]
    assert moved.states.dtype == np.int8
    with pytest.raises(ValueError, match="Score topk or sampled"):
        align.gather(states, np.array([0]), mapping)


def test_low_coverage_and_other_vocabulary_are_refused(tiny, tmp_path):
    a, b = (render(simple_trace("q", t, "x"), tiny) for t in ("one two three four", "five six seven eight nine"))
    with pytest.raises(ValueError, match=r"covers .*of the student's supervised tokens.*cross-entropy"):
        align.require_coverage([align.align(a, b)])
    from tests.data.conftest import tiny_folder
    stranger = load_tokenizer(tiny_folder(tmp_path / "x", vocabulary=350))
    with pytest.raises(ValueError, match=r"cannot be attached.*learned vocabularies differ.*cross-entropy"):
        align.token_map(stranger.info(), tiny.info())


def test_real_pair_r1_distill_to_qwen(load, tmp_path):
    """The R1-Distill-Qwen layout, made of the Qwen2.5 files: other added tokens over the same learned vocabulary."""
    import json
    q = load("qwen2.5")
    q.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    names = ["<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>", "<|EOT|>",
             "<think>", "</think>"]
    for token, name in zip(sorted(spec["added_tokens"], key=lambda t: t["id"]), names):
        token["content"] = name
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    config = {"bos_token": names[3], "eos_token": names[0], "chat_template": load("deepseek_r1").chat.text}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    teacher = load_tokenizer(tmp_path)
    assert teacher.base_hash == q.base_hash and teacher.eos_ids == (151643,)
    mapping = align.token_map(teacher.info(), q.info())
    tr = simple_trace("What is 2+2?", "Two and two.\n\nThat is four, I think: " * 8, "It is **4**.")
    for style in (Style(), Style(think_tags=False)):
        source, target = render(tr, teacher), render(tr, q, style=style)
        share = align.require_coverage([align.align(source, target, mapping)])
        index = align.align(source, target, mapping).index
        assert share > 0.95 and index[-1] == len(source.tokens) - 1
        for role in (THINK, ANSWER):
            assert (index[(target.roles == role) & (target.parts >= 0)] >= 0).mean() > 0.97


def test_no_two_outcomes_become_one(tiny):
    """A teacher that ends turns with a token of its own, and has the student's end token besides."""
    end = tiny.eos_ids[0]
    source = tiny.info() | {"hash": "other", "eos": [end - 1]}
    mapping = align.token_map(source, tiny.info())
    assert mapping[end - 1] == end and mapping[end] == -1
