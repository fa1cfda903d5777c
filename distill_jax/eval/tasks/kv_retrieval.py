"""Key-value retrieval (arXiv:2307.03172): the value of one key in a JSON object of k pairs."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from distill_jax.eval.records import Item
from distill_jax.eval.tasks.positions import spaced
from distill_jax.eval.tasks.world import world_items
from distill_jax.traces.formats import read_rows
from distill_jax.traces.world.generate import WorldSpec
from distill_jax.traces.world.rich import kv_prompt


@dataclass(frozen=True, kw_only=True)
class KVRetrieval:
    """data: "" for generated pairs (UUIDs in `rich`), or a file of rows with ordered_kv_records, key, value.

    From a file, k pairs are kept: the first k - 1 others in their order, and the asked one at each position. An
    answer is right when it holds the value, whatever else it says (the paper's metric).
    """

    data: str = ""
    k: tuple[int, ...] = (8, 16)
    questions: int = 500
    positions: int = 5
    rendering: str = "compact"
    seed: int = 0

    @property
    def name(self) -> str:
        return "kv_retrieval"

    @property
    def unit(self) -> str:
        return "pairs"

    def items(self) -> list[Item]:
        if self.data:
            return list(_file_items(self))
        return [item for k in self.k for item in world_items(
            WorldSpec(kind="kv", k=k, rendering=self.rendering, split="eval", seed=self.seed),
            self.questions, self.positions, kind="contains")]


def _file_items(task: KVRetrieval) -> Iterator[Item]:
    for i, row in enumerate(read_rows(task.data)):
        if i == task.questions:
            return
        if not {"ordered_kv_records", "key", "value"} <= set(row):
            raise ValueError(f"{task.data} is no key-value file: rows have {sorted(row)}, "
                             f"expected {json.dumps(['ordered_kv_records', 'key', 'value'])}")
        others = [(a, b) for a, b in row["ordered_kv_records"] if a != row["key"]]
        for k in task.k:
            if len(others) < k - 1:
                raise ValueError(f"{task.data}, row {i} has {len(others) + 1} pairs, fewer than k={k}")
            for p in spaced(list(range(k)), task.positions):
                pairs = [*others[:p], (row["key"], row["value"]), *others[p:k - 1]]
                yield Item(id=f"{i}-{k}-{p}", group=str(i), question=kv_prompt(row["key"], pairs),
                           golds=(row["value"],), kind="contains", axes={"k": k, "position": p, "setting": "all"})
