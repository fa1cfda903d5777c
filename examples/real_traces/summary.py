"""What `examples/real_traces.sh` has to tell: rows, rejections, tokens, teacher and its entropy, held-out losses."""

import json
import sys
from pathlib import Path


def main(out: Path) -> None:
    for name in ("qwen", "qwen3", "8k"):
        s = json.loads((out / name / "summary.json").read_text())
        print(f"{name}: {s['rows_in']} rows in, {s['traces']} traces, {s['kept']} kept; rejected {s['rejected']}")
        print(f"    tokens {s['by_role_tokens']}")
    runs = out / "runs"
    for name in ("real_qwen_vocab", "real_teacher"):
        done = json.loads((runs / name / "done.json").read_text())
        print(f"{name}: {done['seconds']:.0f} s, held-out {done['result'].get('heldout', 'not measured')}")
    score = json.loads((out / "score.json").read_text())
    for role, s in (("all", score), *score["by_role"].items()):
        if s.get("tokens"):
            print(f"teacher on {role}: {s['tokens']} tokens, NLL {s['nll']:.4f}, entropy {s['entropy']:.4f} nats, "
                  f"retained mass {s['mass']:.4f}")
    rows = []
    for run in sorted(runs.glob("students-*")):
        done = {k: json.loads((run / k / "done.json").read_text()) for k in ("kd", "ce")}
        loss = {k: v["result"]["heldout"]["cross_entropy"] for k, v in done.items()}
        rows.append(loss)
        print(f"{run.name}: held-out cross-entropy  KD {loss['kd']:.4f}  CE alone {loss['ce']:.4f}  "
              f"difference {loss['kd'] - loss['ce']:+.4f}")
    if rows:
        mean = {k: sum(r[k] for r in rows) / len(rows) for k in ("kd", "ce")}
        print(f"mean of {len(rows)} seeds: KD {mean['kd']:.4f}  CE alone {mean['ce']:.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
