"""Use a trained student without distill_jax: restore its Orbax checkpoint onto any mesh and run it.

    python examples/downstream.py runs/kd --mesh 2x4 --tokens 9707,11,1879 --steps 8

Only jax, orbax and flax are imported. Copy this file: it is the whole forward pass of Qwen2, Qwen3 and Llama students
(plain rotary embedding, no windows). Parameters are a plain tree; those of the layers carry a leading layer dimension.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# name of a parameter's module -> how its last two dimensions lie on the mesh axes (data, model)
SPECS = {"embedding": P("model", "data"), "lm_head": P("model", "data"), "o": P("model", "data"),
         "down": P("model", "data"), "q": P("data", "model"), "k": P("data", "model"), "v": P("data", "model"),
         "gate": P("data", "model"), "up": P("data", "model")}


def sharding(mesh: Mesh, path: tuple, shape: tuple[int, ...]) -> NamedSharding:
    """Matrices over both axes where the axes divide them, everything else replicated."""
    names = [k.key for k in path]
    spec = next((SPECS[n] for n in names if n in SPECS), P()) if names[-1] in ("kernel", "embedding") else P()
    axes = (None,) * (len(shape) - len(spec)) + tuple(spec)
    return NamedSharding(mesh, P(*(a if a and n % mesh.shape[a] == 0 else None for a, n in zip(axes, shape))))


def restore(run: Path, mesh: Mesh, provider: str = "student") -> tuple[dict, dict]:
    """config.json and the newest parameters of a run, read straight into their place on `mesh`."""
    config = json.loads((run / "model" / "config.json").read_text())
    steps = [p for p in (run / "checkpoints").iterdir() if p.name.isdigit() and (p / "commit_success.txt").exists()]
    item = max(steps, key=lambda p: int(p.name)).absolute() / "params" / provider
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(item).item_metadata.tree
        target = jax.tree_util.tree_map_with_path(
            lambda path, m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=sharding(mesh, path, m.shape)), stored)
        return config, checkpointer.restore(item, target)


def norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    return nn.RMSNorm(epsilon=eps).apply({"params": {"scale": scale}}, x)


def dense(x: jax.Array, p: dict) -> jax.Array:
    return x @ p["kernel"] + p.get("bias", 0.0)


def rotate(x: jax.Array, theta: float) -> jax.Array:
    """Rotary embedding of x [B,T,H,d]: halves of d pair up."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] / theta ** (jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def forward(config: dict, params: dict, tokens: jax.Array) -> jax.Array:
    """tokens i32 [B,T] -> logits [B,T,V]."""
    rope = config["rope_parameters"]
    if rope["rope_type"] != "default" or config.get("use_sliding_window") or config["hidden_act"] != "silu":
        raise ValueError("this example has plain rotary embeddings, full attention and SiLU only")
    heads, eps, d = config["num_attention_heads"], config["rms_norm_eps"], config["head_dim"]

    def layer(x: jax.Array, p: dict) -> tuple[jax.Array, None]:
        a = p["attention"]
        y = norm(x, p["attention_norm"]["scale"], eps)
        q, k, v = (dense(y, a[n]).reshape(*x.shape[:2], -1, d) for n in ("q", "k", "v"))
        if "q_norm" in a:
            q, k = norm(q, a["q_norm"]["scale"], eps), norm(k, a["k_norm"]["scale"], eps)
        q, k = rotate(q, rope["rope_theta"]), rotate(k, rope["rope_theta"])
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + dense(y.reshape(*x.shape[:2], heads * d), a["o"])
        y = norm(x, p["mlp_norm"]["scale"], eps)
        return x + dense(nn.silu(dense(y, p["mlp"]["gate"])) * dense(y, p["mlp"]["up"]), p["mlp"]["down"]), None

    table = params["embed"]["embedding"]
    x, _ = jax.lax.scan(layer, table[tokens], params["layers"])
    head = table if config["tie_word_embeddings"] else params["lm_head"]["kernel"]
    return norm(x, params["final_norm"]["scale"], eps) @ head.T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--mesh", default="1x1", help="data x model")
    parser.add_argument("--tokens", default="1,2,3", help="prompt ids")
    parser.add_argument("--steps", type=int, default=8, help="ids to add greedily")
    args = parser.parse_args()
    shape = tuple(int(n) for n in args.mesh.split("x"))
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    config, params = restore(args.run, mesh)
    count = sum(x.size for x in jax.tree.leaves(params))
    print(f"{config['model_type']}, {count:,} parameters over {mesh.devices.size} devices")
    apply = jax.jit(partial(forward, config))
    prompt = [int(t) for t in args.tokens.split(",")]
    row = jnp.array([prompt + [0] * args.steps], jnp.int32)
    for i in range(len(prompt), row.shape[1]):  # causal: the zeros behind do not matter
        row = row.at[0, i].set(apply(params, row)[0, i - 1].argmax())
    print(row[0].tolist())


if __name__ == "__main__":
    main()
