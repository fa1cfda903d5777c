#!/usr/bin/env bash
# The main job on real public traces, on a two-core CPU:   examples/real_traces.sh DATA_DIR [OUT]
#
# Imports GSM8K, model solutions with right/wrong flags, DeepSeek-R1 and Qwen3 traces and the EIT granularity traces with
# the Qwen2.5 tokenizer, verifies them, builds a store, and trains a Qwen2-architecture student for 50 steps at that
# vocabulary. Then, with an 8k vocabulary trained on the same traces: a teacher twice the width, scores, and students
# with KD and with cross-entropy alone for equal steps on three seeds; held-out losses side by side; evaluation, export.
#
# MAX_ROWS=600 rows of each file are read (set it to 0 for all); TEACHER_STEPS=200, STUDENT_STEPS=100, SEEDS="0 1 2" likewise.
# About an hour on two busy cores. What it printed: benchmarks/results/real_traces.md.
set -euo pipefail
cd "$(dirname "$0")/.."
data="${1:?usage: examples/real_traces.sh DATA_DIR [OUT]}"
out="${2:-runs/real_traces}"
max_rows="${MAX_ROWS:-600}" teacher_steps="${TEACHER_STEPS:-200}" student_steps="${STUDENT_STEPS:-100}"
seeds="${SEEDS:-0 1 2}"
if [ ! -d "$data/2_traces/r1_math500" ]; then
  echo "skipped: $data has no 2_traces/r1_math500 (the real traces are not here)"
  exit 0
fi
dj() { "${PYTHON:-python}" -m distill_jax "$@"; }
limit=(); [ "$max_rows" -gt 0 ] && limit=(--max-rows "$max_rows")
mkdir -p "$out"

traces=("$data/1_math/gsm8k/train.jsonl.gz" "$data/1_math/gsm8k/example_model_solutions.jsonl.gz"
        "$data"/2_traces/r1_math500/*.jsonl* "$data"/2_traces/eit_granularity/*.json.gz)
qwen3=("$data"/2_traces/qwen3_think_on_off/qwen3-8b__*.jsonl.gz "$data"/2_traces/qwen3_think_on_off/qwen3.5-9b__*.jsonl.gz)
join=(--join "$data/2_traces/qwen3_think_on_off/items.json:id=item_id")

echo "== import with the Qwen2.5 tokenizer"
dj import "${traces[@]}" --tokenizer "$data/7_tokenizers/qwen2.5" --out "$out/qwen" "${limit[@]}"
dj import "${qwen3[@]}" "${join[@]}" --tokenizer "$data/7_tokenizers/qwen2.5" --out "$out/qwen3" "${limit[@]}"
dj store inspect "$out/qwen3" | sed -n 1,60p  # reads to the end: under pipefail a closed pipe would stop the script

echo "== 50 steps at the Qwen2.5 vocabulary"
dj train examples/real_traces/qwen_vocab.py --set runs="$out/runs" \
  --set source.sources.0.path="$out/qwen" --set source.sources.1.path="$out/qwen3" \
  --set student.tokenizer="$data/7_tokenizers/qwen2.5"

echo "== an 8k vocabulary, the same traces, a teacher"
[ -f "$out/8k.model" ] || "${PYTHON:-python}" -m examples.real_traces.tokenizer "$out/qwen" "$out/8k.model" 8000
dj import "${traces[@]}" --tokenizer "$out/8k.model" --out "$out/8k" "${limit[@]}"
dj train examples/real_traces/teacher.py --set runs="$out/runs" --set source.path="$out/8k" \
  --set student.tokenizer="$out/8k.model" --set steps="$teacher_steps"
dj score "$out/8k" --teacher "$out/runs/real_teacher" --signal topk:64 --skip-long --json | tee "$out/score.json"

echo "== students: KD and cross-entropy, equal steps"
for seed in $seeds; do
  dj train examples/real_traces/students.py --set runs="$out/runs" --set name="students-$seed" --set seed="$seed" \
    --set source.path="$out/8k" --set student.tokenizer="$out/8k.model" --set steps="$student_steps"
done

echo "== export and evaluation"
first="$out/runs/students-${seeds%% *}"
dj export "$first/kd" --to hf "$out/hf"
dj verify-hf "$out/hf"
dj eval "$first/ce" "$first/kd" --task answer_match --data "$data/1_math/gsm8k/train.jsonl.gz" --questions 32 \
  --max-new-tokens 128 --out "$out/eval"
"${PYTHON:-python}" -m examples.real_traces.summary "$out"
