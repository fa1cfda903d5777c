"""The load of a mixture's experts: the loss that keeps routers even, and how uneven they are.

Switch (2101.03961, equations 4 to 6) in the form of transformers' `load_balancing_loss_func`: with f_e the copies
expert e got and p_e its mean probability, both a token and averaged over all layers,
    loss = balance * E * sum_e f_e p_e
which is balance * top_k for an even router. f is a constant, the gradient goes through p. Padding counts nowhere.
The statistics are those of all rows of a micro-batch on all devices (with micro_batches = 1 of the global batch);
micro-batches weigh as many tokens as they have.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.core.batch import Batch
from distill_jax.models.config import MoE
from distill_jax.models.moe import Routing
from distill_jax.train.sources import provider_of

Array = Any


def balance_loss(routing: Routing, moe: MoE) -> Array:
    """f32 [] of the statistics of one run of a model, without the factor `moe.balance`."""
    copies = jax.lax.stop_gradient(jnp.sum(routing.counts, axis=0))
    rows = jnp.maximum(jnp.sum(routing.tokens), 1.0)
    return moe.experts * jnp.sum(copies / rows * (jnp.sum(routing.probs, axis=0) / rows))


def balanced(routing: Mapping[str, Routing], models: Mapping[str, Any], trained: tuple[str, ...],
             totals: Mapping[str, Array]) -> tuple[Array, dict[str, dict[str, Array]]]:
    """What the routers of the trained providers add to the loss of these rows, and what is summed up for the metrics.

    routing {"provider/view": statistics of these rows}; totals {view: tokens of the whole global batch that are not
    padding}. -> (loss f32 [], {"provider/view": {"balance" f32 [], "counts" f32 [L,E]}}), which add up over
    micro-batches
    """
    loss, sums = jnp.float32(0), {}
    for source, said in routing.items():
        name, view = source.split("/")
        moe = models[name].config.moe
        share = said.tokens[0] / jnp.maximum(totals[view].astype(jnp.float32), 1.0)
        value = share * balance_loss(said, moe)
        if provider_of(source) in trained:
            loss += moe.balance * value
        sums[source] = jax.lax.stop_gradient({"balance": value, "counts": said.counts})
    return loss, sums


def real_tokens(batch: Batch) -> dict[str, Array]:
    """{view: i32 [] tokens that are not padding}."""
    return {view: jnp.sum(stream.segment_ids != 0) for view, stream in batch.views.items()}


def load(counts: Array) -> Array:
    """counts [L,E] -> f32 []: the busiest expert's copies over the mean, in the layer where that is largest. 1 is even,
    E / top_k all tokens to the same experts."""
    return jnp.max(jnp.max(counts, axis=-1) / jnp.maximum(jnp.mean(counts, axis=-1), 1e-9))
