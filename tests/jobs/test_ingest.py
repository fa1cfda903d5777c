"""Other people's log-probs as a signal: every form, completions without their prompt, and dumps that do not fit."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_jax.cli.main import main
from distill_jax.core.roles import SUPERVISED
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.jobs.ingest import IngestJob, ingest
from distill_jax.traces.formats.logprobs import parse
from distill_jax.traces.store import TraceStore
from tests.data.conftest import tiny_folder
from tests.data.storing import make_store, some_traces, topk_of

K, ROWS = 4, 6


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return load_tokenizer(tiny_folder(tmp_path_factory.mktemp("tok") / "t"))


@pytest.fixture(scope="module")
def store(tok, tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "s", some_traces(ROWS), tok)


def said(store, tok, i):
    """(row, supervised positions, ids [T,K] and log-probs [T,K] of the made-up teacher)."""
    row = store.row(i)
    made = topk_of(row, K, tok.real)
    return row, np.flatnonzero(np.isin(row.roles, [int(r) for r in SUPERVISED])), made.ids, made.logprobs


def vllm(store, tok, i):
    row, _, ids, lp = said(store, tok, i)
    entries = [{str(a): {"logprob": float(b), "rank": n + 1} for n, (a, b) in enumerate(zip(*x))} for x in zip(ids, lp)]
    return {"prompt_token_ids": row.tokens.tolist(), "prompt_logprobs": [None, *entries[1:]]}


def vllm_server(store, tok, i):
    return {"id": "x", "choices": [{"text": "", "logprobs": None, **vllm(store, tok, i)}]}


def sglang(store, tok, i):
    row, _, ids, lp = said(store, tok, i)
    own = [[None if t == 0 else float(lp[t, 0]), int(token), None] for t, token in enumerate(row.tokens)]
    top = [None] + [[[float(b), int(a), None] for a, b in zip(*x)] for x in zip(ids[1:], lp[1:])]
    return {"text": "", "meta_info": {"input_token_logprobs": own, "input_top_logprobs": top}}


def chat(store, tok, i):
    """Only what was written, by bytes and by vLLM's token ids in turn."""
    row, on, ids, lp = said(store, tok, i)
    entry = lambda a, b: ({"token": f"token_id:{a}", "logprob": float(b)} if i % 2 else
                          {"token": "?", "bytes": list(tok.token_bytes(int(a))), "logprob": float(b)})
    content = [{**entry(row.tokens[t], lp[t, 0]), "top_logprobs": [entry(a, b) for a, b in zip(ids[t], lp[t])]}
               for t in on]
    return {"choices": [{"message": {}, "logprobs": {"content": content}}]}


def table(store, tok, i):
    row, _, ids, lp = said(store, tok, i)
    return {"row": i, "token_ids": row.tokens.tolist(), "topk_ids": ids.tolist(), "topk_logprobs": lp.tolist()}


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    return str(path)


@pytest.mark.parametrize("form", [vllm, vllm_server, sglang, chat, table])
def test_every_form_gives_the_same_signal(store, tok, tmp_path, form):
    name = form.__name__
    dump = write(tmp_path / ("d.parquet" if form is table else "d.jsonl"), [form(store, tok, i) for i in range(ROWS)])
    report = ingest(IngestJob(store=store.url, dump=dump, k=K, name=name, precision="f32"), tok)
    assert report["rows_with_signal"] == ROWS and not report["wrong"]
    reader = TraceStore.open(store.url).signal(name)
    for i, got in enumerate(reader.read(range(ROWS))):
        _, on, ids, lp = said(store, tok, i)
        assert np.flatnonzero(got.mask).tolist() == on.tolist()
        for t in on:
            texts = lambda x: [tok.token_bytes(int(j)) for j in x]  # two ids may stand for the same bytes
            assert sorted(texts(got.ids[t])) == sorted(texts(ids[t])) or len(set(texts(ids[t]))) < K
        np.testing.assert_allclose(np.exp(got.logprobs[on]).sum(1), np.exp(lp[on]).sum(1), atol=0.2)
        if form is not chat:
            np.testing.assert_allclose(got.logprobs[on], lp[on], atol=1e-6)


def test_token_signal_and_command(store, tok, tmp_path, capsys):
    dump = write(tmp_path / "d.jsonl", [vllm(store, tok, i) for i in range(ROWS)])
    with pytest.raises(SystemExit) as done:
        main(["store", "ingest", store.url, dump, "--k", "0", "--precision", "f32"])
    assert done.value.code == 0
    assert f"signal token: {ROWS} of {ROWS} rows" in capsys.readouterr().err
    for i, got in enumerate(TraceStore.open(store.url).signal("token").read(range(ROWS))):
        _, on, _, lp = said(store, tok, i)
        np.testing.assert_allclose(got.logprobs[on], lp[on, 0], atol=1e-6)


def test_a_row_is_used_up_to_the_first_token_that_differs(store, tok, tmp_path):
    rows = [vllm(store, tok, i) for i in range(ROWS)]
    cut = said(store, tok, 2)[1][3]
    rows[2]["prompt_token_ids"][cut] += 1
    rows[4]["prompt_logprobs"][said(store, tok, 4)[1][0]] = {"5": {"logprob": float("nan")}}
    job = IngestJob(store=store.url, dump=write(tmp_path / "d.jsonl", rows), k=K, name="cut", max_wrong=0.5)
    report = ingest(job, tok)
    assert report["wrong"] == {"differs from some token on": 1, "not finite": 1}
    got = TraceStore.open(store.url).signal("cut").read(range(ROWS))
    assert got[2].mask.any() and not got[2].mask[cut:].any() and not got[4].mask.any()


def test_dumps_that_do_not_fit(store, tok, tmp_path):
    def refused(rows, match, **kwargs):
        job = IngestJob(store=store.url, dump=write(tmp_path / "d.jsonl", rows), k=K, name="bad", **kwargs)
        with pytest.raises(ValueError, match=match):
            ingest(job, tok)

    shifted = [vllm(store, tok, (i + 1) % ROWS) for i in range(ROWS)]
    refused(shifted, r"6 of 6 rows do not fit the store .*the first: row 0: none of its tokens \[\d+, ")
    refused([{"prompt": "x"}], r"none of the known forms of log-probs: the row has the fields \['prompt'\]")
    refused([table(store, tok, 3), table(store, tok, 1)], "line 2 is row 1 after row 3")
    with pytest.raises(ValueError, match="give --tokenizer"):
        ingest(IngestJob(store=store.url, k=K, name="bad", dump=write(tmp_path / "c.jsonl", [chat(store, tok, 0)])))
    assert "bad" not in store.signals()
    with pytest.raises(ValueError, match="2 tokens and log-probs for 1"):
        parse({"prompt_token_ids": [1, 2], "prompt_logprobs": [None]})


def test_completions_with_pieces_of_characters():
    row = {"choices": [{"logprobs": {"tokens": ["a", "bytes:\\xe4\\xbd"], "token_logprobs": [None, -0.5],
                                     "top_logprobs": [None, {"bytes:\\xe4\\xbd": -0.5, "b": -1.5}]}}]}
    out = parse(row)
    assert out.tokens == [b"a", b"\xe4\xbd"] and out.outcomes == [{}, {b"\xe4\xbd": -0.5, b"b": -1.5}]
