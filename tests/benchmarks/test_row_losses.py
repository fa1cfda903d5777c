"""The table of row losses leaves none out, and runs."""

import inspect
import json
from argparse import Namespace

from benchmarks.row_losses import LOSSES, compare
from distill_jax.losses.rows import adaptive, alpha_beta, cross_entropy, divergences, plackett_luce, taid, truncated

FAMILIES = (adaptive, alpha_beta, cross_entropy, divergences, plackett_luce, taid, truncated)


def test_every_row_loss_is_listed():
    public = {f for m in FAMILIES for n, f in inspect.getmembers(m, inspect.isfunction)
              if f.__module__ == m.__name__ and not n.startswith("_")}
    assert public == {term.loss for term, *_ in LOSSES.values()}


def test_it_runs(tmp_path, capsys):
    out = tmp_path / "rows.json"
    compare(Namespace(vocab=320, width=8, tokens=16, rows=2, k=4, chunk=8, dtype="float32", supervised=1.0, repeats=1,
                      only=["forward_kl"], out=str(out)))
    results = json.loads(out.read_text())["results"]
    assert [r["target"] for r in results] == ["topk", "sampled", "full"]
    assert all(r["time_ratio"] > 0 and r["memory_ratio"] > 0 and not r["sorts"] for r in results)
    assert "x temporaries" in capsys.readouterr().out
