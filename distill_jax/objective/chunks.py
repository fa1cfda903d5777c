"""The loop under `lift`: row losses of many tokens, one chunk of logits at a time, gradients included.

Here the loop over tokens; the one over the vocabulary is `objective.blocks`.

Shapes: B rows, T tokens, N = local B*T, n tokens of a chunk, D width, V vocabulary.

Why it looks as it does:
- Only tokens that some term weighs are visited: their indices are put first, and the loop runs ceil(count / n) times.
  Prompts, padding and unsupervised roles cost nothing. (The trip count is dynamic: nobody differentiates this loop.)
- Gradients are made beside the values, so logits are computed once and never stored: three products of size n*V*D.
  The gradient of the logits is cast to the compute dtype before its two products; the head's gradient is summed in
  float32.
- Under a mesh everything runs inside `shard_map`: automatic sharding would put an all-reduce of the whole head
  gradient into every turn of the loop. Here it is reduced once, after it.
- Where the losses allow it (`losses.rows.vocabulary.reads`), the axis `tensor` cuts the vocabulary: a device keeps its
  rows of the head, and inside the loop only numbers per token and the gradient of a chunk's hidden states are summed.
  Else `tensor` cuts the tokens like every other axis, and the head is gathered.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax.core.head import Head, wide
from distill_jax.core.platform import platform
from distill_jax.losses.rows.vocabulary import Part, cut, first_id, may_be_cut, needs_whole
from distill_jax.objective.blocks import Blocks
from distill_jax.objective.memory import BUDGET, GROUP, Loop, chunk_size, lift_bytes
from distill_jax.objective.rows import Fields, Grads, Result, RowTerm, Wanted, kind_of, target_of, through_head
from distill_jax.sharding import fit_spec
from distill_jax.sharding.mesh import ROW_AXES

Array = Any


def run(terms: Mapping[str, RowTerm], hiddens: dict[str, Array], heads: dict[str, Head], fields: Fields,
        wanted: Mapping[str, Wanted], *, mesh: Mesh | None, chunk: int, loop: Loop = "tokens") -> Result:
    """Evaluate all terms (and the wanted gradients) over one global [B,T]; `chunk` is tokens per device and turn."""
    dynamic = {name: dict(t.dynamic) for name, t in terms.items()}
    kinds = {name: kind_of(t.target, hiddens, fields) for name, t in terms.items()}
    part = cut_of(mesh, terms, kinds, heads)
    loop = chosen_loop(loop, terms, kinds, hiddens, heads, wanted, mesh=mesh, part=part, chunk=chunk)
    static = {name: replace(t, dynamic={}) for name, t in terms.items()}
    rows_too = loop == "tokens" or part is not None
    kernels = {s: PartitionSpec() if mesh is None else kernel_spec(mesh, h.kernel.shape, rows=rows_too)
               for s, h in heads.items()}
    local = _Local(static, dict(wanted), chunk * (part.parts if part else 1), mesh, kernels, part, loop)
    if mesh is None:
        return local(hiddens, heads, fields, dynamic)
    rows = tuple(a for a in mesh.axis_names if a in ROW_AXES)
    columns = tuple(a for a in mesh.axis_names if a not in ROW_AXES and not (part and a == part.axis))
    by_token = PartitionSpec(rows or None, columns or None)
    B, T = fields.tokens.shape
    hiddens, fields = _pad((hiddens, fields), -B % _size(mesh, rows), -T % _size(mesh, columns))
    fields = by_row(fields, mesh)  # else the cut by `columns` spreads to the shifts before it, and they send
    everywhere = PartitionSpec()
    by_id = PartitionSpec(part.axis) if part else everywhere
    out_grads = {s: Grads(hidden=by_token if w.hidden else None,
                          kernel=kernels[s] if w.kernel else None,
                          bias=by_id if w.bias else None) for s, w in wanted.items()}
    head_specs = {s: replace(h, kernel=kernels[s], bias=None if h.bias is None else by_id) for s, h in heads.items()}
    out = jax.shard_map(
        local, mesh=mesh, check_vma=False, in_specs=(by_token, head_specs, by_token, everywhere),
        out_specs=Result(total=everywhere, values=dict.fromkeys(terms, by_token), grads=out_grads),
    )(hiddens, heads, fields, dynamic)
    cut_off = lambda x: x if x is None else x[:B, :T]
    return Result(out.total, {n: cut_off(v) for n, v in by_row(out.values, mesh).items()},
                  {s: g._replace(hidden=cut_off(g.hidden)) for s, g in out.grads.items()})


def by_row(tree: Any, mesh: Mesh) -> Any:
    """Arrays [B,T,...] in the layout that batches come in: rows over their axes, tokens over `context`."""
    spec = PartitionSpec(ROW_AXES, "context")
    one = lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fit_spec(spec, x.shape, mesh.shape)))
    return jax.tree.map(one, tree)


def cut_of(mesh: Mesh | None, terms: Mapping[str, RowTerm], kinds: Mapping[str, type], heads: Mapping[str, Head]
           ) -> Part | None:
    """How the vocabulary is cut over `tensor`: where all heads have one V that it divides, and every loss holds for cut
    logits. Else None: the head is gathered, and `tensor` cuts tokens like the other axes."""
    parts = 1 if mesh is None else mesh.shape.get("tensor", 1)
    sizes = {h.vocab for h in heads.values()}
    if parts == 1 or len(sizes) > 1 or any(v % parts for v in sizes):
        return None
    return Part("tensor", parts) if all(may_be_cut(t.loss, kinds[n]) for n, t in terms.items()) else None


def chosen_loop(loop: Loop, terms: Mapping[str, RowTerm], kinds: Mapping[str, type], hiddens: Mapping[str, Array],
                heads: Mapping[str, Head], wanted: Mapping[str, Wanted], *, mesh: Mesh | None, part: Part | None,
                chunk: int) -> Loop:
    """The loop over tokens or over the vocabulary, as `memory.Loop` says. Raises ValueError where it cannot be had."""
    if loop not in get_args(Loop):
        raise ValueError(f"the lifted loss loops over one of {list(get_args(Loop))}, got {loop!r}")
    whole = sorted(n for n, t in terms.items() if needs_whole(t.loss, kinds[n], {**t.kwargs, **t.dynamic}))
    if loop == "vocabulary" and whole:
        raise ValueError(f"the loop over the vocabulary needs losses that read a topk, sampled or token signal or the "
                         f"tokens, without a temperature; terms {whole} read the whole distribution: use 'auto'")
    if loop != "auto" or whole:
        return "vocabulary" if loop == "vocabulary" else "tokens"
    parts = part.parts if part else 1
    devices, shards = (mesh.size, mesh.shape.get("fsdp", 1)) if mesh is not None else (1, 1)
    held: dict[Loop, int] = {way: max(
        lift_bytes(tokens=-(-h.shape[0] * h.shape[1] * parts // devices), vocab=heads[s].vocab, width=h.shape[-1],
                   chunk=chunk, itemsize=h.dtype.itemsize, trainable=bool(wanted.get(s)), loop=way, parts=parts,
                   shards=shards) for s, h in hiddens.items()) for way in ("tokens", "vocabulary")}
    return "vocabulary" if held["vocabulary"] < held["tokens"] > BUDGET else "tokens"


def kernel_spec(mesh: Mesh, shape: tuple[int, ...], rows: bool = True) -> PartitionSpec:
    """Where a head's kernel [V,D] lies before and its gradient after: as the sharding table keeps the parameter.

    What a device has not (its width; its rows too, unless the vocabulary is cut) is gathered once before the loop in
    the compute dtype, and its gradient reduce-scattered once after it; both explicit, so that no partitioner decides to
    do either in float32 or inside the loop. rows=False: every device has all rows.
    """
    fits = lambda axis, size: axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None
    return PartitionSpec(fits("tensor", shape[0]) if rows else None, fits("fsdp", shape[1]))


def _scattered(grad: Array, axis: str, dim: int) -> Array:
    """Sum over a mesh axis, cut along `dim`. The TPU compiler scatters what lies apart in memory only: a cut of rows in
    narrow parts would be an all-reduce of everything, twice the bytes, and a cut after it."""
    if dim == 0 or platform() != "tpu":
        return jax.lax.psum_scatter(grad, axis, scatter_dimension=dim, tiled=True)
    parts = grad.reshape(*grad.shape[:dim], jax.lax.axis_size(axis), -1, *grad.shape[dim + 1:])
    return jax.lax.psum_scatter(jnp.moveaxis(parts, dim, 0), axis, scatter_dimension=0)


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
    part: Part | None  # how the vocabulary is cut: the devices of this axis have the same tokens
    loop: Loop

    def __call__(self, hiddens: dict[str, Array], heads: dict[str, Head], fields: Fields,
                 dynamic: dict[str, dict[str, Array]]) -> Result:
        shape = fields.tokens.shape
        by_blocks = self.loop == "vocabulary"
        if not by_blocks:
            heads = {s: replace(h, kernel=self._gather(s, h.kernel.astype(hiddens[s].dtype)))
                     for s, h in heads.items()}
        flat_hiddens, flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (hiddens, fields))
        count = flat.tokens.shape[0]
        n = chunk_size(count, max(self.chunk, GROUP) if by_blocks else self.chunk)
        blocks = Blocks(self.wanted, self.part, self.chunk, self._gather, self._scatter)
        order = jnp.nonzero(flat.active, size=count + -count % n, fill_value=count)[0].astype(jnp.int32)
        turns = (jnp.sum(flat.active, dtype=jnp.int32) + (n - 1)) // n
        if self.mesh is not None and (self.part or by_blocks):  # devices meet inside the loop
            turns = jax.lax.pmax(turns, self.mesh.axis_names)

        def turn(i: Array, carry: Result) -> Result:
            at = jax.lax.dynamic_slice(order, (i * n,), (n,))  # `count` beyond the active tokens: reads 0, drops
            take = lambda x: x.at[at].get(mode="fill", fill_value=0)
            given = jax.tree.map(take, flat_hiddens), heads, jax.tree.map(take, flat), dynamic
            part = blocks(self.terms, *given, carry.grads) if by_blocks else self._chunk(*given)
            put = lambda acc, x: None if acc is None else acc.at[at].set(x.astype(acc.dtype), mode="drop")
            add = lambda acc, x: None if acc is None else x if by_blocks else acc + x.astype(acc.dtype)
            grads = {s: Grads(put(g.hidden, part.grads[s].hidden), add(g.kernel, part.grads[s].kernel),
                              add(g.bias, part.grads[s].bias)) for s, g in carry.grads.items()}
            values = {t: put(v, part.values[t]) for t, v in carry.values.items()}
            return Result(carry.total + part.total, values, grads)

        none = self._zeros(flat_hiddens, heads, count)  # a single turn needs no sums: its gradients are the gradients
        out = turn(jnp.int32(0), none) if n >= count else jax.lax.fori_loop(0, turns, turn, none)
        unflat = lambda x: x if x is None else x.reshape(*shape, *x.shape[1:])
        return Result(self._sum(out.total), {t: unflat(v) for t, v in out.values.items()}, {
            s: Grads(unflat(g.hidden), self._sum_kernel(s, g.kernel), self._sum(g.bias)) for s, g in out.grads.items()})

    def _sum(self, x: Array | None) -> Array | None:
        """Over all devices that have other tokens."""
        return x if x is None or self.mesh is None else jax.lax.psum(x, self._others(PartitionSpec()))

    def _others(self, spec: PartitionSpec) -> tuple[str, ...]:
        own = {*spec, self.part.axis if self.part else None}
        assert self.mesh is not None
        return tuple(a for a in self.mesh.axis_names if a not in own)

    def _cut_dims(self, source: str) -> list[tuple[int, str]]:
        """(dimension, axis) of a kernel that is gathered for its products."""
        spec = self.kernels[source]
        return [(d, a) for d, a in enumerate(spec) if a is not None and not (self.part and a == self.part.axis)]

    def _gather(self, source: str, kernel: Array) -> Array:
        for dim, axis in self._cut_dims(source):
            kernel = jax.lax.all_gather(kernel, axis, axis=dim, tiled=True)
        return kernel

    def _scatter(self, source: str, grad: Array) -> Array:
        for dim, axis in self._cut_dims(source):
            grad = _scattered(grad, axis, dim)
        return grad

    def _sum_kernel(self, source: str, grad: Array | None) -> Array | None:
        if grad is None or self.mesh is None:
            return grad
        grad = grad if self.loop == "vocabulary" else self._scatter(source, grad)
        return jax.lax.psum(grad, self._others(self.kernels[source]))

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
        first = {s: first_id(raw.shape[-1], self.part) for s, raw in raws.items()}

        def weighted(raws: dict[str, Array], biases: dict[str, Array | None]) -> tuple[Array, dict[str, Array]]:
            logits = {s: replace(heads[s], bias=biases[s]).finish(raw, first[s]) for s, raw in raws.items()}
            total, values = jnp.zeros((), wide(*hiddens.values())), {}
            for name, term in self.terms.items():
                target = target_of(term.target, logits, fields, hiddens[term.source].dtype)
                values[name] = term.loss(logits[term.source], target, **term.kwargs, **dynamic[name])
                total += jnp.sum(fields.weights[name].astype(total.dtype) * values[name].astype(total.dtype))
            return total, values

        moving = {s for s, w in self.wanted.items() if w and s in raws}
        still = {s: raw for s, raw in raws.items() if s not in moving}
        biases = {s: heads[s].bias for s in raws}
        with cut(self.part):
            if not moving:
                total, values = weighted(raws, biases)
                return Result(total, values, {})
            total, back, values = jax.vjp(
                lambda r, b: weighted(r | still, biases | b),
                {s: raws[s] for s in moving}, {s: biases[s] for s in moving}, has_aux=True)
            d_raws, d_biases = back(jnp.ones_like(total))
        grads = {s: through_head(d_raws[s], d_biases[s], hiddens[s], heads[s], self.wanted[s], self.part)
                 for s in moving}
        return Result(total, values, grads)
