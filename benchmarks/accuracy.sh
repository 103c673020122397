#!/usr/bin/env bash
# What nano answers under each policy at equal bytes on the GPU, for benchmarks/results/accuracy.md.
#
#     OUT=results benchmarks/accuracy.sh TOKENS
#
# TOKENS is what fmsim.nano.text.pack_tokens wrote, of which held_out.xz is read. On all visible GPUs,
# WORKERS processes each (8). A context is read once for all families and policies. OUT gets
# report.json and answers.jsonl, from which a run that was cut off goes on, and run.log. No context
# is begun after SECONDS (260); what is there is reported. Run it again to ask the rest.
# Settings, in the words of `fmsim eval`: LENGTHS, SAMPLES, SEEDS, BUDGETS, POLICIES, and MORE for those
# with budgets of their own; DEVICE, PYTHON.
# Afterwards `python benchmarks/accuracy.py OUT/report.json` puts the figures where they ship.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3} device=${DEVICE:-cuda} seconds=${SECONDS_TO_BEGIN:-260}
gpus=$(nvidia-smi -L 2>/dev/null | wc -l)
[ -z "${CUDA_VISIBLE_DEVICES-}" ] || gpus=$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | wc -l)
workers=$((${WORKERS:-8} * (gpus > 0 ? gpus : 1)))
fallback="lsa:on_miss=fallback,budget=25% gpu;lsa:on_miss=fallback,budget=35% gpu"
fallback+=";foresight:on_miss=fallback,budget=25% gpu"
call=(eval --corpus "$1" --out "$OUT" --device "$device" --workers "$workers" --seconds "$seconds")
for length in ${LENGTHS:-8192 32768 131072 262144:8:2 524288:8:2}; do call+=(--length "$length"); done
for seed in ${SEEDS:-2901 2902 2903}; do call+=(--seed "$seed"); done
for task in niah_single niah_multikey niah_multivalue niah_multiquery memory memory_update \
  multi_round vt; do call+=(--task "$task"); done
IFS=';' read -ra budgets <<<"${BUDGETS:-10% gpu;12.5% gpu;25% gpu}"
for budget in "${budgets[@]}"; do call+=(--budget "$budget"); done
held=cadence=64,on_miss=mask
read -ra policies <<<"${POLICIES:-full recency h2o snapkv lru:$held lru:$held,prompt_history=true \
  lsa foresight oracle}"
# at budgets of their own: what all index keys are needed for takes 18%, and pages for misses
IFS=';' read -ra more <<<"${MORE:-lru:budget=25% gpu;native:budget=25% gpu;$fallback}"
for policy in "${policies[@]}" "${more[@]}"; do call+=(--policy "$policy"); done
mkdir -p "$OUT"
for _ in 1 2 3; do # a context that was lost is asked again
  began=$SECONDS
  "$python" -c "from fmsim.cli import main; main()" "${call[@]}" --samples "${SAMPLES:-16}" --json \
    >/dev/null 2>>"$OUT/run.log" && break
  seconds=$((seconds - (SECONDS - began)))
  [ "$seconds" -gt 0 ] || break
  call+=(--seconds "$seconds")
done
tail -n 3 "$OUT/run.log"
