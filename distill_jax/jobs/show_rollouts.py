"""Rollouts of a run, group by group, for a person to read."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distill_jax.core.roles import ROLE_STYLE, SUPERVISED
from distill_jax.jobs.reinforce import ADVANTAGE, REWARD, TRAINED, summary
from distill_jax.rewards.sample import EXIT
from distill_jax.rollout.environments import BUDGET, CHUNK
from distill_jax.traces.store import TraceStore
from distill_jax.traces.trace import Trace


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
                  samples: int = 4) -> None:
    """Numbers of the round, a line for each group, and the first `samples` answers of each of `groups` in full."""
    since, store = round_at(run, step)
    traces = list(store.traces())
    judged = all(REWARD in t.scores for t in traces)
    console.print(Text(f"rollouts of update {since}: {len(traces)} answers", style="bold"))
    if judged:
        console.print(Text("  ".join(f"{k} {v:.4g}" for k, v in summary(traces).items())))
    by_group: dict[str, list[Trace]] = {}
    for t in traces:
        by_group.setdefault(t.group, []).append(t)
    members = list(by_group.values())
    console.print(_groups(members, judged))
    for number in groups:
        if not 0 <= number < len(members):
            raise ValueError(f"no group {number}; the round has groups 0 to {len(members) - 1}")
        _show_group(number, members[number], console, samples)


def _groups(members: Sequence[Sequence[Trace]], judged: bool) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("group", "answers", "right", *(("reward", "trained") if judged else ()), "tokens", "question"):
        table.add_column(name, justify="left" if name == "question" else "right", no_wrap=True)
    for i, of in enumerate(members):
        scores = [t.scores for t in of]
        rewards = ([f"{sum(s[REWARD] for s in scores) / len(of):.3f}", str(sum(s[TRAINED] > 0 for s in scores))]
                   if judged else [])
        table.add_row(str(i), str(len(of)), str(sum(t.verdict is True for t in of)), *rewards,
                      f"{sum(_tokens(t) for t in of) / len(of):.1f}", of[0].question[:80].replace("\n", " "))
    return table


def _show_group(number: int, members: Sequence[Trace], console: Console, samples: int) -> None:
    console.print(Text(f"\ngroup {number}: {members[0].question}", style="bold"))
    if members[0].gold:
        console.print(Text(f"gold: {members[0].gold}"))
    for t in members[:samples]:
        said = {k: v for k, v in t.scores.items()
                if k in (REWARD, ADVANTAGE, EXIT, BUDGET, CHUNK) or k.startswith((f"{REWARD}/", "mode/"))}
        about = "  ".join(f"{k} {v:+.3f}" for k, v in said.items())
        verdict = {True: "right", False: "wrong", None: "not judged"}[t.verdict]
        console.print(Text(f"- {verdict}, {_tokens(t)} tokens{''.join(f', {f}' for f in t.flags)}  {about}"))
        body = Text("  ")
        for s in t.segments:
            if s.role in SUPERVISED:
                body.append(s.text.strip() + " ", style=ROLE_STYLE[s.role])
        console.print(body, soft_wrap=True)


def _tokens(t: Trace) -> int:
    return 0 if t.encoded is None else len(t.encoded.ids) - t.encoded.prompt_length
