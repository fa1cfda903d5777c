"""Stages of the reinforcement recipes: Knights and Knaves of the generated world, and the report on held-out ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.decode import Generator, Sampling
from distill_jax.eval import report as reports
from distill_jax.eval.answerers import ModelAnswerer
from distill_jax.eval.records import Item, Records
from distill_jax.eval.run import run as ask
from distill_jax.eval.tasks.puzzles import Puzzles
from distill_jax.jobs.context import RunContext
from distill_jax.jobs.evaluate import Asking, evaluate
from distill_jax.jobs.write_store import write_store
from distill_jax.loading import load, local_folder, model_files
from distill_jax.traces.world.generate import WorldSpec, traces
from distill_jax.traces.world.thoughts import Style
from distill_jax.traces.world.tokenizer import build_tokenizer

NAMES = 8
"""People that occur. Puzzles are told apart up to renaming, so evaluation puzzles differ by what is said."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A task whose every question is asked `draws` times: for answers that are sampled."""

    task: Puzzles
    draws: int

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def unit(self) -> str:
        return self.task.unit

    def items(self) -> list[Item]:
        return self.task.items() * self.draws


def make_puzzles(context: RunContext, *, stores: Mapping[str, tuple[int, Style, int]]) -> dict[str, int]:
    """The tokenizer, and stores {name: (people, style of the oracle's thinking, puzzles)} of training puzzles."""
    folder = context.folder
    build_tokenizer(folder / "tokenizer", "compact")
    tok = load_tokenizer(folder / "tokenizer")
    made = {}
    for salt, (name, (people, style, n)) in enumerate(stores.items()):
        of = WorldSpec(kind="knights", k=people, style=style, names=NAMES, seed=context.seed * 1000 + 10 + salt)
        made[name] = len(write_store(str(folder / name), traces(of, n), tok))
    context.say(f"[{folder.name}] rows: " + ", ".join(f"{name} {n}" for name, n in made.items()))
    return made


def sampled(model: str, task: Puzzles, *, draws: int, max_new_tokens: int, temperature: float = 1.0) -> Records:
    """Answers of a MODEL to every question of the task, sampled `draws` times: the mean is pass@1."""
    tok = load_tokenizer(model_files(local_folder(model)))
    answerer = ModelAnswerer(
        generator=Generator(*load(model), batch_size=512, token_bytes=tok.token_bytes), tokenizer=tok,
        sampling=Sampling(temperature=temperature, max_new_tokens=max_new_tokens))
    drawn = Drawn(task=task, draws=draws)  # one chunk: the seed of an answer is its place in it
    return ask(drawn, answerer, model=Path(model).name, chunk=draws * task.questions)


def report(context: RunContext, *, students: Mapping[str, str], k: int, questions: int = 500,
           max_new_tokens: int = 56, draws: int = 0) -> dict[str, Any]:
    """Held-out puzzles of the same size, answered by `students` {name: MODEL}, of which the first is the base:
    greedily, and in `sampled/` `draws` times each at temperature 1."""
    task = Puzzles(k=(k,), questions=questions, seed=context.seed, names=NAMES)
    first, *others = students
    where = {name: context.resolve(model) for name, model in students.items()}
    out, compare = context.recipe.folder / "report", (first, others[-1])
    value = evaluate(where, task, out, Asking(max_new_tokens=max_new_tokens, batch_size=512),
                     reports.Plan(title=f"Knights and Knaves, {k} people", compare=compare), say=context.say)
    accuracy = lambda of: {n: v["mean_accuracy"] for n, v in of["students"].items()}
    result = {"mean_accuracy": accuracy(value)}
    if draws:
        records = {n: sampled(m, task, draws=draws, max_new_tokens=max_new_tokens) for n, m in where.items()}
        plan = reports.Plan(title=f"Knights and Knaves, {k} people, {draws} sampled answers each", compare=compare)
        value = reports.write(out / "sampled", records, plan)
        context.say(reports.table_text(value, records, plan))
        result["sampled"] = accuracy(value)
    return result
