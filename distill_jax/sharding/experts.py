"""Expert parallelism: who computes which expert for which tokens, and what is sent for it.

Every device keeps its experts' matrices (cut over `expert` and never gathered over it) and its own rows. Within the
expert axis the tokens are gathered, each device adds up what its experts say of all of them, and the sums are
scattered back. For N tokens of width D on each of X devices that receives 2 (X-1) N D values a device and layer; an
all-to-all of copies receives 2 k N D (X-1)/X for k experts a token, which is more where X < k and needs either a
capacity (tokens dropped) or buffers for the worst case. This way nothing is dropped, whatever the router says.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from distill_jax.sharding.rules import active_rules, axes_of, entries, fit_spec

Array = Any
P = PartitionSpec
INNER = {"gate": 2, "up": 2, "down": 1}
"""The dimension of a kernel that is the experts' inner size F; the other one is the model's width D."""

Local = Callable[[Array, Array, Array, Mapping[str, Array], Array], Array]


def map_experts(local: Local, x: Array, ids: Array, shares: Array, kernels: Mapping[str, Array]) -> Array:
    """`local(x [N,D], ids [N,k], shares [N,k], kernels, first) -> [N,D]` over the mesh of `jax.set_mesh`.

    x [B,T,D], ids i32 [B,T,k], shares [B,T,k] -> [B,T,D]. kernels {"gate": [E,D,F], ...}, one layer's. `local` adds
    up the experts `first` to `first + kernels' leading dimension`, and nothing for other ids. The layout is that of the
    rules: activation "hidden", parameters layers/moe/<name>/kernel. Without a mesh `local` is called once.
    """
    flat = lambda a: a.reshape(-1, a.shape[-1])
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {a: n for a, n, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types) if kind == AxisType.Auto}
    if all(n == 1 for n in sizes.values()):
        return local(flat(x), flat(ids), flat(shares), kernels, 0).reshape(x.shape)
    rows = P(*entries(fit_spec(active_rules().activation_spec("hidden"), x.shape, sizes), 2), None)
    cut = {axis for entry in rows for axis in axes_of(entry)}  # axes that x is cut over
    specs = {name: _kernel_spec(name, k.shape, sizes, cut) for name, k in kernels.items()}
    owners = axes_of(next(iter(specs.values()))[0])  # axes the experts are cut over
    partial = {a for name, spec in specs.items() for a in axes_of(spec[INNER[name]])} - cut

    def one(x: Array, ids: Array, shares: Array, kernels: Mapping[str, Array]) -> Array:
        kernels = {name: _gather_inside(k, specs[name], cut) for name, k in kernels.items()}
        first = jax.lax.axis_index(owners) * next(iter(kernels.values())).shape[0] if owners else 0
        shared = tuple(a for a in owners if a in cut)
        if shared:
            x, ids, shares = (jax.lax.all_gather(a, shared, axis=0, tiled=True) for a in (x, ids, shares))
        shape, missing = x.shape, tuple(sorted((partial | set(owners)) - set(shared)))
        if missing:  # sums of cotangents are then taken over [N,D], not over the copies of every token
            x, shares = (jax.lax.pcast(a, missing, to="varying") for a in (x, shares))
        y = local(flat(x), flat(ids), flat(shares), kernels, first).reshape(shape)
        if shared:
            y = jax.lax.psum_scatter(y, shared, scatter_dimension=0, tiled=True)
        return jax.lax.psum(y, missing) if missing else y

    return jax.shard_map(one, in_specs=(rows, rows, rows, specs), out_specs=rows, axis_names=set(sizes))(
        x, ids, shares, dict(kernels))


def _kernel_spec(name: str, shape: tuple[int, ...], sizes: Mapping[str, int], cut: set[str]) -> PartitionSpec:
    """Of one layer's kernel [E,in,out] inside: the inner dimension F may be a part; D is whole or gathered inside."""
    rule = P(*tuple(active_rules().param_spec(f"layers/moe/{name}/kernel"))[1:])
    spec = entries(fit_spec(rule, shape, sizes), 3)
    width = 3 - INNER[name]
    if set(axes_of(spec[width])) - cut:  # rows that their axes do not divide: the compiler gathers
        spec[width] = None
    return P(*spec)


def _gather_inside(kernel: Array, spec: PartitionSpec, cut: set[str]) -> Array:
    """The kernel whole along the axes that cut rows (FSDP): its gradient is reduce-scattered there."""
    for dim, entry in enumerate(tuple(spec)):
        axes = tuple(a for a in axes_of(entry) if a in cut)
        if dim and axes:
            kernel = jax.lax.all_gather(kernel, axes, axis=dim, tiled=True)
    return kernel
