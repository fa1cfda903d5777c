"""Items of the generated world. Each question keeps its facts and its distractors' order at every position."""

from collections.abc import Iterator
from dataclasses import replace

from distill_jax.eval.records import Item, Kind
from distill_jax.eval.tasks.positions import spaced
from distill_jax.traces.trace import Trace
from distill_jax.traces.world import facts
from distill_jax.traces.world.generate import WorldSpec, trace


def world_items(spec: WorldSpec, questions: int, positions: int, kind: Kind = "qa") -> Iterator[Item]:
    """`questions` questions of the spec, each at up to `positions` positions of the gold document (0: all)."""
    if questions < 1:
        raise ValueError(f"a task needs at least one question, got {questions}")
    if spec.kind not in facts.BUILDERS or spec.shown != "all":
        places: list[int | None] = [spec.position]
    else:
        hops = 2 if spec.kind == "two_hop" else 1
        places = list(spaced(facts.positions(spec.k, hops, spec.layout), positions))
    for i in range(questions):
        for p in places:
            yield _item(trace(replace(spec, position=p), i), kind, p)


def _item(t: Trace, kind: Kind, position: int | None) -> Item:
    m = t.meta
    axes = {"k": m["k"], "setting": m["shown"]} | ({} if position is None else {"position": position})
    axes |= {a: m[a] for a in ("layout", "rule", "gold_length") if a in m and m["shown"] == "all"}
    assert t.gold is not None
    where = "" if position is None else f"@{position}"
    name = f"{m['kind']}-{m['rendering']}-s{m['seed']}-k{m['k']}-{m['index']}-{m['shown']}-{m.get('layout', '')}{where}"
    return Item(id=name, group=t.group, question=t.question, golds=(t.gold,), axes=axes, kind=kind)
