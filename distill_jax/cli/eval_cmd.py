"""`distill-jax eval`: one or more models on one task."""

from pathlib import Path
from typing import Annotated, Any

import typer

Opt = typer.Option


def evaluate(
    models: Annotated[list[str], typer.Argument(
        help="BASE [DISTILLED ...]: runs, Hugging Face directories, hub ids, URLs, or a server http://HOST/v1#NAME")],
    task: Annotated[str, Opt(help="multidoc_qa, multihop, conflicts, varied_length, long_document, kv_retrieval, "
                                  "answer_match, puzzles")] = "multidoc_qa",
    data: Annotated[str, Opt(help="file with the questions; default: the generated world")] = "",
    k: Annotated[str, Opt(help="numbers of documents, e.g. 2,4,8")] = "",
    questions: Annotated[int, Opt(help="questions for each k; 0: the task's default")] = 0,
    seed: Annotated[int | None, Opt(help="of the questions")] = None,
    set_: Annotated[list[str] | None, Opt("--set", help="another option of the task, e.g. rendering=rich")] = None,
    names: Annotated[str, Opt(help="names in the report, e.g. base,distilled")] = "",
    out: Annotated[Path | None, Opt(help="folder of the report; default: eval/TASK in the last model's run")] = None,
    max_new_tokens: Annotated[int, Opt(help="tokens an answer may have, thinking included")] = 256,
    batch_size: Annotated[int, Opt(help="answers at a time")] = 64,
    context: Annotated[int | None, Opt(help="tokens of prompt and answer; default: what the model can take")] = None,
    trained_k: Annotated[int | None, Opt(help="most documents in training, marked in the report")] = None,
) -> None:
    """Ask models the same questions; write a table, JSON and pictures. Differences are to the first model."""
    from distill_jax.eval.report import Plan
    from distill_jax.jobs.evaluate import Asking, evaluate, make_task, names_for

    called = names.split(",") if names else names_for(models)
    if len(called) != len(models) or len(set(called)) != len(called):
        raise ValueError(f"--names gives {called} for {len(models)} models; give as many different names")
    chosen = make_task(task, _options(data, k, questions, seed, set_ or []), models)
    folder = out or _default_folder(models[-1], task)
    evaluate(dict(zip(called, models, strict=True)), chosen, folder,
             Asking(max_new_tokens=max_new_tokens, batch_size=batch_size, context=context),
             Plan(title=f"{task}: {', '.join(called)}", trained_k=trained_k,
                  compare=(called[0], called[1]) if len(called) > 1 else None))
    print(f"\nreport: {folder / 'report.md'}")


def _options(data: str, k: str, questions: int, seed: int | None, rest: list[str]) -> dict[str, Any]:
    from distill_jax.core.spec import parse

    out: dict[str, Any] = {}
    if data:
        out["data"] = data
    if k:
        if not all(part.strip().isdigit() for part in k.split(",")):
            raise ValueError(f"--k takes numbers like 2,4,8, got {k!r}")
        out["k"] = [int(part) for part in k.split(",")]
    if questions:
        out["questions"] = questions
    if seed is not None:
        out["seed"] = seed
    for assignment in rest:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set takes name=value, got {assignment!r}")
        out[name] = parse(value, f"--set {assignment}")
    return out


def _default_folder(model: str, task: str) -> Path:
    """Beside the run it evaluates; in the working directory for models that are not local folders."""
    root = Path(model)
    return (root if root.is_dir() else Path("runs")) / "eval" / task
