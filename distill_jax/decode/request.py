"""What is asked of an engine and what it gives back, whoever stands behind it: `Generator`, or a server."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from distill_jax.decode.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Injection:
    """Tokens that the engine puts into an answer; the model goes on behind them. Each is used once, at most.

    ids    the tokens
    after  put in when the answer has so many tokens (a budget); None: in place of an end, behind the stop token or
           string that would have ended the answer
    """

    ids: tuple[int, ...]
    after: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(int(i) for i in self.ids))
        if not self.ids:
            raise ValueError("Injection.ids is empty; give the tokens to put in")
        if self.after is not None and self.after < 1:
            raise ValueError(f"Injection.after must be at least 1, got {self.after}; an answer that starts with given "
                             "tokens is Request.forced")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One answer to one prompt.

    prompt           i32 [P]; requests with equal prompts share its computation
    seed             any integer; prompt, seed and the rules decide the answer, whatever else is asked
    max_new_tokens   limit of this answer, forced and injected tokens included; None: that of the rules
    forced           the answer's first tokens, taken instead of sampled ones; they never end it
    forced_logprobs  what `Completion.behaviour` says of them, one a token; None: 0, they were certain
    injections       see `Injection`; those with `after` in ascending order
    """

    prompt: np.ndarray
    seed: int = 0
    max_new_tokens: int | None = None
    forced: tuple[int, ...] = ()
    forced_logprobs: tuple[float, ...] | None = None
    injections: tuple[Injection, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "forced", tuple(int(i) for i in self.forced))
        if self.forced_logprobs is not None and len(self.forced_logprobs) != len(self.forced):
            raise ValueError(f"Request.forced has {len(self.forced)} tokens, "
                             f"forced_logprobs {len(self.forced_logprobs)}: give one a token")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"Request.max_new_tokens must be at least 1, got {self.max_new_tokens}")
        budgets = [i.after for i in self.injections if i.after is not None]
        if budgets != sorted(set(budgets)):
            raise ValueError(f"Request.injections must have ascending `after`, got {budgets}")

    def limit(self, sampling: Sampling) -> int:
        return sampling.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What one prompt was answered with.

    ids        int32 [n], the stop token included
    logprobs   float32 [n] under the model itself (temperature 1, all tokens allowed): the trainer's numbers
    behaviour  float32 [n] under the rules the tokens were drawn with; 0 when greedy and for injected tokens, what the
               request says for forced ones. NaN, here and in `logprobs`, where a server does not say it
    finish     "stop": ended by a stop id or string; "length": cut at max_new_tokens
    injected   bool [n]: put in by the engine, not to be trained on
    """

    ids: np.ndarray
    logprobs: np.ndarray
    behaviour: np.ndarray
    finish: Literal["stop", "length"]
    injected: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    def __post_init__(self) -> None:
        if not len(self.injected):
            object.__setattr__(self, "injected", np.zeros(len(self.ids), bool))


class Completer(Protocol):
    """Who completes prompts: `decode.Generator` here, `rollout.completions.Completions` behind vLLM or SGLang."""

    def complete(self, requests: Sequence[Request], sampling: Sampling, *,
                 progress: Callable[[int], None] | None = None) -> list[Completion]:
        """One completion a request, in order. progress is called with the number of answers done so far.

        Raises ValueError for a request that cannot be answered, OSError when a server is gone.
        """
        ...


class Pending:
    """The injections a request has left, and where its answer has to pause for them."""

    def __init__(self, request: Request, sampling: Sampling) -> None:
        self.limit = request.limit(sampling)
        self._left = list(request.injections)

    def pause(self, count: int) -> int:
        """Number of tokens up to which the answer may run, once it has `count` (given ones that follow included)."""
        budgets = [i.after for i in self._left if i.after is not None and i.after >= count]
        return min([self.limit, *budgets])

    def take(self, count: int, stopped: bool) -> Injection | None:
        """The injection that is due in an answer of `count` tokens that stopped, or that reached its pause."""
        if count >= self.limit:
            return None
        for i, injection in enumerate(self._left):
            if stopped if injection.after is None else injection.after == count and not stopped:
                return self._left.pop(i)
        return None
