"""What the reinforcement recipes share: a distilled student, questions with gold answers, one update a round."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from distill_jax.data.source_specs import Store
from distill_jax.decode.sampling import Sampling
from distill_jax.losses.rows.value import value_error
from distill_jax.objective.term import AnyTerm, Term
from distill_jax.objective.tokens import TokenTerm, policy_metrics
from distill_jax.recipe import AnyProjector, Critic, Frozen, Recipe, Saving, Stage, Student
from distill_jax.rollout.reinforce import Reinforce
from distill_jax.train.optim import AdamW

STUDENT = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
PROMPTS, N = 64, 8
"""Questions of a round and answers to each."""
LONGEST = 8192
"""Most tokens of an answer; prompts may have 1,024."""


def rl(name: str, policy: TokenTerm, *, others: Mapping[str, AnyTerm] | None = None, reference: bool = False,
       critic: float = 0.0, metrics: Mapping[str, Any] | None = None, lr: float = 1e-6, steps: int = 300,
       temperature: float = 1.0, **reinforce: Any) -> Recipe:
    """One stage of RL on `questions/`, a trace store whose rows have gold answers.

    others     further terms; reference: whether the start of the student stays on the mesh as provider "reference"
    critic     learning rate of a critic of the student's size, which starts from it: providers "critic" and "trunk";
               0: none. Its error is clipped at 0.2 around the values of the round
    metrics    settings of `policy_metrics`, where they are not those of PPO
    reinforce  fields of `Reinforce`
    """
    options: dict[str, Any] = {"prompts": PROMPTS, "n": N, "batch_size": 256, "sampling": Sampling(
        temperature=temperature, max_new_tokens=LONGEST)} | reinforce
    every = options.get("every", 1)
    providers: dict[str, Student | AnyProjector] = {
        "student": Student(model=STUDENT, precision="bfloat16", remat="full")}
    others = dict(others or {})
    if reference:
        providers["reference"] = Frozen(STUDENT, precision="bfloat16")
    if critic:
        optim = AdamW(peak_lr=critic, warmup=10)
        providers["trunk"] = Student(model=STUDENT, precision="bfloat16", remat="full", optim=optim)
        providers["critic"] = Critic(reads="trunk", detach=False, optim=optim)
        others["value"] = Term(value_error, student="critic/main", target="fields", kwargs={"clip": 0.2})
    return Recipe(name=name, stages=(Stage(
        source=Store(path="questions/", rows=options["prompts"] * options["n"] // every, seq_len=LONGEST + 1024,
                     pack=False),
        providers=providers, terms={"policy": policy, **others, **policy_metrics(**(metrics or {}))},
        on_policy=Reinforce(**options), optim=AdamW(peak_lr=lr, warmup=10), steps=steps, micro_batches=64 // every,
        saving=Saving(steps=20), log_every=1),))


def one_of(recipe: Recipe, name: str, *, longest: int = LONGEST, model: str = STUDENT, questions: str = "questions/",
           steps: int = 300) -> Stage:
    """The stage of an `rl` recipe as one of several: answers of at most `longest` tokens, eight rows a micro-batch.

    model, questions  where it starts from and what it asks; `stage:NAME` of an earlier stage
    """
    (stage,) = recipe.stages
    assert isinstance(stage, Stage) and isinstance(stage.source, Store) and stage.on_policy is not None
    sampling = replace(stage.on_policy.sampling, max_new_tokens=longest)
    return replace(
        stage, name=name, source=replace(stage.source, path=questions, seq_len=longest + 1024),
        providers={**stage.providers, "student": replace(stage.models["student"], model=model)},
        on_policy=replace(stage.on_policy, sampling=sampling), steps=steps, micro_batches=stage.source.rows // 8)
