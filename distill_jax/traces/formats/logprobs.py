"""Log-probs as other people's engines write them, brought to one form: what was said at each token of a row.

    vLLM                  {"prompt_token_ids": [...], "prompt_logprobs": [null, {"791": {"logprob": -0.1}}, ...]}, also
                          inside `choices[0]` (its servers), and with plain numbers for {"logprob": ...}
    SGLang                {"meta_info": {"input_token_logprobs": [[-0.1, 791, null], ...],
                          "input_top_logprobs": [null, [[-0.1, 791, null], ...], ...]}}
    OpenAI chat           choices[0].logprobs.content: [{"token", "bytes", "logprob", "top_logprobs": [...]}, ...]
    OpenAI completions    choices[0].logprobs: {"tokens", "token_logprobs", "top_logprobs": [{token: logprob}, ...]}
    tables                one row a trace: token ids [T], outcome ids [T,K] and log-probs [T,K] (Parquet or JSONL),
                          under the names of `COLUMNS`

An entry at index i speaks of token i given the ones before it: all of these write it so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Token = int | bytes
"""A token by its id, or by what it stands for."""

COLUMNS = {"tokens": ("token_ids", "input_ids", "tokens"),
           "ids": ("topk_ids", "top_ids", "top_token_ids", "outcome_ids"),
           "logprobs": ("topk_logprobs", "top_logprobs", "outcome_logprobs", "logprobs")}
ROW = ("row", "row_id")
_ID_PREFIX = "token_id:"  # vLLM's return_tokens_as_token_ids


@dataclass(frozen=True, kw_only=True)
class Said:
    """What an engine said of one row.

    tokens    the tokens it read or wrote, in order: all of the row's, or a stretch of them
    outcomes  for each of them {outcome: log-prob}, the token itself among them where the engine gives it; {} where it
              said nothing
    row       number of the store's row where the dump says so, else None: dumps are in the order of the rows
    """

    tokens: Sequence[Token]
    outcomes: Sequence[Mapping[Token, float]]
    row: int | None = None


def parse(row: Mapping[str, Any]) -> Said:
    """One row of a dump. Raises ValueError with the fields it has when none of the forms fits, or when tokens and
    log-probs differ in number."""
    number = next((int(row[name]) for name in ROW if row.get(name) is not None), None)
    choice = (row.get("choices") or [{}])[0]
    for reader, value in ((_sglang, row.get("meta_info")), (_vllm, {**row, **choice}), (_openai, choice),
                          (_openai, row), (_table, row)):
        found = reader(value) if isinstance(value, Mapping) else None
        if found is not None:
            tokens, outcomes = found
            if len(tokens) != len(outcomes):
                raise ValueError(f"{len(tokens)} tokens and log-probs for {len(outcomes)} of them")
            return Said(tokens=tokens, outcomes=outcomes, row=number)
    raise ValueError(f"none of the known forms of log-probs: the row has the fields {sorted(row)[:12]}; expected "
                     "vLLM's prompt_logprobs, SGLang's meta_info, OpenAI's choices[0].logprobs, or the columns "
                     f"{COLUMNS['tokens'][0]}, {COLUMNS['ids'][0]}, {COLUMNS['logprobs'][0]}")


def _number(value: Any) -> float:
    """JSON has no NaN: writers put null in its place."""
    return float("nan") if value is None else float(value)


Found = tuple[Sequence[Token], Sequence[Mapping[Any, float]]] | None


def _vllm(row: Mapping[str, Any]) -> Found:
    said, tokens = row.get("prompt_logprobs"), row.get("prompt_token_ids")
    if said is None or tokens is None:
        return None
    value = lambda x: _number(x["logprob"] if isinstance(x, Mapping) else x)
    return tokens, [{int(k): value(x) for k, x in (here or {}).items()} for here in said]


def _sglang(meta: Mapping[str, Any]) -> Found:
    own = meta.get("input_token_logprobs")
    if own is None:
        return None
    top = meta.get("input_top_logprobs") or [None] * len(own)
    outcomes = [{int(i): float(x) for x, i, *_ in [*(best or []), entry] if x is not None}
                for entry, best in zip(own, top)]
    return [int(i) for _, i, *_ in own], outcomes


def _openai(choice: Mapping[str, Any]) -> Found:
    said = choice.get("logprobs")
    if not isinstance(said, Mapping):
        return None
    if said.get("content") is not None:
        content = said["content"]
        outcomes = [{_chat_token(x): _number(x["logprob"]) for x in [*(entry.get("top_logprobs") or []), entry]}
                    for entry in content]
        return [_chat_token(entry) for entry in content], outcomes
    if said.get("tokens") is None or said.get("token_logprobs") is None:
        return None
    tokens = [_named(t) for t in said["tokens"]]
    top = said.get("top_logprobs") or [None] * len(tokens)
    return tokens, [{_named(t): _number(x) for t, x in (best or {}).items()} | ({} if own is None else {t: float(own)})
                    for t, own, best in zip(tokens, said["token_logprobs"], top)]


def _chat_token(entry: Mapping[str, Any]) -> Token:
    return bytes(entry["bytes"]) if entry.get("bytes") else _named(entry["token"])


def _named(token: str) -> Token:
    if token.startswith(_ID_PREFIX):
        return int(token.removeprefix(_ID_PREFIX))
    if token.startswith("bytes:"):  # how completions show a piece of a character: bytes:\xe4\xbd
        return token.removeprefix("bytes:").encode("latin-1").decode("unicode_escape").encode("latin-1")
    return token.encode("utf-8", "surrogatepass")


def _table(row: Mapping[str, Any]) -> Found:
    tokens, ids, logprobs = (next((row[n] for n in names if row.get(n) is not None), None)
                             for names in COLUMNS.values())
    if tokens is None or ids is None or logprobs is None:
        return None
    return [int(t) for t in tokens], [
        {int(i): float(x) for i, x in zip(a, b) if i >= 0} if a is not None and b is not None else {}
        for a, b in zip(ids, logprobs)]
