"""Two tokenisations of one text: groups by bytes, ids by bytes, and a teacher's signal on a student's tokens."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax.core.batch import FOREIGN
from distill_jax.core.roles import SUPERVISED
from distill_jax.data import cross
from distill_jax.data.align import gather
from distill_jax.data.render import render
from distill_jax.data.spans import byte_positions
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.traces.store import Row, SampledRow, TopKRow
from distill_jax.traces.trace import simple_trace
from tests.data.conftest import tiny_folder

BYTE_LEVEL = ("gpt2", "qwen2.5", "deepseek_r1")
NAMES = (*BYTE_LEVEL, "t5", "mistral_v1", "mistral_v3", "spm_test_1k", "hf_bytefallback")
TEXTS = {
    "english": "The quick brown fox didn't jump over 1234567 lazy dogs; it re-tokenised them, twice!\nThen it slept.",
    "chinese": "\u9996\u5148\uff0c\u8ba1\u7b97\u4e00\u4e0b\uff1a\u4e09\u5341\u4e8c\u52a0\u5341\u7b49\u4e8e"
               "\u56db\u5341\u4e8c\u3002\u6240\u4ee5\u7b54\u6848\u662f42\u3002",
    "code": "def f(x: list[int]) -> int:\n    # sum\n\treturn sum(i**2 for i in x if i % 2 == 0)\n\n\nprint(f([1, 2]))",
    "latex": r"So \(\frac{a_1+b}{2\sqrt{x}}\) and $$\int_0^\infty e^{-x^2}\,dx=\tfrac{\sqrt{\pi}}{2}$$ so \boxed{42}.",
    "emoji": "ok \U0001f44d\U0001f3fd then \U0001f469\u200d\U0001f680 and \U0001f999\u2764\ufe0f!",
}


def from_ends(ends):
    ends = np.asarray(ends, np.int64)
    return np.stack([np.concatenate([[0], ends[:-1]]), ends], 1)


def check_groups(a, b, total):
    """A partition of both sides into groups that cover the same bytes and have no common cut inside."""
    g = cross.group_spans(a, b)
    covered = 0
    for k in range(g.count):
        mine = [np.flatnonzero(of == k) for of in (g.source, g.target)]
        assert all(len(i) and (np.diff(i) == 1).all() for i in mine), "consecutive tokens of both sides"
        runs = [spans[i] for spans, i in zip((a, b), mine)]
        assert runs[0][0, 0] == runs[1][0, 0] == covered and runs[0][-1, 1] == runs[1][-1, 1] > covered
        inner = [set(r.reshape(-1).tolist()) for r in runs]
        assert inner[0] & inner[1] == {covered, int(runs[0][-1, 1])}, "minimal"
        covered = int(runs[0][-1, 1])
    assert covered == total and (g.source >= 0).all() and (g.target >= 0).all()
    assert (np.diff(g.source) >= 0).all() and (np.diff(g.target) >= 0).all()
    return g


lengths = st.lists(st.integers(0, 4), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(lengths, lengths, st.integers(0, 2**31 - 1))
def test_groups_partition_both_sides(left, right, seed):
    """Any two cuts of one text, tokens without bytes anywhere (BOS, dummy prefix, normaliser) included."""
    total = max(sum(left), sum(right), 1)
    rng = np.random.default_rng(seed)
    sides = []
    for side in (left, right):
        side = [*side, total - sum(side)] if sum(side) < total else side
        sides.append(from_ends(np.cumsum(rng.permutation(side))))
    g = check_groups(*sides, total)
    values = rng.normal(size=len(sides[0]))
    np.testing.assert_allclose(g.sums(values, g.source).sum(), values.sum(), atol=1e-9)
    assert g.sizes(g.target).sum() == len(sides[1]) and (g.sizes(g.target) > 0).all()
    assert (g.target[g.firsts(g.target)] == np.arange(g.count)).all()


def test_by_hand():
    """One side has a BOS and a dummy prefix; a character of 4 bytes is cut in different places."""
    a = np.array([[0, 0], [0, 0], [0, 1], [1, 3], [3, 5], [5, 6], [6, 6]])
    b = np.array([[0, 1], [1, 4], [4, 5], [5, 6]])
    g = cross.group_spans(a, b)
    assert g.source.tolist() == [0, 0, 0, 1, 1, 2, 2] and g.target.tolist() == [0, 1, 1, 2]
    np.testing.assert_allclose(g.sums(np.array([-1., -2, -3, -4, -5, -6, -7]), g.source), [-6, -9, -13])
    none = cross.group_spans(np.zeros((0, 2), int), b)
    assert none.count == 0 and (none.target == -1).all()


def test_parts_and_overhang():
    """Segments have their own coordinates; a token that begins in the template, or runs over the end of a segment
    where the other side stops, has no group; nor have tokens beside bytes that one side leaves out."""
    a, parts_a = np.array([[0, 9], [1, 2], [2, 5], [0, 3], [3, 4]]), np.array([-1, 0, 0, 1, 1])
    b, parts_b = np.array([[0, 1], [1, 2], [2, 4], [4, 6], [0, 3], [3, 5]]), np.array([0, 0, 0, 0, 1, 1])
    g = cross.group_spans(a, b, parts_a, parts_b)
    assert g.source.tolist() == [-1, 0, -1, 1, -1] and g.target.tolist() == [-1, 0, -1, -1, 1, -1]
    gap = cross.group_spans(np.array([[0, 1], [2, 3], [3, 4]]), from_ends([1, 2, 3, 4]))
    assert gap.source.tolist() == [0, 1, 2] and gap.target.tolist() == [0, -1, 1, 2]


@pytest.mark.parametrize("left", NAMES)
def test_real_pairs(load, golden, left):
    """Every pair with `left`, on the golden texts and five kinds of text: a partition, the cuts of the reference
    libraries' offsets, and never one lump."""
    texts = [(row["text"], row) for row in golden if row["text"]] + [(t, None) for t in TEXTS.values()]
    for right in NAMES[NAMES.index(left) + 1:]:
        tokens = groups = 0
        for text, row in texts:
            a, b = (load(n).encode(text)[1] for n in (left, right))
            if not len(a) or not len(b):  # sentencepiece makes nothing of blanks
                assert not text.strip() and cross.group_spans(a, b).count == 0
                continue
            g = check_groups(a, b, len(text.encode()))
            tokens, groups = tokens + min(len(a), len(b)), groups + g.count
            if row is None:
                assert g.count >= 0.45 * min(len(a), len(b)), (right, text)
                continue
            where = byte_positions(text)
            clean = [clean_starts(row["offsets"][n]) for n in (left, right)]
            ours = [np.intersect1d(s[:, 0], where) for s in (a, b)]
            both = set(np.intersect1d(*ours).tolist())
            assert {int(where[c]) for c in clean[0] & clean[1]} <= both, (right, text)
            assert {int(x) for x in a[g.firsts(g.source), 0]} >= both
        assert groups > 0.6 * tokens, (left, right)


def clean_starts(offsets):
    """Character positions at which a token of the reference begins and none before reaches over. The first token
    begins with the text: blanks that are dropped in front of it are its own."""
    out, reach = set(), 0
    for start, end in [[0, offsets[0][1]], *offsets[1:]]:
        if start >= reach:
            out.add(start)
        reach = max(reach, end)
    return out


def test_ids_by_bytes(load):
    q, g, m = (load(n) for n in ("qwen2.5", "gpt2", "mistral_v3"))
    for a, b in ((g, q), (m, q)):
        mapping = cross.byte_map(a, b)
        known = np.flatnonzero(mapping < FOREIGN)
        assert len(np.unique(mapping)) == a.real, "no two outcomes become one, none is lost"
        ends = {a.eos_ids[0]}
        assert all(a.token_bytes(i) == b.token_bytes(mapping[i]) for i in known.tolist() if i not in ends)
        assert mapping[a.eos_ids[0]] == b.eos_ids[0]
        blank = {g: "\u0120", m: "\u2581"}[a]
        assert mapping[a.id_of(f"{blank}the")] == q.id_of("\u0120the")
        if a is g:
            assert (mapping[:50_000] < FOREIGN).mean() > 0.8  # Qwen has most of GPT-2's tokens
    assert q.token_bytes(mapping[m.id_of("<0x0A>")]) == b"\n"  # only the fallback has these bytes
    assert mapping[m.id_of("<0x41>")] == FOREIGN + m.id_of("<0x41>")  # the piece A has them


def test_prefixes(load):
    """An outcome without counterpart goes to the longest id its bytes begin with; Mistral has no ` tokenization`."""
    q, m = load("qwen2.5"), load("mistral_v3")
    exact, mapping = cross.byte_map(q, m), cross.byte_map(q, m, prefix=True)
    assert (mapping[exact < FOREIGN] == exact[exact < FOREIGN]).all()
    known = {m.token_bytes(i) for i in range(m.real)}
    moved = np.flatnonzero((exact >= FOREIGN) & (mapping < FOREIGN))
    assert len(moved) > 100_000 and (mapping[list(q.info()["added"].values())] >= FOREIGN).sum() > 0
    for i in moved[::5000].tolist():
        raw, kept = q.token_bytes(i), m.token_bytes(mapping[i])
        assert raw.startswith(kept) and len(kept) < len(raw)
        assert raw[:len(kept) + 1] not in known


def test_merged_outcomes_keep_the_mass():
    ids = np.array([[7, 3, 7, -1], [5, 5, 5, 2], [-1, -1, -1, -1]], np.int32)
    p = np.array([[0.4, 0.3, 0.1, 0.0], [0.1, 0.2, 0.3, 0.25], [0, 0, 0, 0]])
    with np.errstate(divide="ignore"):
        got, lp = cross.merge_outcomes(ids, np.log(p).astype(np.float32))
    np.testing.assert_allclose(np.exp(lp).sum(1), p.sum(1), rtol=1e-6)
    found = [dict(zip(i[i >= 0].tolist(), np.exp(x[i >= 0]))) for i, x in zip(got, lp)]
    assert found[0] == pytest.approx({7: 0.5, 3: 0.3}) and found[1] == pytest.approx({5: 0.6, 2: 0.25})
    assert not found[2]


def attach(trace, a, b):
    """(source row, target row, map, alignment) of teacher a and student b."""
    source, target, mapping = render(trace, a), render(trace, b), cross.byte_map(a, b)
    return source, target, mapping, cross.cross_align(source, target, mapping, (a, b))


@pytest.mark.parametrize(("teacher", "student"), [
    ("deepseek_r1", "qwen2.5"), ("mistral_v3", "qwen2.5"), ("qwen2.5", "mistral_v3"), ("gpt2", "deepseek_r1")])
def test_signal_goes_to_group_starts(load, teacher, student):
    """Where the student has a distribution, both have read the same bytes of the same segment; the likelihood of the
    realised bytes is looked up under the same bytes."""
    a, b = load(teacher), load(student)
    trace = simple_trace("What is 32 + 10?", "\n\n".join(TEXTS.values()), "It is **42**.")
    source, target, mapping, al = attach(trace, a, b)
    assert al.covered > 0.95 * al.supervised and 0.4 * al.supervised < al.begun <= al.covered
    assert target.tokens[-1] == b.eos_ids[0] and al.index[-1] == len(source.tokens) - 1
    for t in np.flatnonzero((al.index >= 0) & (target.parts >= 0)):
        s = al.index[t]
        assert source.parts[s] == target.parts[t] and source.spans[s, 0] == target.spans[t, 0]
    hit = np.flatnonzero(al.pairs >= 0)
    assert set(hit.tolist()) <= set(np.flatnonzero(al.index >= 0).tolist()) and len(hit) > 0.2 * al.begun
    content = hit[target.parts[hit] >= 0]
    assert all(a.token_bytes(source.tokens[al.pairs[t]]) == b.token_bytes(target.tokens[t]) for t in content)
    ids = np.stack([source.tokens, (source.tokens + 1) % a.real], 1)
    lp = np.log(np.tile([[0.5, 0.2]], (len(ids), 1))).astype(np.float32)
    said = TopKRow(ids=ids, logprobs=lp, mask=np.ones(len(ids), bool), tail=np.full(len(ids), 0.3, np.float32))
    got = gather(said, al.index, mapping)
    assert (got.mask == (al.index >= 0)).all()
    assert (got.ids[got.mask] >= 0).all(), "an outcome without an id keeps its place"
    np.testing.assert_allclose(np.exp(got.logprobs[got.mask]).sum(1), 0.7, rtol=1e-5)
    draws = SampledRow(ids=ids, weights=np.tile(np.float32([0.6, 0.4]), (len(ids), 1)), mask=said.mask)
    drawn = gather(draws, al.index, mapping)
    assert (drawn.ids < FOREIGN).all(), "draws have no tail: an outcome without an id is left out"
    np.testing.assert_allclose(drawn.weights[drawn.mask].sum(1), 1, rtol=1e-5)


def test_a_normaliser_is_noticed(load):
    """T5 makes blanks of line ends and 1/2 of one character, and has no backslash: groups with such tokens get no
    signal, the others do. The line end behind `<think>` becomes a blank of the first word, which is lost for it."""
    t5, q = load("t5"), load("qwen2.5")
    plain = simple_trace("q", "One plus two is three, so it is three.", "three")
    changed = simple_trace("q", "One \u00bd\nplus {two}  is \\boxed{three}.", "three")
    share = {}
    for name, trace in (("plain", plain), ("changed", changed)):
        source, target, _, al = attach(trace, t5, q)
        share[name] = al.covered / al.supervised
        assert all(t5.token_bytes(source.tokens[s]) == q.token_bytes(target.tokens[t])
                   for t, s in enumerate(al.pairs) if s >= 0 and target.parts[t] >= 0)
    assert share["plain"] == 9 / 12 and 0.05 < share["changed"] < 0.4
    with pytest.raises(ValueError, match=r"row 7: of its 12 supervised.*changes the text.*cross-entropy"):
        cross.require_same_text({3: attach(plain, q, t5)[3], 7: attach(plain, t5, q)[3]}, ("t5", "qwen"))


def test_a_blank_that_is_not_in_the_text(load):
    """Mistral puts a blank before a text: its outcomes there are blank + word, the student's are words."""
    m, q = load("mistral_v3"), load("qwen2.5")
    text = "check the result"
    (a, sa), (b, sb) = m.encode(text), q.encode(text)
    row = lambda ids, spans: Row(
        tokens=ids, spans=spans, parts=np.zeros(len(ids), np.int16), steps=np.zeros(len(ids), np.int32), text=text,
        roles=np.full(len(ids), int(SUPERVISED[0]), np.uint8), trace=simple_trace("q", text, "x"))
    al = cross.cross_align(row(a, sa), row(b, sb), cross.byte_map(m, q), (m, q))
    assert al.index.tolist() == [-1, 1, 2] and al.covered == 3


def test_other_vocabulary_of_the_same_kind(tmp_path):
    """Two byte-level vocabularies of different size: all segments are covered, and what stands between thinking and
    answer: `</think>` is one token of the student and its bytes those of the other's `</`, `think`, `>`."""
    a, b = (load_tokenizer(tiny_folder(tmp_path / str(n), vocabulary=n, think=n == 400)) for n in (300, 400))
    trace = simple_trace("What is 12 + 30?", "12 plus 30 is 42.\nI check the result: \U0001f999.", "The answer is 42.")
    for one, two in ((a, b), (b, a)):
        _, target, _, al = attach(trace, one, two)
        assert al.covered == al.supervised and al.begun <= al.covered
        glue = target.text.index("</think>")
        assert al.index[np.cumsum(target.spans[:, 1] - target.spans[:, 0]).searchsorted(glue, "right")] >= 0
