"""A server that speaks the OpenAI protocol (vLLM, SGLang, llama.cpp, hosted ones), and traces from its chats.

Of a chat the text is all that is kept: ids of another program's tokenizer mean nothing here. Where prompts are ids and
ids come back, see `completions`.
"""

import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from distill_jax.data.conversation import to_messages, turns
from distill_jax.decode import Sampling
from distill_jax.rollout.generation import seed_of
from distill_jax.traces.formats.base import Sample, Style, written_segments
from distill_jax.traces.formats.text import Reject
from distill_jax.traces.trace import Provenance, Trace

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Refused(Exception):
    """The server does not want this request (4xx): asking again does not help."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A server at `url` (as far as `/v1`) and the name of the model there.

    api_key   sent as a bearer token when not empty
    parallel  requests at a time
    timeout   seconds one request may take
    retries   after a refused or broken connection, a time-out, 429 or 5xx, with pauses that double from `pause` seconds
    report    is told of every attempt that failed, from any thread
    """

    url: str
    model: str
    api_key: str = ""
    parallel: int = 16
    timeout: float = 1800.0
    retries: int = 6
    pause: float = 1.0
    report: Callable[[str], None] | None = None

    @classmethod
    def connect(cls, url: str, model: str = "", **kwargs: Any) -> "Engine":
        """The server's first model unless one is named. Raises ValueError where there is no such server."""
        engine = cls(url=url.rstrip("/"), model=model, **kwargs)
        if model:
            return engine
        try:
            listed = engine.request("models", None)["data"]
        except (Refused, OSError, ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{url} does not list its models ({e}); give the URL as far as /v1, or name the model "
                             "with --engine-model") from None
        if not listed:
            raise ValueError(f"{url} serves no model")
        return cls(url=url.rstrip("/"), model=str(listed[0]["id"]), **kwargs)

    def request(self, path: str, body: Mapping[str, Any] | None) -> Any:
        """The JSON answer to a POST, or to a GET where `body` is None. Raises Refused, or OSError when every attempt
        failed."""
        headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {})
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(self.retries + 1):
            try:
                asked = urllib.request.Request(f"{self.url}/{path}", data=data, headers=headers)
                with urllib.request.urlopen(asked, timeout=self.timeout) as reply:
                    return json.load(reply)
            except urllib.error.HTTPError as e:
                said = f"{e.code} {e.read().decode(errors='replace')[:300]}"
                if e.code != 429 and e.code < 500:
                    raise Refused(said) from None
                problem = said
            except (OSError, http.client.HTTPException, ValueError) as e:  # ValueError: a reply that is no JSON
                problem = f"{type(e).__name__}: {e}"
            if self.report:
                self.report(f"{self.url}/{path}: {problem}")
            if attempt < self.retries:
                time.sleep(self.pause * 2**attempt)
        raise OSError(f"{self.url}/{path}: {self.retries + 1} attempts failed, the last with {problem}")


def engine_traces(engine: Engine, questions: Sequence[Trace], sampling: Sampling, *, n: int = 1, seed: int = 0,
                  progress: Callable[[int], None] | None = None) -> list[Trace | Reject]:
    """`n` traces for every question, in order, as `rollout.generation.generate_traces` gives them; Reject where the
    server refused a question or wrote nothing. Raises OSError when the server is gone."""
    asked = [(q, s) for q in questions for s in range(n)]
    return side_by_side(engine, lambda x: _ask(engine, x[0], sampling, seed_of(seed, x[0].group, x[1]), x[1]), asked,
                        progress)


def side_by_side(engine: Engine, ask: Callable[[Item], Answer], items: Sequence[Item],
                 progress: Callable[[int], None] | None = None) -> list[Answer]:
    """`ask` of every item, in order, as many at a time as the engine takes. What one raises ends the others."""
    out: list[Answer] = []
    with ThreadPoolExecutor(engine.parallel) as threads:
        futures = [threads.submit(ask, item) for item in items]
        try:
            for future in futures:
                out.append(future.result())
                if progress:
                    progress(len(out))
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    return out


def _ask(engine: Engine, question: Trace, sampling: Sampling, seed: int, sample: int) -> Trace | Reject:
    body: dict[str, Any] = {
        "model": engine.model, "messages": to_messages(question, turns(question)),
        "temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_new_tokens,
        "seed": seed % 2**31, "logprobs": True}
    body |= {k: v for k, v in (("top_k", sampling.top_k), ("min_p", sampling.min_p)) if v}  # not everyone knows them
    try:
        try:
            reply = engine.request("chat/completions", body)
        except Refused as e:
            if "logprobs" not in str(e):
                raise
            reply = engine.request("chat/completions", {k: v for k, v in body.items() if k != "logprobs"})
        return _trace(reply, question, Provenance(
            source=question.provenance.source, row=question.provenance.row, teacher=engine.model,
            sampling={k: body[k] for k in ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed")
                      if k in body} | {"sample": sample}))
    except Refused as e:
        return Reject("refused_by_server", str(e))
    except Reject as e:
        return e


def _trace(reply: Any, question: Trace, provenance: Provenance) -> Trace:
    """The trace in a chat completion. Raises Reject where nothing was written."""
    try:
        choice = reply["choices"][0]
        message = choice["message"]
    except (KeyError, IndexError, TypeError):
        raise Reject("no_choice", json.dumps(reply)[:200]) from None
    thinking = message.get("reasoning_content") or message.get("reasoning")
    sample = Sample(text=message.get("content") or "", thinking=thinking, finish=choice.get("finish_reason") or "")
    segments, flags = written_segments(sample, Style(), question.last_turn)
    said = [t.get("logprob") for t in (choice.get("logprobs") or {}).get("content") or ()]
    known = [x for x in said if isinstance(x, int | float) and math.isfinite(x)]
    scores = {"mean_logprob": sum(known) / len(known)} if known else {}
    return Trace(segments=(*question.segments, *segments), gold=question.gold, group=question.group,
                 meta=question.meta, flags=tuple(dict.fromkeys(flags)), scores=scores, provenance=provenance)
