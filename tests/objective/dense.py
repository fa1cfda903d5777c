"""The naive loss: dense logits, the same row losses, jax.grad. What the lifted one must equal."""

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.core.batch import Sampled, TokenLogprob, TopK
from distill_jax.core.head import Head
from distill_jax.losses.targets import Full, Labels, SampledTarget, TopKTarget


def dense_total(sources, terms, weights, *, tokens, signals=None):
    """sum over terms of weights * loss over logits of everything, token by token aligned by slicing."""
    logits = {s: head.logits(hidden)[:, :-1].reshape(-1, head.vocab) for s, (hidden, head) in sources.items()}
    next_ = lambda x: x[:, 1:].reshape(-1, *x.shape[2:])
    total = 0.0
    for name, term in terms.items():
        if term.target == "tokens":
            target = Labels(next_(tokens))
        elif term.target.startswith("signals/"):
            s = signals[term.target.removeprefix("signals/")]
            target = (TopKTarget(next_(s.ids), next_(s.logprobs), None, next_(tokens)) if isinstance(s, TopK)
                      else SampledTarget(next_(s.ids), next_(s.weights)) if isinstance(s, Sampled)
                      else TopKTarget(next_(tokens)[:, None], next_(s.logprobs)[:, None], None, next_(tokens)))
        else:
            target = Full(jax.lax.stop_gradient(logits[term.target]), next_(tokens))
        rows = term.loss(logits[term.source], target, **term.kwargs, **term.dynamic)
        total = total + jnp.sum(next_(weights[name]).astype(rows.dtype) * rows)
    return total


def random_head(rng, vocab, width, **kw):
    bias = rng.normal(size=vocab).astype(np.float32) if kw.pop("with_bias", False) else None
    kernel = jnp.asarray(rng.normal(size=(vocab, width)) / np.sqrt(width), jnp.float32)
    return Head(kernel=kernel, bias=None if bias is None else jnp.asarray(bias), **kw)


def random_topk(rng, shape, vocab, k, empty=0.3):
    """Kept outcomes of random distributions; some slots are padding."""
    z = rng.normal(size=(*shape, vocab)) * 2
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    ids = np.argsort(-logp, -1)[..., :k].astype(np.int32)
    logprobs = np.take_along_axis(logp, ids, -1).astype(np.float32)
    gone = rng.random(ids.shape) < empty
    mask = rng.random(shape) < 0.8
    return TopK(ids=jnp.asarray(np.where(gone, -1, ids)), logprobs=jnp.asarray(np.where(gone, -np.inf, logprobs)),
                mask=jnp.asarray(mask))


def random_sampled(rng, shape, vocab, draws):
    """Shares of `draws` draws from random distributions: unique ids, padded with -1."""
    counts = np.stack([rng.multinomial(draws, rng.dirichlet(np.full(vocab, 0.3))) for _ in range(np.prod(shape))])
    ids = np.argsort(-counts, -1, kind="stable")[:, :draws].astype(np.int32)
    weights = np.take_along_axis(counts, ids, -1).astype(np.float32) / draws
    shaped = lambda x: jnp.asarray(x.reshape(*shape, -1))
    return Sampled(ids=shaped(np.where(weights > 0, ids, -1)), weights=shaped(weights), mask=jnp.ones(shape, bool))


def random_token_signal(rng, shape):
    return TokenLogprob(logprobs=jnp.asarray(-rng.exponential(size=shape), jnp.float32), mask=jnp.ones(shape, bool))


def rel(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / max(1e-30, np.linalg.norm(b))


def arrays(jaxpr):
    """Shapes of every array in a jaxpr and in all jaxprs inside it (scan, while, shard_map, custom_vjp, ...)."""
    for eqn in jaxpr.eqns:
        for var in [*eqn.invars, *eqn.outvars]:
            yield eqn.primitive.name, getattr(var.aval, "shape", ())
        for param in eqn.params.values():
            for sub in jax.tree.leaves(param, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                inner = getattr(sub, "jaxpr", sub)
                if hasattr(inner, "eqns"):
                    yield from arrays(inner)


def big_arrays(fn, *args, size):
    return [(name, shape) for name, shape in arrays(jax.make_jaxpr(fn)(*args).jaxpr) if np.prod(shape) >= size]
