"""The `Generate` stage of a recipe: a teacher answers the questions of a store, what is kept goes into a new one."""

from typing import Any

from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.jobs.context import RunContext
from distill_jax.jobs.generate import Keeping, ModelTeacher, generate_store
from distill_jax.loading import load, local_folder
from distill_jax.recipe import Generate
from distill_jax.traces.store import TraceStore


def generate_stage(stage: Generate, context: RunContext) -> dict[str, Any]:
    """Run the stage; stopped anywhere and started again, the store holds the same rows. Returns the counts."""
    folder = local_folder(context.resolve(stage.teacher))
    model, params = load(folder)
    tok = load_tokenizer(folder)
    teacher = ModelTeacher(model, params, tok, stage.sampling, n=stage.n, seed=stage.seed, name=stage.teacher,
                           batch_size=stage.batch_size)
    questions = TraceStore.open(context.resolve(stage.questions)).traces()
    summary = generate_store(str(context.folder / "store"), questions, teacher, tok, Keeping(keep=stage.keep))
    context.say(f"[{stage.name}] {summary['questions']} questions asked, {summary['solved']} answered right, "
                f"{summary['kept']} traces kept")
    return {k: summary[k] for k in ("questions", "solved", "traces", "kept", "rejected", "by_role_tokens")}
