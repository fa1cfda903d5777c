"""A second tokenisation of the rows as a view: the same documents, packed so that they fit both."""

import numpy as np
import pytest

from distill_jax.core.batch import Batch
from distill_jax.core.roles import ANSWER, QUESTION, THINK
from distill_jax.data.render import render
from distill_jax.data.source_specs import Mix, Phases, Prefix, Retokenised, Store
from distill_jax.data.sources import Reading, open_source, serve
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.data.views import Derived, with_made, without_thinking
from distill_jax.traces.trace import simple_trace
from tests.data.conftest import tiny_folder
from tests.data.storing import make_store, some_traces


@pytest.fixture(scope="module")
def coarse(tmp_path_factory):
    """Fewer merges than `tiny`, so the same text has more tokens; other added tokens and template."""
    template = "[{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}" \
               "{% if add_generation_prompt %}{{ 'teacher: ' }}{% endif %}"
    folder = tiny_folder(tmp_path_factory.mktemp("coarse") / "t", think=False, end="<|stop|>", template=template,
                         vocabulary=290)
    return load_tokenizer(folder)


@pytest.fixture
def path(tmp_path, tiny):
    make_store(tmp_path / "s", some_traces(40), tiny, signal="topk")
    return str(tmp_path / "s")


def documents(stream, b):
    """[(row id, tokens, positions, weights)] of a sequence, in order."""
    out = []
    for s in range(1, int(stream.segment_ids[b].max()) + 1):
        at = np.flatnonzero(stream.segment_ids[b] == s)
        assert np.array_equal(at, np.arange(at[0], at[-1] + 1)) and len(set(stream.row_ids[b, at])) == 1
        out.append((int(stream.row_ids[b, at[0]]), stream.tokens[b, at], stream.positions[b, at],
                    stream.weights[b, at]))
    return out


def check(batch: Batch, store, tiny, coarse, view="theirs"):
    """Both views hold the same rows in the same segments, each as its tokenizer renders them."""
    main, other = batch.main, batch.views[view]
    seen = 0
    for b in range(main.tokens.shape[0]):
        ours, theirs = documents(main, b), documents(other, b)
        assert [d[0] for d in ours] == [d[0] for d in theirs]
        for (row_id, tokens, *_), (_, again, positions, weights) in zip(ours, theirs):
            trace = next(iter(store.traces([row_id])))
            assert np.array_equal(tokens, render(trace, tiny).tokens)
            assert np.array_equal(again, render(trace, coarse).tokens)
            assert np.array_equal(positions, np.arange(len(again))) and weights.tolist() == [0.0] + [1.0] * (
                len(again) - 1)
            seen += 1
    return seen


@pytest.mark.parametrize("seq_len", [96, 192])
def test_both_views_hold_the_same_rows(path, tiny, coarse, seq_len):
    readings = {"theirs": Reading(tokenizer=coarse, seq_len=seq_len)}
    source = open_source(Store(path=path, rows=4, seq_len=96, signals=("topk",)), tiny, seed=0, readings=readings)
    store = source.parts[0].rowset.store
    batches = [source.batch(i) for i in range(8)]
    assert batches[0].views["theirs"].tokens.shape == (4, seq_len)
    assert sum(check(b, store, tiny, coarse) for b in batches) > 25
    alone = open_source(Store(path=path, rows=4, seq_len=96, signals=("topk",)), tiny, seed=0)
    longer = source.parts[0].others["theirs"].lengths.sum() / alone.parts[0].rowset.lengths.sum()
    assert longer > 1.2  # the view is what decides what fits where it is no longer than `main`
    dropped = source.describe()[0]["dropped_over_long"]
    assert dropped > 20 if seq_len == 96 else source.parts[0].plan.sequences >= alone.parts[0].plan.sequences - dropped
    about = source.describe()[0]
    assert about["tokens_per_epoch"] < about["tokens_per_epoch/theirs"]
    rows = [b for p in range(2) for b in [next(iter(serve(source, 3, p, 2, stop_step=4)))]]
    np.testing.assert_array_equal(np.concatenate([r.views["theirs"].tokens for r in rows]),
                                  batches[3].views["theirs"].tokens)


def test_rows_that_do_not_fit_the_view_are_dropped_also_where_others_are_cut(path, tiny, coarse):
    lengths = [len(render(t, coarse).tokens) for t in some_traces(40)]
    limit = int(np.median(lengths))
    source = open_source(Store(path=path, rows=4, seq_len=256, over_long="cut"), tiny, seed=0,
                         readings={"theirs": Reading(tokenizer=coarse, seq_len=limit)})
    assert source.describe()[0]["dropped_over_long"] == sum(n > limit for n in lengths)
    assert check(source.batch(0), source.parts[0].rowset.store, tiny, coarse)


def test_mixtures_and_phases_carry_the_view(path, tiny, coarse):
    readings = {"theirs": Reading(tokenizer=coarse, seq_len=192)}
    one = Store(path=path, rows=4, seq_len=96)
    mixed = open_source(Mix(sources=(one, one), weights=(1.0, 3.0), rows=4), tiny, seed=0, readings=readings)
    phased = open_source(Phases(sources=(one, one), steps=(2,)), tiny, seed=0, readings=readings)
    for source in (mixed, phased):
        assert check(source.batch(5), mixed.parts[0].rowset.store, tiny, coarse)


def test_a_prefix_of_tokens_has_no_counterpart(path, tiny, coarse):
    with pytest.raises(ValueError, match=r"prefix keeps a share of the tokens, which in view 'theirs' are others"):
        open_source(Store(path=path, rows=4, seq_len=96, prefix=Prefix(share=0.5)), tiny, seed=0,
                    readings={"theirs": Reading(tokenizer=coarse, seq_len=96)})
    with pytest.raises(ValueError, match="seq_len of a view must be at least 2, got 1"):
        Retokenised("teacher", seq_len=1)


def test_views_made_of_the_retokenised_one(path, tiny, coarse):
    source = open_source(Store(path=path, rows=4, seq_len=96), tiny, seed=0,
                         readings={"theirs": Reading(tokenizer=coarse, seq_len=192)})
    batch = source.batch(0)
    views = with_made(batch.views, {"plain": without_thinking, "plain_theirs": Derived("theirs", without_thinking)})
    for short, whole in (("plain", "main"), ("plain_theirs", "theirs")):
        for b in range(4):
            keep = (views[whole].roles[b] != THINK) & (views[whole].segment_ids[b] != 0)
            np.testing.assert_array_equal(np.asarray(views[short].tokens[b])[:keep.sum()], views[whole].tokens[b][keep])
    with pytest.raises(ValueError, match=r"view 'x' is made of view 'nobody'; there are \['main', 'theirs'\]"):
        with_made(batch.views, {"x": Derived("nobody", without_thinking)})


def test_two_real_tokenizers_read_the_same_text(load, tmp_path):
    """Qwen2.5 and Mistral on mixed scripts: in every document both views spell the same text."""
    ours, theirs = load("qwen2.5"), load("mistral_v1")
    texts = [("Was ist 2+2? 两个加两个", "Let me see: $\\frac{4}{1}$ 🙂 好的", "It is \\boxed{4}."),
             ("def f(x):\n    return x**2 # ?", "for i in range(3):\n\tprint(i)", "答案是 4。")]
    traces = [simple_trace(*t) for t in texts]
    make_store(tmp_path / "s", traces, ours)
    source = open_source(Store(path=str(tmp_path / "s"), rows=1, seq_len=256), ours, seed=0,
                         readings={"theirs": Reading(tokenizer=theirs, seq_len=256)})
    batch = source.batch(0)
    documents = 0
    for segment in range(1, int(batch.main.segment_ids.max()) + 1):
        trace = next(iter(source.parts[0].rowset.store.traces(
            [int(batch.main.row_ids[0][batch.main.segment_ids[0] == segment][0])])))
        for stream, tok in ((batch.main, ours), (batch.views["theirs"], theirs)):
            mine = stream.segment_ids[0] == segment
            assert {QUESTION, THINK, ANSWER} <= set(stream.roles[0][mine].tolist())
            text = tok.decode(stream.tokens[0][mine])  # a token may reach from the template into the question
            assert all(s.text.strip() in text for s in trace.segments), (tok.name, text)
        documents += 1
    assert documents == 2
