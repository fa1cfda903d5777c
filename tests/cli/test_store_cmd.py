"""`distill-jax store` on a store of the generated world."""

import json
from pathlib import Path

import numpy as np
import pytest

from distill_jax.cli.main import main
from distill_jax.core.roles import Role
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.jobs.inspect_store import histogram, length_edges
from distill_jax.jobs.write_store import write_store
from distill_jax.traces.store import SignalHeader, TokenRow, TopKRow, TraceStore
from distill_jax.traces.world.generate import WorldSpec, traces
from distill_jax.traces.world.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TraceStore:
    """Six traces; the teacher says 0.6, 0.3, 0.05 of the true id and the two after it, on all but the first token."""
    folder = tmp_path_factory.mktemp("cli")
    tok = load_tokenizer(build_tokenizer(folder / "tok"))
    store = write_store(str(folder / "store"), traces(WorldSpec(kind="lookup", k=3), 6), tok)
    topk = store.signal_writer("topk3", SignalHeader(kind="topk", k=3, teacher="toy-teacher"))
    token = store.signal_writer("token", SignalHeader(kind="token", teacher="toy-teacher"))
    with topk, token:
        for row in store.read(range(len(store))):
            mask = np.arange(len(row)) > 0
            ids = (row.tokens[:, None] + np.arange(3)) % tok.real
            logprobs = np.tile(np.log(np.float32([0.6, 0.3, 0.05])), (len(row), 1))
            topk.append(TopKRow(ids=ids, logprobs=logprobs, mask=mask))
            token.append(TokenRow(logprobs=logprobs[:, 0], mask=mask))
    return store


def run(capsys, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as e:
        main(["store", *args])
    out = capsys.readouterr()
    return int(e.value.code or 0), out.out, out.err


def test_inspect(store, capsys, tmp_path_factory):
    tok = Path(store.url).parent / "tok"
    code, out, _ = run(capsys, "inspect", store.url, "--row", "2", "--tokenizer", str(tok), "--tokens", "4000")
    assert code == 0
    assert "6 in 1 shards" in out and "complete" in out and store.header.tokenizer["hash"] in out
    assert "retained mass, mean 0.9500" in out and "mean log-prob -0.51" in out
    assert "toy-teacher" in out and "topk:3, u8, all rows" in out
    row = store.row(2)
    assert row.text.split("\n")[-1].strip()[-8:] in out
    listed = out[out.index("token  ") if "token  " in out else 0:].splitlines()
    lines = [line for line in listed if line.lstrip()[:1].isdigit()]
    named = load_tokenizer(tok)
    for t in (len(row) - 1, len(row) - 3):
        line = next(x for x in lines if x.split()[0] == str(t))
        assert line.split()[1] == str(row.tokens[t]) and Role(row.roles[t]).name.lower() in line
        expected = named.token_bytes(int(row.tokens[t])).decode()
        assert f"{expected!r} 0.600" in line and "tail 0.05" in line and "-0.511" in line


def test_inspect_without_the_tokenizer(store, capsys, tmp_path):
    code, out, _ = run(capsys, "inspect", store.url, "--tokenizer", str(tmp_path / "nothing"))
    assert code == 0 and "tokens are slices of the stored text" in out
    assert store.row(0).trace.question[:20] in out


def test_json(store, capsys):
    code, out, _ = run(capsys, "inspect", store.url, "--json")
    facts = json.loads(out)
    lengths = store.lengths()
    assert code == 0 and facts["rows"] == 6
    assert facts["tokens"] == lengths.sum() == sum(facts["by_role_tokens"].values())
    roles = np.concatenate([r.roles for r in store.read(range(6))])
    assert facts["by_role_tokens"] == {Role(r).name.lower(): int((roles == r).sum()) for r in np.unique(roles)}
    assert sum(n for _, _, n in facts["lengths"]) == 6
    assert sum(n for _, _, n in facts["signals"]["topk3"]["retained_mass"]) == lengths.sum() - 6


def test_verify_and_damage(store, capsys):
    code, out, _ = run(capsys, "verify", store.url)
    assert code == 0 and "6 rows in 1 shards" in out
    path = next(Path(store.url).glob("data/*/tokens/c.0.0.0"))
    good = path.read_bytes()
    path.write_bytes(good[:40] + bytes([good[40] ^ 4]) + good[41:])
    code, out, err = run(capsys, "verify", store.url)
    path.write_bytes(good)
    assert code == 2 and out == "" and err.startswith("error: corrupt store: shard 0, row ") and err.count("\n") == 1
    assert "whole copy" in err and str(store.url) in err


@pytest.mark.parametrize("args,message", [
    (("inspect", "{tmp}"), "no trace store at"), (("verify", "{tmp}/x"), "no trace store at"),
    (("inspect", "{store}", "--row", "6"), "no row 6; rows run from 0 to 5"),
    (("inspect", "ftp://x/y"), "unknown scheme"),
])
def test_bad_arguments(store, capsys, tmp_path, args, message):
    code, _, err = run(capsys, *(a.format(tmp=tmp_path, store=store.url) for a in args))
    assert code == 2 and message in err and err.count("\n") == 1


def test_histogram_by_hand():
    assert histogram(np.array([1, 2, 3, 8]), [0, 2, 4, 8, 16]) == [(0, 2, 1), (2, 4, 2), (4, 8, 0), (8, 16, 1)]
    assert histogram(np.array([]), [0, 1]) == []
    for lengths in ([1], [1, 2, 3], [255, 256, 4097]):
        edges = length_edges(np.array(lengths))
        assert edges[0] <= min(lengths) and max(lengths) < edges[-1]
