"""Where a policy loss takes the gradient of sampled tokens away, under a checkpoint after their round."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core import spec
from distill_jax.core.roles import SUPERVISED, Role
from distill_jax.jobs.estimates import load_estimates
from distill_jax.loading import load
from distill_jax.losses.tokens.inputs import Tokens
from distill_jax.losses.tokens.policy import gspo, gspo_token, ppo_clip
from distill_jax.losses.tokens.ratios import BEHAVIOUR, Corrected
from distill_jax.objective.term import moves
from distill_jax.objective.tokens import TokenTerm
from distill_jax.recipe import Recipe, Stage
from distill_jax.rollout.scoring import SignalSpec, score_rows
from distill_jax.traces.store import Row, TokenRow, TraceStore
from distill_jax.traces.trace import Trace
from distill_jax.train.checkpoint import checkpoints_of, complete_steps

CLIPPING = (ppo_clip, gspo, gspo_token)


@dataclass(frozen=True, kw_only=True)
class Clipped:
    """rows and, for each, bool [T]: `trained` tokens of the policy term, and those of them it clips (`marks`).

    checkpoint  update of the checkpoint the ratios are taken under; rule: the loss and its bounds, in words
    """

    checkpoint: int
    rule: str
    rows: Sequence[Row]
    trained: Sequence[np.ndarray]
    marks: Sequence[np.ndarray]


def clipped(stage: Path, since: int, store: TraceStore, traces: Sequence[Trace], *, low: float | None = None,
            high: float | None = None) -> Clipped:
    """Tokens of the round of update `since` whose gradient the clip drops: their advantage is not 0, and the loss does
    not change with their log-prob. stage: the folder of the training stage.

    The loss is that of the recipe's policy term; with `low` or `high` (or where the recipe says nothing) PPO's, 0.2
    where one is not given. The checkpoint is the first after the round began; else the newest.
    """
    steps = complete_steps(checkpoints_of(stage))
    if not steps:
        raise ValueError(f"{stage} has no complete checkpoint yet, and ratios are taken under one; wait for the first")
    checkpoint = next((s for s in steps if s > since), steps[-1])
    term = policy_term(stage) if low is None and high is None else None
    if term is None:
        term = TokenTerm(ppo_clip, kwargs={"low": 0.2 if low is None else low, "high": 0.2 if high is None else high})
    if moving := sorted(k for k, v in term.kwargs.items() if moves(v)):
        raise ValueError(f"{moving} of the policy term in {stage} change from update to update: give --low and --high")
    model, params = load(stage, step=checkpoint)
    rows = [store.row(i) for i in range(len(store))]
    scored = score_rows(model, params, rows, SignalSpec.parse("token"))
    logprobs = [s.logprobs for s in scored if isinstance(s, TokenRow)]
    trained = [_trained(r, t, term.on) for r, t in zip(rows, traces)]
    fields = {"advantages": _advantages(stage, since, traces, rows), BEHAVIOUR: [_behaviour(t) for t in traces]}
    marks = _dropped(term, term.kwargs, logprobs, trained, fields)
    name = getattr(term.loss, "__name__", type(term.loss).__name__)
    settings = ", ".join(f"{k}={v}" for k, v in term.kwargs.items())
    return Clipped(checkpoint=checkpoint, rule=f"{name}({settings})", rows=rows, trained=trained, marks=marks)


def policy_term(stage: Path) -> TokenTerm | None:
    """The clipping term of weight above 0 of the recipe a stage's folder was made by; None: there is none to be found.
    """
    for folder in (stage, stage.parent):
        if not (folder / "recipe.yaml").is_file():
            continue
        recipe = spec.load((folder / "recipe.yaml").read_text(), str(folder / "recipe.yaml"))
        assert isinstance(recipe, Recipe)
        stages = [s for s in recipe.stages if isinstance(s, Stage)]
        of = next((s for s in stages if len(recipe.stages) == 1 or s.name == stage.name), None)
        for term in of.terms.values() if of else ():
            if isinstance(term, TokenTerm) and term.weight != 0 and _clips(term.loss):
                return term
    return None


def _clips(loss: Any) -> bool:
    return (loss.loss if isinstance(loss, Corrected) else loss) in CLIPPING


def _trained(row: Row, trace: Trace, on: Sequence[Role]) -> np.ndarray:
    out = np.isin(row.roles, [int(r) for r in on if r in SUPERVISED]) & (trace.scores["trained"] > 0)
    out[:1] = False
    return out


def _advantages(stage: Path, since: int, traces: Sequence[Trace], rows: Sequence[Row]) -> Sequence[np.ndarray]:
    """float32 [T] of each row: of its tokens where the round has estimates, else of the answer."""
    path = stage / "rollouts" / f"{since:07d}.npz"
    if path.is_file():
        return load_estimates(path)["advantages"]
    return [np.full(len(r.tokens), t.scores["advantage"], np.float32) for r, t in zip(rows, traces)]


def _behaviour(trace: Trace) -> np.ndarray:
    assert trace.encoded is not None and trace.encoded.logprobs is not None
    return np.asarray(trace.encoded.logprobs, np.float32)


def _dropped(term: TokenTerm, kwargs: Mapping[str, Any], logprobs: Sequence[np.ndarray], trained: Sequence[np.ndarray],
             fields: Mapping[str, Sequence[np.ndarray]]) -> list[np.ndarray]:
    """bool [T] of each row: trained, of an advantage that is not 0, and without a gradient."""
    width = max((len(m) for m in trained), default=1)

    def lines(of: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
        out = np.zeros((len(of), width), dtype)
        for b, x in enumerate(of):
            out[b, :len(x)] = x
        return out

    mask = lines(trained, bool)
    given = {name: lines(of, np.float32) for name, of in fields.items()}

    def total(now: Any) -> Any:
        tokens = Tokens(logprobs=now, entropies=jnp.zeros_like(now), mask=jnp.asarray(mask),
                        segment_ids=jnp.asarray(mask, jnp.int32), fields=given)
        return jnp.sum(term.loss(tokens, **kwargs))

    moved = np.asarray(jax.grad(total)(jnp.asarray(lines(logprobs, np.float32))))
    dropped = mask & (given["advantages"] != 0) & (moved == 0)
    return [dropped[b, :len(m)] for b, m in enumerate(trained)]
