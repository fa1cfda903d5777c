"""Checkpoints: written by Orbax in the background, found whole or not at all, restored onto any mesh.

On disk: `<folder>/<step>/{params/<provider>, opt_state, loop, info}`. `params/<provider>` is a plain tree that Orbax
alone restores (`StandardCheckpointer().restore(path)`); `loop` holds the small arrays of `TrainState`, `info` JSON.
Orbax writes a step under a temporary name and renames it when it is complete: a killed save leaves nothing to find.
"""

import contextlib
import dataclasses
import errno
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from distill_jax.core import tree
from distill_jax.train import peers
from distill_jax.train.state import TrainState, shape_of

Tree = Any
LOOP = ("step", "controllers", "rng", "skipped")
POINTER = "checkpoints.url"
COMMITTED = "commit_success.txt"  # written by Orbax into a complete step, before its rename and after all its items


class _Unraised(logging.Filter):
    """Leaves out the tracebacks of Orbax's writing threads: `save` or `wait` raises what they report."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.exc_info


_UNRAISED = _Unraised()


@contextlib.contextmanager
def writing(folder: Any) -> Iterator[None]:
    """What the writing of a checkpoint raises becomes an OSError in one line."""
    log = logging.getLogger("absl")
    log.addFilter(_UNRAISED)  # stays: the threads go on after this
    try:
        yield
    except (ValueError, OSError) as e:
        if "No space left" in str(e) or "Disk quota" in str(e):
            raise OSError(errno.ENOSPC, f"{folder}: no space left on the device; the checkpoints there are whole, free "
                                        "some space and run the same command again to continue") from e
        raise OSError(f"{folder}: cannot write a checkpoint: {str(e).splitlines()[0][:300]}") from e


def checkpoints_of(folder: str | Path) -> Any:
    """Where the checkpoints of a training stage's folder are: in it, or where its file `checkpoints.url` says."""
    pointer = Path(folder) / POINTER
    return epath.Path(pointer.read_text().strip()) if pointer.is_file() else epath.Path(folder) / "checkpoints"


def _absolute(folder: str | Path) -> Any:
    path = epath.Path(folder)
    return path if path.as_posix().startswith("gs:/") else path.absolute()  # which takes a URL for a relative path


class Checkpoints:
    """The checkpoints of one training stage in `folder` (a path or URL), the newest `keep` of them."""

    def __init__(self, folder: str | Path, *, keep: int = 2) -> None:
        self.folder: Any = _absolute(folder)
        self._manager = ocp.CheckpointManager(
            self.folder, options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True))

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return latest_step(self.folder)

    def save(self, step: int, state: TrainState, info: dict[str, Any]) -> None:
        """Start writing `state` as checkpoint `step`; the arrays are copied before this returns.

        `info`: JSON values, returned by `restore`. Raises OSError of the previous save (a full disk).
        """
        items: dict[str, Any] = {f"params/{name}": ocp.args.StandardSave(p) for name, p in state.params.items()}
        items["opt_state"] = ocp.args.StandardSave(state.opt_state)
        items["loop"] = ocp.args.StandardSave({name: getattr(state, name) for name in LOOP})
        items["info"] = ocp.args.JsonSave(info)
        with writing(self.folder):
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Until everything started is on disk. Raises OSError where it could not be written."""
        with writing(self.folder):
            self._manager.wait_until_finished()

    def info(self, step: int) -> dict[str, Any]:
        return json.loads((self.folder / str(step) / "info" / "metadata").read_text())

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of checkpoint `step` with the shardings of `like` (whatever mesh it was written on).

        Raises ValueError, naming paths and shapes, where the checkpoint is of another model or optimiser.
        """
        at = self.folder / str(step)
        params = {n: restore_item(at / "params" / n, shape_of(p)) for n, p in like.params.items()}
        opt_state = restore_item(at / "opt_state", shape_of(like.opt_state))
        loop = restore_item(at / "loop", shape_of({name: getattr(like, name) for name in LOOP}))
        return dataclasses.replace(like, params=params, opt_state=opt_state, **loop)

    def close(self) -> None:
        self._manager.close()


def complete_steps(folder: str | Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, in order; safe while a run is writing there."""
    root = epath.Path(folder)
    if not root.exists():
        return []
    return sorted(int(p.name) for p in root.iterdir() if p.name.isdigit() and (p / COMMITTED).exists())


def latest_step(folder: str | Path) -> int | None:
    """Step of the newest complete checkpoint in `folder`; None: there is none."""
    return max(complete_steps(folder), default=None)


def latest_params(folder: str | Path, provider: str = "student", *,
                  shardings: Callable[[Tree], Tree] | None = None, dtype: Any = None, step: int | None = None) -> Tree:
    """Parameters of `provider` in the newest checkpoint of `folder` (or that of `step`), read straight onto the devices
    they belong to.

    shardings  from the tree of ShapeDtypeStructs to a tree of shardings (`sharding.param_shardings` with its mesh);
               default: everything on the first device
    dtype      cast on the way in; default: as stored
    Raises ValueError when there is no complete checkpoint, or no such provider in it.
    """
    there = complete_steps(folder)
    if not there:
        raise ValueError(f"no complete checkpoint in {folder}; train first, or give another folder")
    if step is not None and step not in there:
        raise ValueError(f"no complete checkpoint of update {step} in {folder}; there are {there}")
    step = there[-1] if step is None else step
    path = _absolute(folder) / str(step) / "params" / provider
    _must_exist(path)
    shapes = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, dtype or m.dtype), _metadata(path))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = shardings(shapes) if shardings else jax.tree.map(lambda _: here, shapes)
    return restore_item(path, jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed))


def restore_item(path: Any, target: Tree) -> Tree:
    """One item restored as `target` (ShapeDtypeStructs with shardings). Raises ValueError where it does not fit."""
    path = epath.Path(path)
    _must_exist(path)
    _check_fits(path, _metadata(path), target)
    with _checkpointer() as checkpointer:
        try:
            return checkpointer.restore(path, target)
        except ValueError as e:  # of tensorstore, whose second line is a place in its source
            raise damaged(path, str(e)) from e


def _checkpointer() -> ocp.StandardCheckpointer:
    """One that waits for all processes, or, where this one works alone (`peers.alone`), for none."""
    if jax.process_count() == 1 or peers.current() is not peers.ALONE:
        return ocp.StandardCheckpointer()
    me = jax.process_index()
    return ocp.StandardCheckpointer(multiprocessing_options=ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"alone{me}"))


def _must_exist(path: Any) -> None:
    if not path.exists():
        there = sorted(p.name for p in path.parent.iterdir()) if path.parent.exists() else []
        raise ValueError(f"no {path.name!r} in {path.parent}; it has {there}")


def _metadata(path: Any) -> Tree:
    """The stored tree with Orbax's description (shape, dtype) of each array."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)  # items of a step carry no timestamps of their own, and Orbax warns about it
    try:
        with _checkpointer() as checkpointer:
            found = checkpointer.metadata(path).item_metadata
    except (ValueError, FileNotFoundError) as e:
        raise damaged(path, str(e)) from e
    finally:
        log.setLevel(level)
    if found is None:
        raise damaged(path, "what Orbax knows of its arrays cannot be read")
    return found.tree


def damaged(path: Any, why: str) -> ValueError:
    """The error of a checkpoint that is not as it was written."""
    reason = (why.splitlines() or [""])[0][:300]
    return ValueError(f"{path} is damaged: {reason}; put a whole copy in its place, or delete the folder of its step "
                      "to go on from the one before")


def _check_fits(path: Any, stored: Tree, target: Tree) -> None:
    """Raise ValueError, listing at most four differences, unless both trees have the same paths and shapes."""
    old = {name: tuple(leaf.shape) for name, leaf in tree.paths(stored)}
    new = {name: tuple(leaf.shape) for name, leaf in tree.paths(target)}
    lines = [f"{n}: only in the checkpoint {old[n]}" for n in sorted(old.keys() - new.keys())]
    lines += [f"{n}: not in the checkpoint, expected {new[n]}" for n in sorted(new.keys() - old.keys())]
    lines += [f"{n}: {old[n]} in the checkpoint, expected {new[n]}"
              for n in sorted(old.keys() & new.keys()) if old[n] != new[n]]
    if lines:
        more = f"; and {len(lines) - 4} more" if len(lines) > 4 else ""
        raise ValueError(f"{path} is a checkpoint of another model or optimiser: {'; '.join(lines[:4])}{more}. Go on "
                         "with the model it was made with, or train into another folder")
