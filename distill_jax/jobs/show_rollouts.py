"""Rollouts of a run, group by group, for a person to read."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distill_jax.core.roles import ROLE_STYLE, SUPERVISED
from distill_jax.jobs.clipping import Clipped, clipped
from distill_jax.jobs.reinforce import ADVANTAGE, REWARD, TRAINED, summary
from distill_jax.rewards.sample import EXIT
from distill_jax.rollout.environments import BUDGET, CHUNK
from distill_jax.traces.store import Row, TraceStore
from distill_jax.traces.trace import FLAG_TRUNCATED, Trace

Bounds = tuple[float | None, float | None]


def rounds_of(run: str) -> list[tuple[int, Path]]:
    """(update, store) of every round in a run's folder, in order. Raises ValueError where there is none."""
    found = sorted((int(p.name), p) for p in Path(run).glob("**/rollouts/*") if p.name.isdigit() and p.is_dir())
    if not found:
        raise ValueError(f"{run} has no rollouts: expected the folder of a run with on_policy, in which rollouts/ is")
    return found


def round_at(run: str, step: int | None) -> tuple[int, TraceStore]:
    """The round that update `step` was trained on (None: the newest), and the update it was sampled at."""
    found = rounds_of(run)
    before = [(s, p) for s, p in found if step is None or s <= step]
    if not before:
        raise ValueError(f"no rollouts at update {step}; there are rounds at {found[0][0]} to {found[-1][0]}")
    since, path = before[-1]
    return since, TraceStore.open(str(path))


def show_rollouts(run: str, step: int | None, console: Console, *, groups: Sequence[int] = (0,),
                  samples: int = 4, clip: Bounds | None = None) -> None:
    """Numbers of the round, a line for each group, and the first `samples` answers of each of `groups` in full.

    clip   also mark the tokens whose gradient the policy loss clips away (`jobs.clipping`): bounds (low, high), None
           as the recipe says. Raises ValueError where there is no reward to have an advantage from
    """
    since, store = round_at(run, step)
    traces = list(store.traces())
    judged = all(REWARD in t.scores for t in traces)
    if clip and not judged:
        raise ValueError(f"{store.url}: answers without rewards have no advantages, and nothing of them is clipped; "
                         "--clip is for stages with on_policy=Reinforce(...)")
    console.print(Text(f"rollouts of update {since}: {len(traces)} answers", style="bold"))
    if judged:
        console.print(Text("  ".join(f"{k} {v:.4g}" for k, v in summary(traces).items())))
    found = None
    if clip:
        found = clipped(Path(store.url).parent.parent, since, store, traces, low=clip[0], high=clip[1])
        console.print(Text(f"clipped by {found.rule} under the checkpoint of update {found.checkpoint}: "
                           f"{_share(found, range(len(traces)))} of the trained tokens, marked \u27e6so\u27e7"))
    by_group: dict[str, list[int]] = {}
    for i, t in enumerate(traces):
        by_group.setdefault(t.group, []).append(i)
    members = list(by_group.values())
    console.print(_groups([[traces[i] for i in of] for of in members], judged,
                          [_share(found, of) for of in members] if found else []))
    for number in groups:
        if not 0 <= number < len(members):
            raise ValueError(f"no group {number}; the round has groups 0 to {len(members) - 1}")
        shown = members[number][:samples]
        marks = {i: (found.rows[i], found.marks[i]) for i in shown} if found else {}
        _show_group(number, [traces[i] for i in members[number]], console, samples,
                    {place: marks[i] for place, i in enumerate(shown) if i in marks})


def _share(found: Clipped, of: Sequence[int]) -> str:
    """Of the trained tokens of some answers, those that are clipped."""
    trained = sum(int(found.trained[i].sum()) for i in of)
    return f"{sum(int(found.marks[i].sum()) for i in of) / trained:.2%}" if trained else "-"


def _groups(members: Sequence[Sequence[Trace]], judged: bool, shares: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    more = (*(("reward", "trained") if judged else ()), *(("clipped",) if shares else ()))
    for name in ("group", "answers", "right", *more, "tokens", "question"):
        table.add_column(name, justify="left" if name == "question" else "right", no_wrap=True)
    for i, of in enumerate(members):
        scores = [t.scores for t in of]
        rewards = ([f"{sum(s[REWARD] for s in scores) / len(of):.3f}", str(sum(s[TRAINED] > 0 for s in scores))]
                   if judged else [])
        table.add_row(str(i), str(len(of)), str(sum(t.verdict is True for t in of)), *rewards, *shares[i:i + 1],
                      f"{sum(_tokens(t) for t in of) / len(of):.1f}", of[0].question[:80].replace("\n", " "))
    return table


def _show_group(number: int, members: Sequence[Trace], console: Console, samples: int,
                marks: Mapping[int, tuple[Row, np.ndarray]]) -> None:
    console.print(Text(f"\ngroup {number}: {members[0].question}", style="bold"))
    if members[0].gold:
        console.print(Text(f"gold: {members[0].gold}"))
    for place, t in enumerate(members[:samples]):
        said = {k: v for k, v in t.scores.items()
                if k in (REWARD, ADVANTAGE, EXIT, BUDGET, CHUNK) or k.startswith((f"{REWARD}/", "mode/"))}
        about = "  ".join(f"{k} {v:+.3f}" for k, v in said.items())
        verdict = {True: "right", False: "wrong", None: "not judged"}[t.verdict]
        console.print(Text(f"- {verdict}, {_tokens(t)} tokens{''.join(f', {f}' for f in t.flags)}  {about}"))
        body = Text("  ")
        for part, s in enumerate(t.segments):
            if s.role in SUPERVISED:
                body.append_text(_marked(s.text, ROLE_STYLE[s.role], part, *marks[place]) if place in marks else
                                 Text(s.text.strip(), style=ROLE_STYLE[s.role]))
                body.append(" ")
        if FLAG_TRUNCATED in t.flags:
            body.append(f"[cut here: the limit of {_tokens(t)} tokens]", style="bold red")
        console.print(body, soft_wrap=True)


def _marked(text: str, style: str, part: int, row: Row, marks: np.ndarray) -> Text:
    """The text of a row's segment number `part`, with brackets around its marked tokens."""
    inside = np.zeros(len(text.encode()) + 1, bool)
    for t in np.flatnonzero(marks & (row.parts == part)):
        start, end = (int(x) for x in row.spans[t])
        inside[start:end] = True
    out, at, open_ = Text(), 0, False
    for c in text:
        if inside[at] != open_:
            out.append("\u27e7" if open_ else "\u27e6", style="bold red")
            open_ = not open_
        out.append(c, style=f"{style} underline" if open_ else style)
        at += len(c.encode())
    if open_:
        out.append("\u27e7", style="bold red")
    return out


def _tokens(t: Trace) -> int:
    return 0 if t.encoded is None else len(t.encoded.ids) - t.encoded.prompt_length
