"""The blocks of docs/LAUNCH.md on teacher jobs in parts: as they stand there, on stand-ins."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from distill_jax.cli.main import build_app
from distill_jax.jobs.ops import parse_op
from distill_jax.jobs.parts import Part
from distill_jax.jobs.ray_parts import RayCluster
from tests.launch.test_scripts import sh, tool

ROOT = Path(__file__).resolve().parents[2]


def blocks(language):
    section = (ROOT / "docs" / "LAUNCH.md").read_text().split("## Teacher jobs in parts")[1]
    return re.findall(rf"^```{language}\n(.*?)^```", section, flags=re.M | re.S)


def test_the_slurm_array(tmp_path):
    """Every task of the array, then the join, in the order the dependency says."""
    tool(tmp_path, "sbatch", """
for a in "$@"; do case $a in --array=*) array=${a#*=} ;; --dependency=*) echo "after ${a#*=}" >> "$SEEN" ;; esac; done
[ "${*: -2:1}" = --wrap ] || exit 9
if [ -z "${array-}" ]; then bash -c "${*: -1}"; exit; fi
export SLURM_ARRAY_TASK_MIN=${array%-*} SLURM_ARRAY_TASK_MAX=${array#*-}
export SLURM_ARRAY_TASK_COUNT=$((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN + 1))
for i in $(seq "$SLURM_ARRAY_TASK_MIN" "$SLURM_ARRAY_TASK_MAX"); do SLURM_ARRAY_TASK_ID=$i bash -c "${*: -1}"; done
echo 4711""")
    tool(tmp_path, "distill-jax", f"""
[ "$1" = score ] || {{ echo "$*" >> "$SEEN"; exit; }}
env | grep ^SLURM_ARRAY | tr '\\n' ' ' | {sys.executable} -c "import sys; print(sys.stdin.read())" >> "$SEEN"
[ "$*" = "score traces/ --teacher MODEL --signal topk:64 --part auto" ]""")
    done = sh("bash", "-euc", blocks("bash")[0], path=tmp_path, SEEN=str(tmp_path / "seen"))
    assert done.returncode == 0, done.stderr
    *tasks, after, joined = [x for x in (tmp_path / "seen").read_text().splitlines() if x]
    found = [Part.parse("auto", dict(p.split("=") for p in t.split())) for t in tasks]
    assert found == [Part(index=i, count=16) for i in range(16)]
    assert (after, joined) == ("after afterok:4711", "store join traces/ topk64")


def test_the_indexed_job():
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    [job] = [yaml.safe_load(b) for b in blocks("yaml")]
    validate.validate(job, validate.latest_version(), strict=True)
    spec = job["spec"]
    [container] = spec["template"]["spec"]["containers"]
    index = {"JOB_COMPLETION_INDEX": str(spec["completions"] - 1)}
    assert spec["completionMode"] == "Indexed" and spec["backoffLimitPerIndex"] and container["command"][-2] == "--part"
    assert Part.parse(container["command"][-1], index) == Part(index=15, count=spec["completions"])


def test_the_ray_commands():
    lines = [shlex.split(line) for line in blocks("bash")[1].splitlines()]
    assert [words[1] for words in lines] == ["score", "ops"]
    for _, name, *words in lines:
        group: Any = typer.main.get_command(build_app([name]))
        given = group.commands[name].make_context(name, words).params
        cluster = RayCluster.parse(given["ray"], given["parts"], given["ray_needs"], given["part"])
        assert cluster is not None and cluster.parts >= 32 and cluster.options()["num_cpus"] >= 1
        assert all(parse_op(op).scope != "corpus" for op in given.get("op", ()))
