"""`distill-jax verify-hf DIR`: does the folder survive the way through us, and do we compute what transformers does?

1. every tensor: file -> our parameters -> file, compared bit by bit;
2. with ORIGINAL: every tensor of the two folders, compared bit by bit;
3. logits of random tokens in float32, ours against transformers + torch where these are installed, and against
   ORIGINAL's.
"""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.jobs.context import Echo, say
from distill_jax.loading import load, local_folder, model_files
from distill_jax.models import hf
from distill_jax.models.tensorfile import TensorInfo

TOLERANCE = 1e-3
"""Largest logit difference in float32, relative to the largest logit (or 1)."""


@dataclass
class Report:
    """Lines as they come, and what was wrong."""

    echo: Echo
    failures: list[str] = field(default_factory=list)

    def say(self, title: str, text: str, *, good: bool = True) -> None:
        self.echo(f"{'ok  ' if good else 'FAIL'}  {title:<12} {text}")
        if not good:
            self.failures.append(title)


def verify_hf(folder: str, *, against: str | None = None, echo: Echo = say) -> None:
    """Print what was compared. Raises ValueError where anything differs more than it may."""
    path, report = local_folder(folder), Report(echo)
    model, params = load(folder, dtype=None, compute=jnp.float32)
    stored = hf.stored_tensors(model_files(path))
    dtypes = sorted({i.dtype.name for i in stored.values()})
    report.say("loaded", f"{folder}: {model.config.model_type}, {model.config.num_params:,} parameters in "
                         f"{len(stored)} tensors ({', '.join(dtypes)})")
    _round_trip(report, model, params, stored)
    tokens = _tokens(model)
    logits = _logits(model, params, tokens)
    report.say("finite", f"largest |logit| {np.abs(logits).max():.3g}", good=bool(np.isfinite(logits).all()))
    del params
    if against is not None:
        original = local_folder(against)
        _same_tensors(report, stored, hf.stored_tensors(model_files(original)), against)
        other, its = load(against, dtype=None, compute=jnp.float32)
        _compare(report, "original", logits, _logits(other, its, tokens), f"{against}, both computed here")
        del its
    if importlib.util.find_spec("torch") is None:
        report.say("transformers", "not compared: torch is not installed (pip install torch)")
    else:
        name, theirs = _torch_logits(model_files(path), tokens)
        _compare(report, "transformers", logits, theirs[..., :logits.shape[-1]], name)
    if report.failures:
        raise ValueError(f"{folder} failed: {', '.join(report.failures)}")


def _round_trip(report: Report, model: Any, params: Any, stored: dict[str, TensorInfo]) -> None:
    """What an export of `params` would hold, against what the folder holds."""
    named = {n: i.dtype.name for n, i in stored.items()}
    wrong = [e.name for e in hf.entries(model.config, params, "float32", named)
             if (value := e.fetch()) is not None and not _same_bits(value, stored[e.name].read())]
    count = len(hf.entries(model.config, params, "float32", named))
    report.say("round trip", f"{count - len(wrong)} of {count} tensors bit-identical" + _listed(wrong), good=not wrong)


def _same_tensors(report: Report, a: dict[str, TensorInfo], b: dict[str, TensorInfo], name: str) -> None:
    wrong = sorted(set(a) ^ set(b))
    wrong += [n for n in sorted(set(a) & set(b))
              if a[n].dtype != b[n].dtype or a[n].shape != b[n].shape or not _same_bits(a[n].read(), b[n].read())]
    total = len(set(a) | set(b))
    report.say("tensors", f"{total - len(wrong)} of {total} bit-identical to {name}" + _listed(wrong), good=not wrong)


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return "; different: " + ", ".join(names[:10]) + more if names else ""


def _tokens(model: Any) -> np.ndarray:
    """Two rows of random real ids."""
    c = model.config
    return np.random.default_rng(0).integers(0, c.real_vocab or c.vocab_size, (2, min(65, c.context_length)))


def _logits(model: Any, params: Any, tokens: np.ndarray) -> np.ndarray:
    """float32 logits over the real ids."""
    out = jax.jit(model.apply)({"params": params}, jnp.asarray(tokens, jnp.int32))
    return np.asarray(out)[..., :model.config.real_vocab]


def _torch_logits(folder: Path, tokens: np.ndarray) -> tuple[str, np.ndarray]:
    import torch
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens)).logits.numpy()
    return f"transformers {transformers.__version__}, torch {torch.__version__}, float32", logits


def _compare(report: Report, title: str, ours: np.ndarray, theirs: np.ndarray, name: str) -> None:
    if ours.shape != theirs.shape:
        report.say(title, f"{name}: logits {theirs.shape} instead of {ours.shape}", good=False)
        return
    worst = float(np.abs(ours - theirs).max())
    report.say(title, f"max |logit difference| {worst:.2g} over {ours.shape[0]} x {ours.shape[1]} tokens ({name})",
               good=worst <= TOLERANCE * max(1.0, float(np.abs(theirs).max())))
