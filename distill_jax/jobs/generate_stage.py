"""The `Generate` stage of a recipe: a teacher answers the questions of a store, right answers go into a new one."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from distill_jax.data.render import render
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.decode.generator import Generator
from distill_jax.jobs.context import RunContext, write_json
from distill_jax.jobs.write_store import store_header
from distill_jax.loading import load, local_folder
from distill_jax.recipe import Generate
from distill_jax.rewards.check import check
from distill_jax.rollout.generate import generate_traces
from distill_jax.traces.store import TraceStore
from distill_jax.traces.trace import FLAG_UNTERMINATED, Trace


def generate_stage(stage: Generate, context: RunContext) -> dict[str, Any]:
    """Run the stage; stopped anywhere and started again, the store holds the same rows. Returns the counts.

    Every answer is checked against its question's gold; `keep="correct"` writes the right ones only. Counts are in
    `summary.json`: asked, kept, and why the others were not.
    """
    where = context.resolve(stage.teacher)
    folder = local_folder(where)
    model, params = load(folder)
    tok = load_tokenizer(folder)
    questions = list(TraceStore.open(context.resolve(stage.questions)).traces())
    generator = Generator(model, params, batch_size=stage.batch_size)
    store = TraceStore.open_or_create(str(context.folder / "store"), store_header(tok, teacher=stage.teacher))
    if not store.complete:
        with store.writer() as writer:
            state = dict(writer.state) or {"next": 0, "kept_of_next": 0, "counts": {}}
            counts = Counter(state["counts"])
            start, skip, per_call = state["next"], state["kept_of_next"], stage.batch_size * 4
            for first in range(start, len(questions), per_call):
                part = questions[first:first + per_call]
                traces = generate_traces(generator, tok, part, stage.sampling, n=stage.n, seed=stage.seed, first=first,
                                         teacher=stage.teacher)
                for q in range(len(part)):
                    kept = _judged(traces[q * stage.n:(q + 1) * stage.n], stage, counts)
                    for j, trace in enumerate(kept):
                        if first + q > start or j >= skip:
                            writer.append(render(trace, tok), state={"next": first + q, "kept_of_next": j + 1,
                                                                     "counts": dict(counts)})
                context.say(f"[{stage.name}] {first + len(part)}/{len(questions)} questions, {counts['kept']} kept")
        store.refresh()
    if not len(store):
        raise ValueError(f"no answer of {stage.teacher} was right: nothing to distil. Train the teacher longer, or "
                         "look at its answers with keep=all")
    summary = {"questions": len(questions), "asked": len(questions) * stage.n, "kept": len(store),
               "rejected": len(questions) * stage.n - len(store)}
    write_json(context.folder / "summary.json", summary)
    return summary


def _judged(traces: Sequence[Trace], stage: Generate, counts: Counter[str]) -> list[Trace]:
    """The traces to keep, with their verdicts."""
    out = []
    for trace in traces:
        if trace.gold is None:
            verdict = None
        elif FLAG_UNTERMINATED in trace.flags:
            verdict = False
        else:
            verdict = check(trace.answer, trace.gold).correct
        keep = stage.keep == "all" or verdict is True
        counts["kept" if keep else "rejected"] += 1
        if keep:
            out.append(trace.replace(verdict=verdict))
    return out
