"""Stages of the reinforcement recipes: Knights and Knaves of the generated world, and the report on held-out ones."""

from collections.abc import Mapping
from typing import Any

from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.eval import report as reports
from distill_jax.eval.tasks.puzzles import Puzzles
from distill_jax.jobs.context import RunContext
from distill_jax.jobs.evaluate import Asking, evaluate
from distill_jax.jobs.write_store import write_store
from distill_jax.traces.world.generate import WorldSpec, traces
from distill_jax.traces.world.tokenizer import build_tokenizer

NAMES = 8
"""People that occur. Puzzles are told apart up to renaming, so evaluation puzzles differ by what is said."""


def make_puzzles(context: RunContext, *, k: int, warmup: int, questions: int, lesson: int = 0) -> dict[str, int]:
    """The tokenizer, the stores `lesson` (two people) and `warmup` (k people) with the oracle's extended thinking, and
    `questions` for RL; k people."""
    folder = context.folder
    build_tokenizer(folder / "tokenizer", "compact")
    tok = load_tokenizer(folder / "tokenizer")
    of = lambda people, salt: WorldSpec(kind="knights", k=people, style="extended", names=NAMES,
                                        seed=context.seed * 1000 + salt)
    made = {name: len(write_store(str(folder / name), traces(of(people, salt), n), tok)) for name, people, salt, n in (
        ("lesson", 2, 10, lesson), ("warmup", k, 11, warmup), ("questions", k, 12, questions)) if n}
    context.say(f"[{folder.name}] rows: " + ", ".join(f"{name} {n}" for name, n in made.items()))
    return made


def report(context: RunContext, *, students: Mapping[str, str], k: int, questions: int = 500,
           max_new_tokens: int = 56) -> dict[str, Any]:
    """Held-out puzzles of the same size, answered greedily by `students` {name: MODEL}, of which the first is the base.
    """
    task = Puzzles(k=(k,), questions=questions, seed=context.seed, names=NAMES)
    first, *others = students
    where = {name: context.resolve(model) for name, model in students.items()}
    value = evaluate(where, task, context.recipe.folder / "report", Asking(max_new_tokens=max_new_tokens,
                                                                           batch_size=512),
                     reports.Plan(title=f"Knights and Knaves, {k} people", compare=(first, others[-1])),
                     say=context.say)
    return {"mean_accuracy": {n: v["mean_accuracy"] for n, v in value["students"].items()}}
