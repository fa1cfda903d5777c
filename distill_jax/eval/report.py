"""The report of an evaluation: `report.json`, `report.md` and pictures, in one folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill_jax.eval import plots, stats
from distill_jax.eval.records import Records


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the models of a report stand to each other.

    compare    (base, distilled): the pair whose difference is reported, both of them students. Other students are
               compared with the base as well; None: no difference
    students   listed under "students" in the JSON; by default every model but the teacher
    teacher    listed under "teacher"
    trained_k  largest k (documents, or the task's own unit) in training, shown in the plot over k
    extra      further top-level entries of the JSON (`seconds`, FLOPs, settings); scalars are printed as well
    """

    title: str = ""
    compare: tuple[str, str] | None = None
    students: Sequence[str] = ()
    teacher: str = ""
    trained_k: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    resamples: int = stats.RESAMPLES


def write(directory: str | Path, models: Mapping[str, Records], plan: Plan = Plan()) -> dict[str, Any]:
    """Write the report into `directory` and return its JSON value. `models` in the order of the legends.

    Raises ValueError when a name of the plan is not a model, or the compared two were asked different questions.
    """
    for name in (*(plan.compare or ()), *plan.students, *([plan.teacher] if plan.teacher else [])):
        if name not in models:
            raise ValueError(f"the report's plan names {name!r}; models: {list(models)}")
    if plan.compare and plan.students and not set(plan.compare) <= set(plan.students):
        raise ValueError(f"{plan.compare} are to be compared, but the students are {list(plan.students)}")
    out = Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    value = as_json(models, plan)
    pictures = _draw(out, models, plan)
    (out / "report.json").write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    (out / "report.md").write_text(markdown(value, models, plan, pictures))
    return value


def as_json(models: Mapping[str, Records], plan: Plan = Plan()) -> dict[str, Any]:
    """`{"task", "unit", "students": {name: summary}, "teacher": summary, "difference": {k: [value, low, high]}, ...}`.
    """
    summaries = {n: _finite(stats.summary(r, plan.seed, plan.resamples)) for n, r in models.items()}
    students = plan.students or [n for n in models if n != plan.teacher]
    others = {n: s for n, s in summaries.items() if n not in students and n != plan.teacher}
    first = next(iter(models.values()))
    value: dict[str, Any] = {"task": first.task, "unit": first.unit, "students": {n: summaries[n] for n in students}}
    if plan.teacher:
        value["teacher"] = summaries[plan.teacher]
    if others:
        value["others"] = others
    if plan.compare:
        base, distilled = plan.compare
        value["compared"] = {"base": base, "distilled": distilled}
        others_of_base = [n for n in value["students"] if n != base]
        differences = stats.compare(models, base, others_of_base, plan.seed, plan.resamples)
        value |= differences[distilled]
        value["differences"] = differences
    return value | dict(plan.extra)


def markdown(value: Mapping[str, Any], models: Mapping[str, Records], plan: Plan, pictures: Sequence[str] = ()) -> str:
    """The report as text."""
    summaries = _summaries(value, models, plan)
    parts = [f"# {plan.title or value['task']}", *_headline(value, summaries, plan),
             f"## Accuracy by {value['unit']}" if _ks(summaries) != [0] else "## Accuracy",
             _table(summaries, plan, value["unit"])]
    if plan.compare:
        parts += ["## Difference", _difference(value)]
    parts += ["## Cost and failures", _costs(summaries)]
    axes = {a for s in summaries.values() for a in s["by_axis"]}
    for axis in sorted(axes):
        parts += [f"## By {axis.replace('_', ' ')}", _axis_table(summaries, axis)]
    parts += [f"![{p.removesuffix('.png').replace('_', ' ')}]({p})" for p in pictures]
    scalars = {k: v for k, v in plan.extra.items() if isinstance(v, str | int | float)}
    if scalars:
        parts += ["## Run", "\n".join(f"- {k.replace('_', ' ')}: {_number(v)}" for k, v in scalars.items())]
    parts.append("Intervals are 95%, from a paired bootstrap over questions "
                 f"({plan.resamples:,} resamples, bias-corrected).")
    return "\n\n".join(parts) + "\n"


def table_text(value: Mapping[str, Any], models: Mapping[str, Records], plan: Plan = Plan()) -> str:
    """The accuracy table and the headline alone, for a terminal."""
    summaries = _summaries(value, models, plan)
    return "\n\n".join([_table(summaries, plan, value["unit"]), *_headline(value, summaries, plan)])


def _summaries(value: Mapping[str, Any], models: Mapping[str, Records], plan: Plan) -> dict[str, Any]:
    known = {**value["students"], **value.get("others", {}), plan.teacher: value.get("teacher")}
    return {n: known[n] for n in models}


def _headline(value: Mapping[str, Any], summaries: Mapping[str, Any], plan: Plan) -> list[str]:
    if not plan.compare or not value["difference"]:
        return []
    base, distilled = plan.compare
    within = [k for k in value["difference"] if plan.trained_k is None or int(k) <= plan.trained_k]
    k = (within or list(value["difference"]))[-1]
    d = value["difference"][k]
    where = f"At {k} {value['unit']}" if k != "0" else "Overall"
    text = (f"{where}, **{distilled}** answers {_percent(summaries[distilled]['mean_accuracy'][k])} and **{base}** "
            f"{_percent(summaries[base]['mean_accuracy'][k])}: {_points(d)} points.")
    gap, other = (summaries[n]["position_gap"].get(k) for n in (distilled, base))
    if gap and other:
        text += (f" Best minus worst position: {100 * gap[0]:.1f} points for {distilled}, "
                 f"{100 * other[0]:.1f} for {base}.")
    return [text]


def _ks(summaries: Mapping[str, Any]) -> list[int]:
    """Values of the axis `k`; 0 where there is none."""
    return sorted({int(k) for s in summaries.values() for k in s["mean_accuracy"]})


def _table(summaries: Mapping[str, Any], plan: Plan, unit: str) -> str:
    ks = _ks(summaries)
    beyond = lambda k: " *" if plan.trained_k is not None and k > plan.trained_k else ""
    level = lambda s, key: "-" if s[key] is None else _percent(s[key])
    rows = [["model", *(f"k={k}{beyond(k)}" if k else "all" for k in ks), "gap", "ends - middle", "oracle",
             "closed book"]]
    gap_k = str(max((k for k in ks if not beyond(k)), default=ks[-1]))
    for name, s in summaries.items():
        cells = [_with_interval(s["accuracy_interval"].get(str(k))) for k in ks]
        gaps = [_with_interval(s[g].get(gap_k)) for g in ("position_gap", "middle_gap")]
        rows.append([name, *cells, *gaps, level(s, "oracle"), level(s, "closed_book")])
    rows = [[c for c, column in zip(r, zip(*rows, strict=True), strict=True) if set(column[1:]) != {"-"}] for r in rows]
    notes = [f"gap: best minus worst position; ends - middle: mean of first and last minus mean of the rest, both at "
             f"k={gap_k}."] if "gap" in rows[0] else []
    notes += [f"\\* more {unit} than in training."] if any(map(beyond, ks)) else []
    return "\n\n".join([_lines(rows), *notes])


def _difference(value: Mapping[str, Any]) -> str:
    base, differences = value["compared"]["base"], value["differences"]
    rows = [[value["unit"], *(f"{name} - {base} (points)" for name in differences)]]
    rows += [[k if k != "0" else "all", *(_points(d["difference"][k]) for d in differences.values())]
             for k in value["difference"]]
    if value["slope_per_doubling"]:
        rows.append(["per doubling", *(_points(d["slope_per_doubling"]) for d in differences.values())])
    return _lines(rows)


def _costs(summaries: Mapping[str, Any]) -> str:
    rows = [["model", "thinking tokens", "tokens", "unterminated", "prompt too long", "other problems", "s/answer",
             "training FLOPs", "training s"]]
    for name, s in summaries.items():
        rows.append([name, f"{s['thinking_tokens']:.1f}", f"{s['tokens']:.1f}", _percent(s["unterminated"]),
                     _percent(s["over_long"]), str(s["problems"] - round(s["over_long"] * s["answers"])),
                     f"{s['seconds_per_answer']:.4f}", _number(s.get("training_flops", "-")),
                     _number(s.get("training_seconds", "-"))])
    return _lines(rows)


def _axis_table(summaries: Mapping[str, Any], axis: str) -> str:
    values = list(dict.fromkeys(v for s in summaries.values() for v in s["by_axis"].get(axis, {})))
    rows = [["model", *values]]
    for name, s in summaries.items():
        got = s["by_axis"].get(axis, {})
        rows.append([name, *(_percent(got[v]) if v in got else "-" for v in values)])
    return _lines(rows)


def _draw(out: Path, models: Mapping[str, Records], plan: Plan) -> list[str]:
    rows, unit = {n: stats.plain(r) for n, r in models.items()}, next(iter(models.values())).unit
    estimates = {n: stats.estimate(stats.grid(r), plan.seed, plan.resamples) for n, r in rows.items()}
    best = plan.compare[1] if plan.compare else next(iter(models))
    summary = stats.summary(models[best], plan.seed, resamples=1)
    levels = {name: summary[key] for name, key in (("oracle", "oracle"), ("closed book", "closed_book"))
              if summary[key] is not None}
    names = []
    grid = next(iter(estimates.values())).grid
    if any(len(grid.columns(k)) > 1 for k in grid.ks):
        names.append("position_curves.png")
        plots.save(plots.position_curves(estimates, levels, unit=unit), out / names[-1])
        names.append("heat_map.png")
        plots.save(plots.heat_map(estimates, unit), out / names[-1])
    if len(grid.ks) > 1:
        names.append("accuracy_by_k.png")
        plots.save(plots.accuracy_by_k(estimates, levels, plan.trained_k, unit), out / names[-1])
    names.append("accuracy_against_tokens.png")
    plots.save(plots.accuracy_against_tokens(models), out / names[-1])
    return names


def _lines(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns padded so that it reads as text too."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    line = lambda r: "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |"
    return "\n".join([line(rows[0]), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows[1:])])


def _percent(x: float) -> str:
    return f"{100 * x:.1f}%"


def _with_interval(v: Sequence[float] | None) -> str:
    return "-" if v is None else f"{100 * v[0]:.1f} [{100 * v[1]:.1f}, {100 * v[2]:.1f}]"


def _points(v: Sequence[float]) -> str:
    return f"{100 * v[0]:+.1f} [{100 * v[1]:+.1f}, {100 * v[2]:+.1f}]"


def _number(v: Any) -> str:
    if isinstance(v, bool | str):
        return str(v)
    return f"{v:.3g}" if isinstance(v, float) and (abs(v) >= 1e6 or abs(v) < 0.01) else f"{v:,.6g}"


def _finite(value: Any) -> Any:
    """NaN is no JSON: None instead."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and value != value else value
