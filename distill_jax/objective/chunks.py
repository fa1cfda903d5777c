"""The loop under `lift`: row losses of many tokens, one chunk of logits at a time, gradients included.

Shapes: B rows, T tokens, N = local B*T, n tokens of a chunk, D width, V vocabulary.

Why it looks as it does:
- Only tokens that some term weighs are visited: their indices are put first, and the loop runs ceil(count / n) times.
  Prompts, padding and unsupervised roles cost nothing. (The trip count is dynamic: nobody differentiates this loop.)
- Gradients are made beside the values, so logits are computed once and never stored: three products of size n*V*D.
  The gradient of the logits is cast to the compute dtype before its two products; the head's gradient is summed in
  float32.
- Under a mesh everything runs inside `shard_map`: automatic sharding would put an all-reduce of the whole head
  gradient into every turn of the loop. Here it is reduced once, after it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax.core.batch import Sampled, Signal, TokenLogprob, TopK
from distill_jax.core.head import Head, wide
from distill_jax.losses.targets import Full, Known, Labels, SampledTarget, Target, TopKTarget
from distill_jax.losses.tokens.inputs import Tokens
from distill_jax.sharding import fit_spec
from distill_jax.sharding.mesh import ROW_AXES

Array = Any


@dataclass(frozen=True, kw_only=True)
class RowTerm:
    """A row loss and where its inputs come from.

    loss     fn(logits [N,V], target, **kwargs, **dynamic) -> [N]
    source   name of the source whose logits it reads, "student/main"
    target   "tokens", "signals/<name>", or the name of another source, whose logits are the teacher's (a signal of
             hidden states is such a source)
    kwargs   static keyword arguments of the loss
    dynamic  traced scalar keyword arguments (TAID's t); no gradient flows to them
    """

    loss: Callable[..., Array]
    source: str = "student/main"
    target: str = "tokens"
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic: Mapping[str, Array] = field(default_factory=dict)


class Fields(NamedTuple):
    """Per-token inputs [B,T,...], already shifted onto the hidden state that predicts them."""

    tokens: Array
    weights: dict[str, Array]
    active: Array  # bool: some term wants this token's value or gradient
    signals: dict[str, Signal | Tokens]


@jax.tree_util.register_static
@dataclass(frozen=True)
class Wanted:
    """Which gradients of a source are wanted (a frozen head under LoRA costs neither its product nor its memory)."""

    hidden: bool = False
    kernel: bool = False
    bias: bool = False

    def __bool__(self) -> bool:
        return self.hidden or self.kernel or self.bias


class Grads(NamedTuple):
    """Of one source: hidden [B,T,D] in its dtype, kernel float32 [V,D], bias float32 [V]; None = not wanted."""

    hidden: Array | None = None
    kernel: Array | None = None
    bias: Array | None = None


class Result(NamedTuple):
    """total: sum over terms and tokens of weight * loss; values: {term: loss [B,T]}, 0 where not active."""

    total: Array
    values: dict[str, Array]
    grads: dict[str, Grads]


def run(terms: Mapping[str, RowTerm], hiddens: dict[str, Array], heads: dict[str, Head], fields: Fields,
        wanted: Mapping[str, Wanted], *, mesh: Mesh | None, chunk: int) -> Result:
    """Evaluate all terms (and the wanted gradients) over one global [B,T]; `chunk` is tokens per device and turn."""
    dynamic = {name: dict(t.dynamic) for name, t in terms.items()}
    static = {name: replace(t, dynamic={}) for name, t in terms.items()}
    kernels = {s: PartitionSpec() if mesh is None else kernel_spec(mesh, h.kernel.shape) for s, h in heads.items()}
    local = _Local(static, dict(wanted), chunk, mesh, kernels)
    if mesh is None:
        return local(hiddens, heads, fields, dynamic)
    rows = tuple(a for a in mesh.axis_names if a in ROW_AXES)
    columns = tuple(a for a in mesh.axis_names if a not in ROW_AXES)
    by_token = PartitionSpec(rows or None, columns or None)
    B, T = fields.tokens.shape
    hiddens, fields = _pad((hiddens, fields), -B % _size(mesh, rows), -T % _size(mesh, columns))
    fields = by_row(fields, mesh)  # else the cut by `columns` spreads to the shifts before it, and they send
    out_grads = {s: Grads(hidden=by_token if w.hidden else None,
                          kernel=kernels[s] if w.kernel else None,
                          bias=PartitionSpec() if w.bias else None) for s, w in wanted.items()}
    everywhere = PartitionSpec()
    head_specs = {s: replace(h, kernel=kernels[s], bias=None if h.bias is None else everywhere)
                  for s, h in heads.items()}
    out = jax.shard_map(
        local, mesh=mesh, check_vma=False, in_specs=(by_token, head_specs, by_token, everywhere),
        out_specs=Result(total=everywhere, values=dict.fromkeys(terms, by_token), grads=out_grads),
    )(hiddens, heads, fields, dynamic)
    cut = lambda x: x if x is None else x[:B, :T]
    return Result(out.total, {n: cut(v) for n, v in by_row(out.values, mesh).items()},
                  {s: g._replace(hidden=cut(g.hidden)) for s, g in out.grads.items()})


def by_row(tree: Any, mesh: Mesh) -> Any:
    """Arrays [B,T,...] in the layout that batches come in: rows over their axes, tokens over `context`."""
    spec = PartitionSpec(ROW_AXES, "context")
    one = lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fit_spec(spec, x.shape, mesh.shape)))
    return jax.tree.map(one, tree)


def kernel_spec(mesh: Mesh, shape: tuple[int, ...]) -> PartitionSpec:
    """Where a head's kernel [V,D] lies before and its gradient after: as the sharding table keeps the parameter.

    Gathered once before the loop in the compute dtype, and reduce-scattered once after it; both explicit, so that no
    partitioner decides to do either in float32 or inside the loop.
    """
    fits = lambda axis, size: axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None
    return PartitionSpec(fits("tensor", shape[0]), fits("fsdp", shape[1]))


def _size(mesh: Mesh, axes: tuple[str, ...]) -> int:
    size = 1
    for axis in axes:
        size *= mesh.shape[axis]
    return size


def _pad(tree: Any, rows: int, columns: int) -> Any:
    """Zero (inactive) tokens so that [B,T] divides over the mesh; nothing is copied when it already does."""
    if not rows and not columns:
        return tree
    return jax.tree.map(lambda x: jnp.pad(x, [(0, rows), (0, columns)] + [(0, 0)] * (x.ndim - 2)), tree)


@dataclass(frozen=True)
class _Local:
    """The computation of one device over its share of the tokens; sums are reduced over `mesh` at the end."""

    terms: dict[str, RowTerm]
    wanted: dict[str, Wanted]
    chunk: int
    mesh: Mesh | None
    kernels: dict[str, PartitionSpec]  # where each head lies outside

    def __call__(self, hiddens: dict[str, Array], heads: dict[str, Head], fields: Fields,
                 dynamic: dict[str, dict[str, Array]]) -> Result:
        shape = fields.tokens.shape
        heads = {s: replace(h, kernel=self._gather(s, h.kernel.astype(hiddens[s].dtype))) for s, h in heads.items()}
        flat_hiddens, flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (hiddens, fields))
        count = flat.tokens.shape[0]
        n = chunk_size(count, self.chunk)
        order = jnp.nonzero(flat.active, size=count + -count % n, fill_value=count)[0].astype(jnp.int32)
        turns = (jnp.sum(flat.active, dtype=jnp.int32) + (n - 1)) // n

        def turn(i: Array, carry: Result) -> Result:
            at = jax.lax.dynamic_slice(order, (i * n,), (n,))  # `count` beyond the active tokens: reads 0, drops
            take = lambda x: x.at[at].get(mode="fill", fill_value=0)
            part = self._chunk(jax.tree.map(take, flat_hiddens), heads, jax.tree.map(take, flat), dynamic)
            put = lambda acc, x: None if acc is None else acc.at[at].set(x.astype(acc.dtype), mode="drop")
            add = lambda acc, x: None if acc is None else acc + x.astype(acc.dtype)
            grads = {s: Grads(put(g.hidden, part.grads[s].hidden), add(g.kernel, part.grads[s].kernel),
                              add(g.bias, part.grads[s].bias)) for s, g in carry.grads.items()}
            values = {t: put(v, part.values[t]) for t, v in carry.values.items()}
            return Result(carry.total + part.total, values, grads)

        out = jax.lax.fori_loop(0, turns, turn, self._zeros(flat_hiddens, heads, count))
        unflat = lambda x: x if x is None else x.reshape(*shape, *x.shape[1:])
        return Result(self._sum(out.total), {t: unflat(v) for t, v in out.values.items()}, {
            s: Grads(unflat(g.hidden), self._sum_kernel(s, g.kernel), self._sum(g.bias)) for s, g in out.grads.items()})

    def _sum(self, x: Array | None) -> Array | None:
        return x if x is None or self.mesh is None else jax.lax.psum(x, self.mesh.axis_names)

    def _gather(self, source: str, kernel: Array) -> Array:
        for dim, axis in enumerate(self.kernels[source]):
            kernel = kernel if axis is None else jax.lax.all_gather(kernel, axis, axis=dim, tiled=True)
        return kernel

    def _sum_kernel(self, source: str, grad: Array | None) -> Array | None:
        if grad is None or self.mesh is None:
            return grad
        spec = self.kernels[source]
        for dim, axis in enumerate(spec):
            if axis is not None:
                grad = jax.lax.psum_scatter(grad, axis, scatter_dimension=dim, tiled=True)
        return jax.lax.psum(grad, tuple(a for a in self.mesh.axis_names if a not in spec))

    def _zeros(self, hiddens: dict[str, Array], heads: dict[str, Head], count: int) -> Result:
        dtype = wide(*hiddens.values())
        zero = lambda wanted, shape, dtype=dtype: jnp.zeros(shape, dtype) if wanted else None
        return Result(jnp.zeros((), dtype), {t: jnp.zeros(count, dtype) for t in self.terms}, {
            s: Grads(zero(w.hidden, hiddens[s].shape, hiddens[s].dtype), zero(w.kernel, heads[s].kernel.shape),
                     zero(w.bias, heads[s].vocab)) for s, w in self.wanted.items()})

    def _chunk(self, hiddens: dict[str, Array], heads: dict[str, Head], fields: Fields,
               dynamic: dict[str, dict[str, Array]]) -> Result:
        """All terms on n tokens: each source's logits once, then every row loss on them."""
        used = {t.source for t in self.terms.values()} | {t.target for t in self.terms.values()}
        raws = {s: heads[s].project(h) for s, h in hiddens.items() if s in used}

        def weighted(raws: dict[str, Array], biases: dict[str, Array | None]) -> tuple[Array, dict[str, Array]]:
            logits = {s: replace(heads[s], bias=biases[s]).finish(raw) for s, raw in raws.items()}
            total, values = jnp.zeros((), wide(*hiddens.values())), {}
            for name, term in self.terms.items():
                target = _target(term.target, logits, fields, hiddens[term.source].dtype)
                values[name] = term.loss(logits[term.source], target, **term.kwargs, **dynamic[name])
                total += jnp.sum(fields.weights[name].astype(total.dtype) * values[name].astype(total.dtype))
            return total, values

        moving = {s for s, w in self.wanted.items() if w and s in raws}
        still = {s: raw for s, raw in raws.items() if s not in moving}
        biases = {s: heads[s].bias for s in raws}
        if not moving:
            total, values = weighted(raws, biases)
            return Result(total, values, {})
        total, back, values = jax.vjp(
            lambda r, b: weighted(r | still, biases | b),
            {s: raws[s] for s in moving}, {s: biases[s] for s in moving}, has_aux=True)
        d_raws, d_biases = back(jnp.ones_like(total))
        grads = {s: _through_head(d_raws[s], d_biases[s], hiddens[s], heads[s], self.wanted[s]) for s in moving}
        return Result(total, values, grads)


def _through_head(d_raw: Array, d_bias: Array | None, hidden: Array, head: Head, wanted: Wanted) -> Grads:
    """Gradients of `head.project(hidden)`: the cotangent in the compute dtype, sums in (at least) float32."""
    acc = d_raw.dtype
    d_raw = d_raw.astype(hidden.dtype)
    dot = lambda a, b, contract: jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=acc)
    return Grads(
        hidden=dot(d_raw, head.kernel, ((1,), (0,))) if wanted.hidden else None,
        kernel=dot(d_raw, hidden, ((0,), (0,))) if wanted.kernel else None,
        bias=d_bias.astype(acc) if wanted.bias and d_bias is not None else None)


def _target(name: str, logits: dict[str, Array], fields: Fields, compute_dtype: Any) -> Target:
    if name == "tokens":
        return Labels(fields.tokens)
    if name in logits:
        return Full(jax.lax.stop_gradient(logits[name]), fields.tokens)
    signal = fields.signals[name.removeprefix("signals/")]
    if isinstance(signal, Tokens):
        return Known(fields.tokens, signal)
    if isinstance(signal, TopK):
        return TopKTarget(signal.ids, signal.logprobs, compute_dtype, fields.tokens)
    if isinstance(signal, Sampled):
        return SampledTarget(signal.ids, signal.weights, compute_dtype)
    assert isinstance(signal, TokenLogprob)  # one known outcome, the rest is tail
    return TopKTarget(fields.tokens[:, None], signal.logprobs[:, None], compute_dtype, fields.tokens)


def chunk_size(count: int, chunk: int) -> int:
    """Tokens of a turn: at most `chunk` (rounded up to 8), turns of equal size so that the last is not mostly air."""
    turns = max(1, -(-count // max(8, chunk)))
    size = -(-count // turns)
    return max(1, min(size + -size % 8, count))
