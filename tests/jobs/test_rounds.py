"""Which rounds may go: never one that a checkpoint that is there could go on from."""

from types import SimpleNamespace

import pytest

from distill_jax.jobs.rounds import COUNTS, drop_rounds, read_counts, spent
from distill_jax.rollout.on_policy import OnPolicy
from distill_jax.train.checkpoint import COMMITTED


@pytest.fixture
def folder(tmp_path):
    """Rounds every 10 updates, 0 to 90, each with its estimates."""
    for update in range(0, 100, 10):
        (tmp_path / "rollouts" / f"{update:07d}" / "shards").mkdir(parents=True)
        (tmp_path / "rollouts" / f"{update:07d}.npz").touch()
    return tmp_path


def checkpoint(folder, step, complete=True):
    at = folder / "checkpoints" / str(step)
    at.mkdir(parents=True)
    if complete:
        (at / COMMITTED).touch()


def there(folder):
    names = sorted(p.name for p in (folder / "rollouts").iterdir())
    stores = [n for n in names if "." not in n]
    assert names == sorted(stores + [f"{n}.npz" for n in stores])
    return [int(n) for n in stores]


@pytest.mark.parametrize("steps,keep,oldest", [
    ([], 1, 0), ([70, 85], 1, 70), ([79, 85], 1, 70), ([80], 1, 80), ([85], 4, 60), ([5], 1, 0), ([85], 0, 0),
    ([85], 50, 0), ([3, 85], 1, 0)])
def test_what_goes(folder, steps, keep, oldest):
    for step in steps:
        checkpoint(folder, step)
    assert drop_rounds(folder, keep) == list(range(0, oldest, 10))
    assert there(folder) == list(range(oldest, 100, 10))
    assert drop_rounds(folder, keep) == []


def test_a_checkpoint_that_is_being_written_frees_nothing(folder):
    checkpoint(folder, 35)
    checkpoint(folder, 95, complete=False)
    assert drop_rounds(folder, 1) == [0, 10, 20]


def test_an_interrupted_deletion_is_finished(folder, monkeypatch):
    checkpoint(folder, 95)
    killed = SimpleNamespace(rmtree=lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with monkeypatch.context() as patch:
        patch.setattr("distill_jax.jobs.rounds.shutil", killed)
        with pytest.raises(KeyboardInterrupt):
            drop_rounds(folder, 1)
    assert (folder / "rollouts" / ".dropped-0000000").is_dir() and not (folder / "rollouts" / "0000000").exists()
    drop_rounds(folder, 1)
    assert there(folder) == [90]


def test_what_was_spent_counts_updates_that_were_made(tmp_path):
    assert spent(tmp_path, 5) == {"flops": 0.0, "trained_tokens": 0, "sampled_tokens": 0}
    (tmp_path / COUNTS).write_text('{"sampled": {"0": 7, "4": 9, "8": 1}, "trained": {"0": [2, 1e3], "5": [3, 1e3]}}')
    assert read_counts(tmp_path)["sampled"]["4"] == 9
    assert spent(tmp_path, 5) == {"flops": 1e3, "trained_tokens": 2, "sampled_tokens": 16}
    with pytest.raises(ValueError, match="keep_rounds must be at least 0"):
        OnPolicy(keep_rounds=-1)
