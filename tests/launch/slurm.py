"""Stand-ins for SLURM's commands: sbatch runs the job here, srun starts two tasks on this host, scontrol notes."""

import os


def tool(folder, name, body):
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path


def slurm(folder):
    tool(folder, "sbatch", f'while [[ $1 == --* ]]; do shift; done; SLURM_JOB_ID={os.getpid()} exec bash "$@"')
    tool(folder, "scontrol", f'echo "$1" >> {folder}/scontrol.log')
    tool(folder, "srun", """
while [[ $1 == --* ]]; do shift; done
export SLURM_NTASKS=2 SLURM_JOB_NODELIST=localhost
for i in 0 1; do SLURM_PROCID=$i "$@" & pids+=($!); done
trap 'kill -TERM "${pids[@]}"' TERM
code=0
for p in "${pids[@]}"; do
  while kill -0 "$p" 2>/dev/null; do wait "$p" || c=$?; done
  wait "$p" 2>/dev/null || code=$?
done
exit $code""")
    return folder
