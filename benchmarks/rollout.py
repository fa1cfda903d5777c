"""Rollouts of one small Qwen2 model: our engine, the engine without its two savings, and transformers' `generate`.

Groups of samples of one prompt, lengths geometric and cut at a limit, the same ones on all sides: a row ends after as
many tokens as were drawn for it (ours: `Request.max_new_tokens`; transformers: a stopping criterion a row). Sides take
turns, so that a busy machine slows all; the ratios are of the medians, of the time on the clock and of the processor
time. transformers gets the same batches as our plain side: rows of similar prompts, left-padded, float32, sampling at
temperature 1 with the whole vocabulary.

Also: how far log-probs of sampled tokens are from those of the trainer's full forward pass, in float32 and bfloat16,
and what a decoding step reads a second, against `--bandwidth` if given.

    python -m benchmarks.rollout                  # 10M parameters, 32 prompts x 8 samples, 32 slots
    python -m benchmarks.rollout --small          # seconds: does it run and agree
    python -m benchmarks.rollout --bandwidth 4300 --dtype bfloat16 --slots 256 --no-torch      # a GPU of 4,300 GB/s
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import config_of
from distill_jax.core.tree import nbytes
from distill_jax.decode import Generator, Request, Sampling
from distill_jax.models import hf
from distill_jax.models.transformer import Transformer, init_params
from distill_jax.objective.lift import lift_tokens

RULES = Sampling(temperature=1.0)
Side = Callable[[], int]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """prompts of `shortest` to `longest` tokens, each answered `samples` times; lengths geometric with this mean, at
    most `limit`; slots: rows decoded together."""

    prompts: int = 32
    samples: int = 8
    shortest: int = 32
    longest: int = 256
    mean: int = 48
    limit: int = 256
    slots: int = 32

    def requests(self, vocab: int) -> list[Request]:
        rng = np.random.default_rng(0)
        asked = [rng.integers(1, vocab, n, np.int32) for n in rng.integers(self.shortest, self.longest, self.prompts)]
        lengths = np.minimum(rng.geometric(1 / self.mean, (self.prompts, self.samples)), self.limit)
        return [Request(prompt=p, seed=i * self.samples + s, max_new_tokens=int(lengths[i, s]))
                for i, p in enumerate(asked) for s in range(self.samples)]


def theirs(folder: Path, requests: list[Request], slots: int) -> Side:
    """transformers, batch by batch, each until its last row has ended."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    order = sorted(requests, key=lambda r: -len(r.prompt))

    class Lengths(transformers.StoppingCriteria):
        def __init__(self, width: int, lengths: list[int]) -> None:
            self.ends = torch.tensor(lengths) + width

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return input_ids.shape[1] >= self.ends

    def run() -> int:
        written = 0
        for start in range(0, len(order), slots):
            batch = order[start:start + slots]
            lengths, width = [r.max_new_tokens or 0 for r in batch], len(batch[0].prompt)
            ids, mask = np.zeros((2, len(batch), width), np.int64)
            for row, r in enumerate(batch):
                ids[row, width - len(r.prompt):], mask[row, width - len(r.prompt):] = r.prompt, 1
            with torch.inference_mode():
                out = model.generate(
                    torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), do_sample=True, temperature=1.0,
                    top_k=0, top_p=1.0, max_new_tokens=max(lengths), pad_token_id=0, eos_token_id=None,
                    stopping_criteria=transformers.StoppingCriteriaList([Lengths(width, lengths)]))
            assert out.shape[1] == width + max(lengths), "transformers ended a batch at another length"
            written += sum(lengths)
        return written

    return run


def ours(generator: Generator, requests: list[Request]) -> Side:
    def run() -> int:
        done = generator.complete(requests, RULES)
        assert all(len(c.ids) == r.max_new_tokens for c, r in zip(done, requests))
        return sum(len(c.ids) for c in done)
    return run


def compare(sides: dict[str, Side], repeats: int) -> dict[str, Any]:
    """Seconds, processor seconds and tokens a second of every side; ratios: how many times longer than ours it takes.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    tokens = {name: side() for name, side in sides.items()}  # compilation, first allocations
    assert len(set(tokens.values())) == 1, tokens
    for i in range(repeats):
        for name in (list(sides) if i % 2 else list(sides)[::-1]):
            clock, processor = time.perf_counter(), time.process_time()
            sides[name]()
            seconds[name].append((time.perf_counter() - clock, time.process_time() - processor))
    clock, processor = ({n: statistics.median(x[i] for x in s) for n, s in seconds.items()} for i in (0, 1))
    written = tokens["ours"]
    return {"tokens": written, "seconds": clock, "processor_seconds": processor,
            "tokens_per_second": {n: written / s for n, s in clock.items()},
            "times_ours": {n: s / clock["ours"] for n, s in clock.items()},
            "processor_times_ours": {n: s / processor["ours"] for n, s in processor.items()}}


def log_prob_gap(model: Transformer, params: Any, requests: list[Request], slots: int) -> dict[str, float]:
    """|log-prob of the engine - of the trainer's forward pass| over the sampled tokens."""
    @jax.jit
    def trainer(params: Any, tokens: Any) -> Any:
        hidden = model.apply({"params": params}, tokens, method="hidden").hidden  # type: ignore[union-attr]
        return lift_tokens(hidden, model.head(params), tokens)[0]

    done = Generator(model, params, batch_size=slots).complete(requests, RULES)
    rows = [np.concatenate([r.prompt, c.ids]) for r, c in zip(requests, done)]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in zip(tokens, rows):
        row[:len(ids)] = ids
    said = np.concatenate([np.asarray(trainer(params, tokens[i:i + 4])) for i in range(0, len(rows), 4)])
    gaps = np.concatenate([np.abs(s[len(r.prompt):len(ids)] - c.logprobs)
                           for s, r, c, ids in zip(said, requests, done, rows)])
    return {"tokens": len(gaps), "mean": float(gaps.mean()), "largest": float(gaps.max())}


def bandwidth(model: Transformer, params: Any, work: Workload, of: float | None) -> dict[str, Any]:
    """Of a decoding step with all slots busy: seconds (from two runs of different lengths), GB that it has to read
    (parameters, and keys and values of what is written), GB a second, share of what the machine reads."""
    c, prompt = model.config, np.arange(1, work.longest + 1, dtype=np.int32)
    generator, times = Generator(model, params, batch_size=work.slots), {}
    for new in (work.limit // 2, work.limit):
        run = ours(generator, [Request(prompt=prompt, seed=s, max_new_tokens=new) for s in range(work.slots)])
        run()
        start = time.perf_counter()
        run()
        times[new] = time.perf_counter() - start
    seconds = (times[work.limit] - times[work.limit // 2]) / (work.limit - work.limit // 2)
    width = jnp.dtype(model.dtype).itemsize
    context = work.longest + 3 * work.limit // 4
    embedding = 0 if c.tied else c.vocab_size * c.hidden_size
    weights = (nbytes(params) // 4 - embedding) * width
    read = weights + 2 * width * c.num_layers * c.num_kv_heads * c.head_dim * work.slots * context
    out = {"seconds": seconds, "tokens_per_second": work.slots / seconds, "gb": read / 1e9,
           "gb_per_second": read / 1e9 / seconds}
    return out | ({} if of is None else {"share_of_bandwidth": out["gb_per_second"] / of})


def measure(config: Any, work: Workload, repeats: int, args: argparse.Namespace) -> dict[str, Any]:
    model = Transformer(config, dtype=jnp.dtype(args.dtype))
    params = init_params(model, jax.random.key(0))
    requests = work.requests(config.vocab_size)
    make = lambda **kwargs: Generator(model, params, batch_size=work.slots, **kwargs)
    generators = {"ours": make(), "without_sharing": make(share_prompts=False), "without_refill": make(refill=False),
                  "without_both": make(share_prompts=False, refill=False)}
    sides = {name: ours(generator, requests) for name, generator in generators.items()}
    with TemporaryDirectory() as scratch:
        if args.torch:
            hf.save(Path(scratch) / "m", Transformer(config), params)
            sides["transformers"] = theirs(Path(scratch) / "m", requests, work.slots)
        result = compare(sides, repeats)
    result["usage"] = {name: vars(g.usage) | {"busy": g.usage.tokens / max(1, g.usage.slot_passes)}
                       for name, g in generators.items()}
    few = requests[::max(1, len(requests) // 16)]
    result["log_prob_gap"] = {dtype: log_prob_gap(Transformer(config, dtype=jnp.dtype(dtype)), params, few, work.slots)
                              for dtype in ("float32", "bfloat16")}
    result["step"] = bandwidth(model, params, work, args.bandwidth)
    return {"parameters": config.num_params, "workload": vars(work), "repeats": repeats, **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--prompts", type=int, default=Workload.prompts)
    parser.add_argument("--samples", type=int, default=Workload.samples)
    parser.add_argument("--mean", type=int, default=Workload.mean, help="mean length of answers")
    parser.add_argument("--limit", type=int, default=Workload.limit, help="longest answer")
    parser.add_argument("--slots", type=int, default=Workload.slots)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--bandwidth", type=float, help="GB a second that the machine reads")
    parser.add_argument("--torch", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    work = Workload(prompts=args.prompts, samples=args.samples, mean=args.mean, limit=args.limit, slots=args.slots)
    if args.small:
        work = Workload(prompts=4, samples=4, shortest=4, longest=16, mean=6, limit=16, slots=4)
    result = measure(config_of("small" if args.small else "10m"), work, 1 if args.small else args.repeats, args)
    machine = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "cores": len(os.sched_getaffinity(0))}
    if args.torch:
        import torch
        import transformers
        machine |= {"torch": torch.__version__, "transformers": transformers.__version__}
    text = json.dumps({"machine": machine, "result": result}, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
