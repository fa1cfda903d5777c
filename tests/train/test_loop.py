"""`fit` and checkpoints: resume to the bit, signals, bad steps, another mesh, another model."""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import shutil
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill_jax.models.config import ModelConfig
from distill_jax.sharding import make_mesh, param_shardings
from distill_jax.traces.store import CorruptShard
from distill_jax.train.checkpoint import Checkpoints, latest_params, latest_step
from distill_jax.train.loop import Evaluation, Run, fit
from tests.train.tiny import CE, CONFIG, Synthetic, setup


def train(folder, steps, *, source=None, mesh=None, config=CONFIG, **kwargs):
    options = {k: kwargs.pop(k) for k in ("evaluations", "check") if k in kwargs}
    step_config, state = setup(CE, mesh, config=config, total=20)
    run = Run(folder=folder, steps=steps, **{"log_every": 4, "save_every": 5, **kwargs})
    return fit(step_config, state, source or Synthetic(), run, **options)


def leaves(state):
    return [np.asarray(x) for x in jax.tree.leaves(state)]


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run of 12 updates."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder, 12)


class Interrupting(Synthetic):
    """Sends this process a signal while batch `at` is made."""

    at, number = 7, signal.SIGTERM

    def batch(self, step):
        if step == self.at:
            os.kill(os.getpid(), self.number)
        return super().batch(step)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_resume_is_to_the_bit(whole, tmp_path, capsys, number):
    source = Interrupting()
    object.__setattr__(source, "number", number)
    before = signal.getsignal(number)
    first = train(tmp_path, 12, source=source)
    assert first.stopped == number.name and 7 <= first.step < 12
    assert latest_step(tmp_path / "checkpoints") == first.step
    assert signal.getsignal(number) is before
    assert f"{number.name}: saved after update {first.step} of 12" in capsys.readouterr().out
    second = train(tmp_path, 12)
    assert second.step == 12 and not second.stopped
    assert equal(second.state, whole[1].state)
    lines = [json.loads(line) for line in (tmp_path / "metrics" / "train.jsonl").read_text().splitlines()]
    wanted = [json.loads(line) for line in (whole[0] / "metrics" / "train.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == sorted({x["step"] for x in lines})
    assert lines[-1]["step"] == 12 and lines[-1]["ce"] == wanted[-1]["ce"]


def test_finished_run_is_left_alone(whole):
    again = train(whole[0], 12)
    assert again.step == 12 and equal(again.state, whole[1].state)


def test_metrics_files(whole):
    lines = [json.loads(line) for line in (whole[0] / "metrics" / "train.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [4, 8, 12]
    assert {"loss", "ce", "ce/think", "ce/answer", "grad_norm", "tokens_per_second"} <= set(lines[0])
    events = EventAccumulator(str(whole[0] / "metrics")).Reload()
    shown = [(e.step, e.value) for e in events.Scalars("loss")]
    assert shown == [(x["step"], pytest.approx(x["loss"], rel=1e-6)) for x in lines]


def test_old_checkpoints_go_and_orbax_alone_restores(whole):
    checkpoints = whole[0] / "checkpoints"
    assert sorted(int(p.name) for p in checkpoints.iterdir()) == [10, 12]
    alone = ocp.StandardCheckpointer().restore(checkpoints / "12" / "params" / "student")
    assert equal(alone, whole[1].state.params["student"])


def test_restores_onto_another_mesh(whole):
    """The state and the parameters alone, onto four and eight devices."""
    mesh = make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    _, like = setup(mesh=mesh)
    checkpoints = Checkpoints(whole[0] / "checkpoints")
    moved = checkpoints.restore(12, like)
    checkpoints.close()
    assert equal(moved, whole[1].state)
    assert jax.tree.map(lambda x: x.sharding, moved) == jax.tree.map(lambda x: x.sharding, like)
    eight = make_mesh(fsdp=-1)
    params = latest_params(whole[0] / "checkpoints", shardings=lambda shapes: param_shardings(eight, shapes))
    assert equal(params, whole[1].state.params["student"])
    assert params["embed"]["embedding"].sharding.mesh == eight


def test_half_written_checkpoint_is_not_picked(whole, tmp_path):
    folder = tmp_path / "checkpoints"
    train(tmp_path, 5)
    (folder / "9").mkdir()
    (folder / "9" / "params").mkdir()
    (folder / "11.orbax-checkpoint-tmp").mkdir()
    assert latest_step(folder) == 5
    assert equal(train(tmp_path, 12).state, whole[1].state)


def test_checkpoint_of_another_model_is_refused(whole):
    other = dataclasses.replace(CONFIG, mlp_size=24, attention=dataclasses.replace(CONFIG.attention, qkv_bias=True))
    assert isinstance(other, ModelConfig)
    with pytest.raises(ValueError, match="another model") as e:
        train(whole[0], 20, config=other)
    assert "layers/mlp/down/kernel: (2, 32, 16) in the checkpoint, expected (2, 24, 16)" in str(e.value)
    assert "\n" not in str(e.value)
    assert "layers/attention/q/bias: not in the checkpoint" in str(e.value)
    with pytest.raises(ValueError, match=r"no 'teacher' in .*it has \['student'\]"):
        latest_params(whole[0] / "checkpoints", "teacher")


@pytest.mark.parametrize("item", ["params/student", "opt_state"])
@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_checkpoint_is_named(whole, tmp_path, item, damage):
    """Every large file of the item cut short, or with one byte changed in the middle."""
    folder = tmp_path / "checkpoints" / "12"
    shutil.copytree(whole[0] / "checkpoints" / "12", folder)
    for path in [p for p in (folder / item).rglob("*") if p.is_file() and p.stat().st_size > 200]:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 8
        path.write_bytes(data if damage == "flipped" else data[:100])
    with pytest.raises(ValueError, match=r"is damaged: .*put a whole copy in its place") as e:
        Checkpoints(tmp_path / "checkpoints").restore(12, setup()[1])
    assert "\n" not in str(e.value) and item in str(e.value)


def test_another_recipe_is_refused(whole):
    with pytest.raises(ValueError, match="another recipe"):
        train(whole[0], 20, identity="changed")


def test_no_checkpoint_is_said(tmp_path):
    assert latest_step(tmp_path / "none") is None
    with pytest.raises(ValueError, match="no complete checkpoint"):
        latest_params(tmp_path)


def test_too_many_bad_steps_stop_with_the_batch(tmp_path):
    """Single bad steps are skipped; three in a row end the run, and the last one's batch is on disk."""
    source = Synthetic(poison=(1, 6, 7, 8))
    with pytest.raises(ValueError, match=r"3 updates in a row .* at update 8"):
        train(tmp_path, 12, source=source, max_skipped=3)
    saved = np.load(tmp_path / "bad_batch_8.npz")
    np.testing.assert_array_equal(saved["views/main/tokens"], source.batch(8).main.tokens)
    lines = [json.loads(line) for line in (tmp_path / "metrics" / "train.jsonl").read_text().splitlines()]
    assert lines[0]["skipped"] == 1 and np.isfinite(lines[0]["loss"])


def test_check_and_evaluations_are_called(tmp_path):
    seen = []

    def check(batch):
        seen.append(batch.main.tokens.shape)

    calls = []

    def evaluate(state):
        calls.append((int(state.step), sorted(state.params)))
        return {"accuracy": int(state.step) / 10}

    train(tmp_path, 6, check=check, evaluations={"world": Evaluation(fn=evaluate, every=3)})
    assert seen == [(8, 24)] and calls == [(3, ["student"]), (6, ["student"])]
    lines = [json.loads(line) for line in (tmp_path / "metrics" / "train.jsonl").read_text().splitlines()]
    assert {"step": 6, "world/accuracy": 0.6} in lines

    def empty(batch):
        raise ValueError("no supervised token")

    with pytest.raises(ValueError, match="no supervised token"):
        train(tmp_path / "other", 6, check=empty)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, caplog):
    """Orbax writes in threads: they log a traceback each, and what they raise comes with a later save."""
    made = Checkpoints(tmp_path / "c")
    text = "RESOURCE_EXHAUSTED: Failed to write 247 bytes: No space left on device [os_error_code='28']\nmore"

    def full(*args, **kwargs):
        try:
            raise ValueError(text)
        except ValueError:
            logging.getLogger("absl").exception("a thread raised an exception")
            raise

    monkeypatch.setattr(made._manager, "wait_until_finished", full)
    with pytest.raises(OSError, match=r"no space left on the device; .* run the same command again") as e:
        made.wait()
    assert e.value.errno == errno.ENOSPC and "\n" not in str(e.value) and not caplog.records
    monkeypatch.undo()
    made.close()


class Unreadable(Synthetic):
    """Batch 7 stands in a shard that cannot be read."""

    def batch(self, step):
        if step == 7:
            raise CorruptShard("a byte differs", shard=3, row=41)
        return super().batch(step)


def test_a_shard_that_cannot_be_read_stops_after_a_save(whole, tmp_path, capsys):
    with pytest.raises(CorruptShard, match="shard 3, row 41"):
        train(tmp_path, 12, source=Unreadable())
    assert latest_step(tmp_path / "checkpoints") == 7
    assert "the batch of update 7 cannot be read; saved after update 7" in capsys.readouterr().out
    again = train(tmp_path, 12)  # the shard has been put back
    assert again.step == 12 and equal(again.state, whole[1].state)


class Reading:
    """Rows of a source, read by nobody ahead; counts how often it was closed. Raises `error` instead of batch 3."""

    def __init__(self, source, start, error=None):
        self.source, self.step, self.error, self.closed = source, start, error, 0

    def __next__(self):
        if self.step == 3 and self.error:
            raise self.error
        self.step += 1
        return self.source.batch(self.step - 1)

    def close(self):
        self.closed += 1


@pytest.mark.parametrize("error,saved", [(None, 6), (OSError("the store is gone"), 3), (MemoryError("no room"), 3),
                                         (KeyboardInterrupt(), None)])
def test_what_reads_ahead_is_closed_however_a_run_ends(tmp_path, error, saved):
    begun = []

    def serve(source, start, share, shares):
        begun.append(Reading(source, start, error))
        return begun[-1]

    config, state = setup()
    run = Run(folder=tmp_path, steps=6, log_every=1, save_every=0)
    with pytest.raises(type(error)) if error else contextlib.nullcontext():
        fit(config, state, Synthetic(), run, serve=serve)
    assert [r.closed for r in begun] == [1] and latest_step(tmp_path / "checkpoints") == saved
