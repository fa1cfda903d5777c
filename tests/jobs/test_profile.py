"""`distill-jax profile`: a recipe's step traced and tabulated; nothing of the run is touched."""

import json

import pytest

from distill_jax.cli.main import main
from distill_jax.data.tokenizer import load_tokenizer
from distill_jax.jobs.profile import profile_stage, stage_to_profile, tables
from distill_jax.recipe_file import load_recipe
from tests.data.conftest import tiny_folder
from tests.data.storing import make_store, some_traces
from tests.jobs.teachers import teacher_folder


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Overrides that make `on_policy_rkl.py` a tiny stage with a student, a teacher and rollouts, on eight devices."""
    root = tmp_path_factory.mktemp("world")
    tok = load_tokenizer(tiny_folder(root / "tokenizer"))
    make_store(root / "store", some_traces(24), tok)
    student, teacher = teacher_folder(root / "student", tok), teacher_folder(root / "teacher", tok, seed=1)
    return [f"student={student}", f"teacher={teacher}", "teacher.precision=float32", f"source.path={root / 'store'}",
            f"runs={root / 'runs'}", "source.rows=8", "source.seq_len=96", "source.holdout=0.25", "micro_batches=1",
            "heldout=8", "steps=3", "on_policy.prompts=8", "on_policy.sampling.max_new_tokens=8",
            "student.remat=full", "mesh={data: 2, fsdp: 4}"]


def test_where_the_step_goes(options, tmp_path):
    recipe = load_recipe("configs/recipes/on_policy_rkl.py", options)
    measured = profile_stage(recipe, stage_to_profile(recipe, None), tmp_path / "out", 2, lambda line: None)
    parts = measured.profile.parts()
    assert {"attention", "mlp", "embed", "loss", "optimizer", "norm", "collectives", "teacher: mlp"} <= set(parts)
    assert parts["mlp"]["recompute"] > 0 and parts["mlp"]["backward"] > 0
    assert parts["teacher: mlp"]["backward"] == 0
    assert measured.profile.devices == 8
    assert 0 < measured.profile.busy <= 2 * measured.seconds
    assert measured.tokens > 0 and measured.sampling is not None
    known = sum(sum(v.values()) for part, v in parts.items() if part != "other")
    assert known > 0.5 * measured.profile.seconds
    assert not recipe.folder.exists()  # the run itself has not begun
    said = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert said["steps"] == 2 and said["profile"]["rows"][0]["seconds"] > 0
    assert list((tmp_path / "out" / "trace").rglob("*.xplane.pb"))
    assert "HloModule jit_step" in (tmp_path / "out" / "step.hlo.txt").read_text()
    assert [t.row_count for t in tables(measured, longest=5)] == [len(parts) + 1, 5]


def refused(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main(["profile", *args])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return error


def test_refused(options, tmp_path, capsys):
    sets = [a for o in options for a in ("--set", o)]
    recipe = "configs/recipes/on_policy_rkl.py"
    assert "no training stage 'rl'; it has ['train']" in refused(capsys, recipe, *sets, "--stage", "rl")
    (tmp_path / "there").mkdir()
    assert "is there already" in refused(capsys, recipe, *sets, "--out", str(tmp_path / "there"))
    assert "--steps must be at least 1" in refused(capsys, recipe, *sets, "--steps", "0", "--out", str(tmp_path / "a"))
    assert "reads what stage 'puzzles' makes" in refused(
        capsys, "configs/recipes/grpo_kk.py", "--set", f"runs={tmp_path / 'runs'}", "--stage", "warmup")
    assert not (tmp_path / "runs").exists() and not (tmp_path / "a").exists()
