#!/usr/bin/env bash
# Train a nano on all GPUs of this machine, then ask it and measure how restless its selection is.
#
#     OUT=results benchmarks/nano/train.sh TOKENS MODEL CURRICULUM SECONDS EXAM_SECONDS
#
# TOKENS is what fmsim.nano.text.pack_tokens wrote, MODEL the directory to go on from. OUT gets the
# log, the weights, answers.jsonl. It takes about 50 s more than SECONDS + EXAM_SECONDS: imports,
# Triton's compilation, the weights' export. EXAM_SECONDS of 0 asks nothing.
# Settings: N processes, DEVICE cuda or cpu, WORKERS that make batches, PLAN of questions, PYTHON,
# SEED of the text, CALM=0 to leave out the restlessness, RUN the folder of checkpoint and log (a
# new one), STAGE to begin with, UNTIL the stage to end before, RESUME=1 to go on with the moments
# that an earlier call left in RUN.
set -u
root=$(cd "$(dirname "$0")/../.." && pwd)
tokens=$1 model=$2 curriculum=$3 seconds=$4 exam_seconds=$5
python=${PYTHON:-python3} device=${DEVICE:-cuda} run=${RUN:-$(mktemp -d)}
processes=${N:-$(nvidia-smi -L | wc -l)}
plan=${PLAN:-many:8192:8 many:32768:8 many:131072:4 families:32768:100 families:131072:100
  many:524288:4 families:524288:60 single:1024:100 families:8192:100}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1 WORLD_SIZE=$processes
export MASTER_ADDR=127.0.0.1
mkdir -p "$run" "$OUT"
if [ -n "${RESUME:-}" ]; then
  mv "$run/log.jsonl" "$run/log-$(date +%s).jsonl" || exit 1
fi
for folder in "$run" "$OUT"; do # or an earlier run's end would be taken for this one's
  [ -e "$folder/log.jsonl" ] && echo "$folder has a run's log; give another RUN or OUT" && exit 1
done

export MASTER_PORT=29531
for rank in $(seq 0 $((processes - 1))); do
  RANK=$rank $python -u -m fmsim.nano.training.train --corpus "$tokens" --model "$model" \
    --out "$run" --curriculum "$curriculum" --seconds "$seconds" --fit --seed "${SEED:-0}" \
    --stage "${STAGE:-0}" ${UNTIL:+--until "$UNTIL"} ${RESUME:+--resume "$run/state.pt"} \
    --workers "${WORKERS:-24}" --device "$device" >"$run/rank$rank.log" 2>&1 &
done
# a process may hang at its end; the log says when all is written
end=$((SECONDS + seconds + 45))
while [ $SECONDS -lt $end ] && ! grep -qs '"done"' "$run/log.jsonl" && [ -n "$(jobs -r)" ]; do
  sleep 0.2
done
kill -9 $(jobs -p) 2>/dev/null
for log in "$run"/rank*.log; do tail -n 4 "$log" | cut -c1-300; done
cp -r "$run/log.jsonl" "$run/model" "$OUT"/ || exit 1
[ "$exam_seconds" = 0 ] && exit

export MASTER_PORT=29541
exams=
for rank in $(seq 0 $((processes - 1))); do
  RANK=$rank timeout $((exam_seconds + 40)) $python -u "$root/benchmarks/nano/examine.py" \
    "$run/model" $plan --corpus "$tokens" --out "$OUT/answers.jsonl" --seconds "$exam_seconds" \
    --device "$device" >"$run/exam$rank.log" 2>&1 &
  exams="$exams $!"
done
if [ "$device" = cuda ] && [ "${CALM:-1}" != 0 ]; then
  CUDA_VISIBLE_DEVICES=$((processes - 1)) timeout 60 $python -m fmsim.nano.measure.calm \
    "$run/model" 32768 131072 --corpus "$tokens" --out "$OUT/answers.jsonl" >"$run/calm.log" 2>&1
fi
wait $exams
tail -n 60 "$run/exam0.log" | cut -c1-200
