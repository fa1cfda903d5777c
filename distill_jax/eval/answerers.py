"""Who answers: a model through the decoder, or a server that speaks the OpenAI chat protocol."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distill_jax.data.render import prompt_ids, split_completion
from distill_jax.data.tokenizer import Tokenizer
from distill_jax.decode import Completion, Generator, Sampling
from distill_jax.eval.records import OVER_LONG, Answer, Answerer
from distill_jax.rollout.engine import Engine, Refused, side_by_side

CLOSE = "</think>"
OPEN = "<think>"


@dataclass(frozen=True, kw_only=True)
class ModelAnswerer:
    """Answers with `decode.Generator`, the questions in the tokenizer's chat template.

    sampling  greedy unless said otherwise; its stop ids are the tokenizer's end tokens if it names none
    context   prompts that leave no room for `sampling.max_new_tokens` in it are not asked (None: the model's own)
    """

    generator: Generator
    tokenizer: Tokenizer
    sampling: Sampling
    context: int | None = None
    progress: Callable[[int], None] | None = None

    def __call__(self, questions: Sequence[str]) -> list[Answer]:
        prompts = [prompt_ids(q, self.tokenizer) for q in questions]
        room = self._context() - self.sampling.max_new_tokens
        asked = [i for i, p in enumerate(prompts) if len(p) <= room]
        rules = replace(self.sampling, stop_ids=self.sampling.stop_ids or tuple(self.tokenizer.eos_ids))
        start = time.perf_counter()
        done = self.generator.generate([prompts[i] for i in asked], rules, asked, progress=self.progress)
        seconds = (time.perf_counter() - start) / max(1, len(asked))
        out = [Answer(text="", problem=f"{OVER_LONG}: {len(p)} tokens leave no room for "
                                       f"{self.sampling.max_new_tokens} new ones in a context of {self._context()}")
               for p in prompts]
        for i, completion in zip(asked, done, strict=True):
            out[i] = self._answer(completion, seconds)
        return out

    def _context(self) -> int:
        return self.context or self.generator.model.config.context_length

    def _answer(self, completion: Completion, seconds: float) -> Answer:
        thinking, text, _ = split_completion(completion.ids, self.tokenizer)
        raw = self.tokenizer.decode(completion.ids)
        unended = CLOSE not in raw and bool(thinking or raw.lstrip().startswith(OPEN))
        return Answer(text=text, thinking=thinking, finished=not unended, seconds=seconds, tokens=len(completion.ids),
                      thinking_tokens=len(self.tokenizer.encode(thinking)[0]) if thinking else 0)


def model_answerer(model: Any, params: Any, tok: Tokenizer, *, max_new_tokens: int = 256, batch_size: int = 256,
                   context: int | None = None, progress: Callable[[int], None] | None = None) -> Answerer:
    """A greedy `ModelAnswerer` over parameters in memory. Raises ValueError for more `context` than the model's."""
    if context is not None and context > model.config.context_length:
        raise ValueError(f"--context {context:,} is more than the {model.config.context_length:,} tokens the model can "
                         "take; lower it, or leave it out")
    generator = Generator(model, params, batch_size=batch_size, token_bytes=tok.token_bytes)
    return ModelAnswerer(generator=generator, tokenizer=tok, sampling=Sampling(max_new_tokens=max_new_tokens),
                         context=context, progress=progress)


@dataclass(frozen=True, kw_only=True)
class UrlAnswerer:
    """Answers from an OpenAI-compatible server: `POST {url}/chat/completions`, greedy, several requests at a time.

    url       as far as `/v1`; model: the name the server knows
    api_key   sent as a bearer token when not empty
    retries   for refused connections and the statuses 429 and 5xx, with growing pauses
    Thinking is read from `reasoning_content` (or `reasoning`), or from `<think>` in the content. A request that fails
    for good is an answer with a problem, and one the server calls too long is marked so.
    """

    url: str
    model: str
    max_new_tokens: int = 4096
    api_key: str = ""
    parallel: int = 8
    timeout: float = 600.0
    retries: int = 4
    pause: float = 1.0

    def __call__(self, questions: Sequence[str]) -> list[Answer]:
        return side_by_side(self.engine, self._ask, questions)

    @property
    def engine(self) -> Engine:
        return Engine(url=self.url.rstrip("/"), model=self.model, api_key=self.api_key, parallel=self.parallel,
                      timeout=self.timeout, retries=self.retries, pause=self.pause)

    def _ask(self, question: str) -> Answer:
        start = time.perf_counter()
        try:
            reply = self.engine.request("chat/completions", {
                "model": self.model, "messages": [{"role": "user", "content": question}], "temperature": 0,
                "max_tokens": self.max_new_tokens})
            answer = parse_reply(reply)
        except (Refused, OSError, ValueError, LookupError, TypeError, AttributeError) as e:
            answer = Answer(text="", problem=_problem(e))
        return replace(answer, seconds=time.perf_counter() - start)


def parse_reply(reply: Any) -> Answer:
    """The answer in a chat completion."""
    choice = reply["choices"][0]
    message = choice["message"]
    content = message.get("content") or ""
    if isinstance(content, list):  # typed parts
        content = "".join(part["text"] for part in content if isinstance(part.get("text"), str))
    thinking = message.get("reasoning_content") or message.get("reasoning") or ""
    unended = bool(thinking) and not content.strip() and choice.get("finish_reason") == "length"
    if not thinking:
        head, closed, rest = content.partition(CLOSE)
        opened = head.lstrip().startswith(OPEN)
        if closed or opened:
            thinking = head.lstrip().removeprefix(OPEN).strip()
            content, unended = rest, not closed
    usage = reply.get("usage") or {}
    details = usage.get("completion_tokens_details") or {}
    tokens = int(usage.get("completion_tokens") or 0)
    counted = details.get("reasoning_tokens")
    share = len(thinking) / max(1, len(thinking) + len(content))  # where the server does not count it apart
    return Answer(text=content.strip(), thinking=thinking, finished=not unended, tokens=tokens,
                  thinking_tokens=int(counted) if counted else round(tokens * share))


def _problem(error: Exception) -> str:
    text = str(error)
    low = text.lower()
    if "context length" in low or "context_length" in low or "too long" in low or "maximum context" in low:
        return f"{OVER_LONG}: {text}"
    return f"server: {text}" if isinstance(error, Refused | OSError) else f"server: {type(error).__name__}: {text}"
