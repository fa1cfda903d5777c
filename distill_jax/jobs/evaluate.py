"""Evaluate models on a task: load or reach each, ask it everything, write the report.

`OUT/records/NAME.json` is written after each model, so an evaluation that was stopped goes on with the next one.
"""

import dataclasses
import hashlib
import json
import os
import re
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_jax.core import spec
from distill_jax.data.tokenizer import Tokenizer, load_tokenizer
from distill_jax.eval import report
from distill_jax.eval.answerers import UrlAnswerer, model_answerer
from distill_jax.eval.records import Answerer, LeavesOut, Records, Task
from distill_jax.eval.run import run
from distill_jax.eval.tasks import find, make
from distill_jax.jobs.progress import Ticker
from distill_jax.loading import load, local_folder, model_files
from distill_jax.traces.world.rich import INSTRUCTION


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How models are asked. context: tokens a prompt and its answer may have; None: what the model can take."""

    max_new_tokens: int = 256
    batch_size: int = 64
    context: int | None = None
    parallel: int = 8


def is_server(source: str) -> bool:
    """Whether a MODEL is the address of an OpenAI-compatible server, `http://HOST/v1` or `http://HOST/v1#NAME`."""
    return source.startswith(("http://", "https://"))


def make_task(name: str, options: Mapping[str, Any], models: Sequence[str]) -> Task:
    """The task; where it can be printed in several ways and none was asked for, in one that the models can read."""
    options = dict(options)
    fields = getattr(find(name), "__dataclass_fields__")  # noqa: B009
    if "rendering" in fields and "rendering" not in options and not options.get("data"):
        local = [m for m in models if not is_server(m)]
        reads = all(reads_text(load_tokenizer(model_files(local_folder(m)))) for m in local)
        options["rendering"] = "rich" if reads else "compact"
    return make(name, **options)


def reads_text(tok: Tokenizer) -> bool:
    """Whether English survives the tokenizer; that of the compact rendering knows its own words only."""
    return tok.decode(tok.encode(INSTRUCTION)[0]).strip() == INSTRUCTION


def evaluate(models: Mapping[str, str], task: Task, out: Path, asking: Asking = Asking(),
             plan: report.Plan | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Ask every model (`{name: MODEL}`) the task's questions and write the report into `out`; returns its JSON value.

    Raises ValueError for a model that cannot be loaded or a server that is not there.
    """
    records = {}
    for name, source in models.items():
        kept = out / "records" / f"{name}.json"
        print_of = _fingerprint(task, source, asking)
        old = Records.load(kept) if kept.is_file() else None
        if old is not None and old.about.get("fingerprint") == print_of:
            records[name] = old
            say(f"{name}: {len(old)} answers kept from before")
            continue
        answerer = _answerer(source, asking)
        about = {"source": source, "fingerprint": print_of, **training_costs(source)}
        with Ticker(f"{task.name}: {name}") as ticker:
            records[name] = run(task, answerer, model=name, about=about, chunk=max(256, 4 * asking.batch_size),
                                progress=lambda done, of, ticker=ticker: ticker.at(done, f"of {of:,}"))
        records[name].save(kept)
        say(f"{name}: {records[name].mean('correct'):.1%} of {len(records[name])} answers right")
    plan = plan or report.Plan()
    if isinstance(task, LeavesOut):
        plan = dataclasses.replace(plan, extra=task.left_out() | dict(plan.extra))
    value = report.write(out, records, plan)
    say(report.table_text(value, records, plan))
    return value


def names_for(models: Sequence[str]) -> list[str]:
    """Names in the report: `base` and `distilled` for two models, else the ends of their paths, made different."""
    if len(models) == 2:
        return ["base", "distilled"]
    out: list[str] = []
    for model in models:
        name = re.sub(r"[^\w.-]+", "-", re.split(r"[/#]", model.rstrip("/"))[-1]) or "model"
        out.append(name if name not in out else f"{name}-{sum(n.startswith(name) for n in out) + 1}")
    return out


def training_costs(source: str) -> dict[str, float]:
    """FLOPs and seconds of the training stage behind a local run; nothing for other models."""
    if is_server(source) or "://" in source:
        return {}
    marker = local_folder(source) / "done.json"
    if not marker.is_file():
        return {}
    done = json.loads(marker.read_text())
    result = done["result"] if isinstance(done.get("result"), dict) else {}
    flops = {"training_flops": float(result["flops"])} if "flops" in result else {}
    return {"training_seconds": round(float(done["seconds"]), 1), **flops}


def _answerer(source: str, asking: Asking) -> Answerer:
    if is_server(source):
        url, _, name = source.partition("#")
        key = os.environ.get("OPENAI_API_KEY", "")
        return UrlAnswerer(url=url, model=name or _served_model(url, key), max_new_tokens=asking.max_new_tokens,
                           api_key=key, parallel=asking.parallel)
    model, params = load(source)
    tok = load_tokenizer(model_files(local_folder(source)))
    return model_answerer(model, params, tok, max_new_tokens=asking.max_new_tokens, batch_size=asking.batch_size,
                          context=asking.context)


def _served_model(url: str, key: str) -> str:
    """The only model a server has. Raises ValueError when it has several or does not answer."""
    request = urllib.request.Request(f"{url.rstrip('/')}/models",
                                     headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            names = [m["id"] for m in json.load(response)["data"]]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{url} does not answer as an OpenAI-compatible server ({e}); give its address as far as "
                         "/v1, and the model as URL#NAME") from None
    if len(names) != 1:
        raise ValueError(f"{url} serves {names}: say which as {url}#NAME")
    return names[0]


def _fingerprint(task: Task, source: str, asking: Asking) -> str:
    """Of everything that decides the answers, the model's files included as far as their times go."""
    parts: list[Any] = [spec.to_plain(task), source, spec.to_plain(asking)]
    if not is_server(source) and "://" not in source:
        folder = local_folder(source)
        parts += sorted((p.name, p.stat().st_mtime_ns) for p in (*folder.glob("*"), *folder.glob("checkpoints/*")))
    return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=8).hexdigest()
