"""Completions of token ids from a server: vLLM (or what speaks its dialect of `/v1/completions`) as a `Completer`.

Prompts go out as ids and ids come back, so that training is on exactly what was sampled; the server must serve the
student's own tokenizer. Fields beyond OpenAI's: `stop_token_ids`, `ignore_eos`, `include_stop_str_in_output`,
`skip_special_tokens`, `return_tokens_as_token_ids`, `return_token_ids`, `top_k`, `min_p`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill_jax.decode.request import Completion, Pending, Request
from distill_jax.decode.sampling import Sampling
from distill_jax.rollout.engine import Engine, Refused, side_by_side

TOKEN_ID = "token_id:"


@dataclass(frozen=True, kw_only=True)
class Completions:
    """`decode.Completer` on a server.

    processed   whether the server's log-probs are those after temperature and filters (vLLM started with
                `--logprobs-mode processed_logprobs`), or, as by default, the model's own
    What the server does not say is NaN: forced and injected tokens have no `logprobs`; where temperature or filters
    change the distribution, `behaviour` is NaN unless `processed`, and `logprobs` is if `processed`. Trouble that
    passes is tried again (`Engine.retries`); whether a seed gives the same answer again is the server's affair.
    """

    engine: Engine
    processed: bool = False

    def complete(self, requests: Sequence[Request], sampling: Sampling, *,
                 progress: Callable[[int], None] | None = None) -> list[Completion]:
        """One completion a request, in order. Raises ValueError where the server refuses one or answers without ids,
        OSError when it is gone."""
        return side_by_side(self.engine, lambda x: self._answer(*x, sampling), list(enumerate(requests)), progress)

    def _answer(self, number: int, request: Request, sampling: Sampling) -> Completion:
        pending, answer = Pending(request, sampling), _Answer()
        forced = request.forced[:pending.limit]
        answer.put_in(forced, (request.forced_logprobs or (0.0,) * len(forced))[:len(forced)], injected=False)
        while True:
            count, stopped = len(answer.ids), False
            room = pending.pause(count) - count
            if room > 0:
                ids = [*(int(i) for i in request.prompt), *answer.ids]
                body = self._body(ids, room, (request.seed + 7919 * count) % 2**31, sampling)
                try:
                    reply = self.engine.request("completions", body)
                except Refused as e:
                    raise ValueError(f"prompt {number} of {len(request.prompt)} tokens: the server refuses it: {e}"
                                     ) from None
                new, said, stopped = parse(reply)
                answer.sampled(new, *self._meaning(said, sampling))
                if not new and not stopped:
                    raise OSError(f"prompt {number}: the server wrote nothing: {json.dumps(reply)[:200]}")
            injection = pending.take(len(answer.ids), stopped)
            if injection is not None:
                ids = injection.ids[:pending.limit - len(answer.ids)]
                answer.put_in(ids, (0.0,) * len(ids), injected=True)
            elif stopped or len(answer.ids) >= pending.limit:
                return answer.completion(stopped)

    def _body(self, prompt: list[int], room: int, seed: int, sampling: Sampling) -> dict[str, Any]:
        filters = (("top_k", sampling.top_k), ("min_p", sampling.min_p), ("stop", list(sampling.stop_strings)))
        return {"model": self.engine.model, "prompt": prompt, "max_tokens": room, "seed": seed, "logprobs": 1,
                "temperature": sampling.temperature, "top_p": sampling.top_p,
                "stop_token_ids": list(sampling.stop_ids), "ignore_eos": True, "include_stop_str_in_output": True,
                "skip_special_tokens": False, "return_tokens_as_token_ids": True, "return_token_ids": True,
                } | {k: v for k, v in filters if v}

    def _meaning(self, said: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
        """-> the model's log-probs, and those the tokens were drawn with."""
        unknown = np.full(len(said), np.nan, np.float32)
        if sampling.unchanged:
            return said, said
        logprobs, behaviour = (unknown, said) if self.processed else (said, unknown)
        return logprobs, np.zeros(len(said), np.float32) if sampling.greedy else behaviour


class _Answer:
    """What is written so far."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._logprobs, self._behaviour, self._injected = [], [], []

    def put_in(self, ids: Sequence[int], behaviour: Sequence[float], *, injected: bool) -> None:
        self.sampled(list(ids), np.full(len(ids), np.nan, np.float32), np.asarray(behaviour, np.float32), injected)

    def sampled(self, ids: list[int], logprobs: np.ndarray, behaviour: np.ndarray, injected: bool = False) -> None:
        self.ids += ids
        self._logprobs.append(logprobs)
        self._behaviour.append(behaviour)
        self._injected.append(np.full(len(ids), injected))

    def completion(self, stopped: bool) -> Completion:
        return Completion(
            ids=np.array(self.ids, np.int32), logprobs=np.concatenate(self._logprobs),
            behaviour=np.concatenate(self._behaviour), injected=np.concatenate(self._injected),
            finish="stop" if stopped else "length")


def parse(reply: Any) -> tuple[list[int], np.ndarray, bool]:
    """A completion -> ids, log-probs float32 [n] (NaN where it names none), and whether it was stopped.

    Raises ValueError for a reply without ids, OSError for one that was broken off.
    """
    try:
        choice = reply["choices"][0]
        said = choice.get("logprobs") or {}
        finish, tokens, ids = choice["finish_reason"], said.get("tokens") or [], choice.get("token_ids")
        if ids is None and all(t.startswith(TOKEN_ID) for t in tokens) and (tokens or not choice.get("text")):
            ids = [int(t.removeprefix(TOKEN_ID)) for t in tokens]
        values = [np.nan if x is None else float(x) for x in said.get("token_logprobs") or []]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise ValueError(f"not a completion: {json.dumps(reply)[:200]}") from None
    if finish not in ("stop", "length"):
        raise OSError(f"the server broke off an answer ({finish!r})")
    if ids is None:
        raise ValueError("the server answers without token ids (asked for by return_tokens_as_token_ids and "
                         "return_token_ids); vLLM gives them. For text alone use rollout.engine.engine_traces")
    logprobs = np.array(values or [np.nan] * len(ids), np.float32)
    if len(logprobs) != len(ids):
        raise ValueError(f"the server gave {len(ids)} token ids and {len(logprobs)} log-probs")
    return [int(i) for i in ids], logprobs, finish == "stop"
