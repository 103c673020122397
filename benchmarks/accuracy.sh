#!/usr/bin/env bash
# What nano answers under each policy at equal bytes on the GPU, for benchmarks/results/accuracy.md.
#
#     OUT=results benchmarks/accuracy.sh TOKENS
#
# TOKENS is what fmsim.nano.text.pack_tokens wrote, of which held_out.xz is read. On all visible GPUs,
# WORKERS processes each (8). A context is read once for all families and policies. Each PART has a
# folder in OUT with answers.jsonl, from which a run that was cut off goes on, and run.log. No context
# is begun after SECONDS_TO_BEGIN (3600); run it again to ask the rest.
# Settings: PARTS (32k far long 8k), SEEDS, SAMPLES, DEVICE, PYTHON.
# Afterwards `python benchmarks/accuracy.py OUT/*` puts the figures where they ship.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3} device=${DEVICE:-cuda} seconds=${SECONDS_TO_BEGIN:-3600}
gpus=$(nvidia-smi -L 2>/dev/null | wc -l)
[ -z "${CUDA_VISIBLE_DEVICES-}" ] || gpus=$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | wc -l)
workers=$((${WORKERS:-8} * (gpus > 0 ? gpus : 1)))
tokens=$1

ask() { # part; lengths; shares of all policies; policies at shares of their own
  local call=(eval --corpus "$tokens" --out "$OUT/$1" --device "$device" --workers "$workers" --json)
  local length share policy seed task left
  for length in $2; do call+=(--length "$length"); done
  for share in $3; do call+=(--budget "$share gpu"); done
  # held without the prompt's attention, lru keeps the newest, as recency does
  for policy in full recency h2o snapkv lru:cadence=64,on_miss=mask,prompt_history=true lsa foresight \
    oracle; do call+=(--policy "$policy"); done
  for policy in $4; do call+=(--policy "${policy%@*}${policy##*@} gpu"); done
  for seed in ${SEEDS:-2901 2902 2903}; do call+=(--seed "$seed"); done
  for task in niah_single niah_multikey niah_multivalue niah_multiquery memory memory_update \
    multi_round vt; do call+=(--task "$task"); done
  mkdir -p "$OUT/$1"
  for _ in 1 2 3; do # a context that was lost is asked again
    left=$((seconds - SECONDS))
    [ $left -gt 0 ] || break
    "$python" -c "from fmsim.cli import main; main()" "${call[@]}" --samples "${SAMPLES:-16}" \
      --seconds $left >/dev/null 2>>"$OUT/$1/run.log" && break
  done
  tail -n 3 "$OUT/$1/run.log"
}

# What loads its misses keeps all index keys, 18%, and pages for one step's misses.
for part in ${PARTS:-32k far long 8k}; do
  case $part in
  8k | 32k)
    more="lru:budget=@35% native:budget=@25% lsa:on_miss=fallback,budget=@60%"
    more+=" foresight:on_miss=fallback,budget=@35%"
    for share in 17.5% 20% 23.5%; do more+=" lsa:budget=@$share foresight:budget=@$share"; done
    ask "$part" $((${part%k} * 1024)) "10% 12.5% 25%" "$more"
    ;;
  far | long)
    more="lru:budget=@25% native:budget=@25% lsa:on_miss=fallback,budget=@25%"
    more+=" lsa:on_miss=fallback,budget=@35% foresight:on_miss=fallback,budget=@25%"
    if [ "$part" = far ]; then
      ask far 524288:8:2 "10% 12.5% 25% 5% 7.5%" "$more"
    else
      ask long "131072 262144:8:2" "10% 12.5% 25%" "$more lsa:budget=@15% foresight:budget=@15%"
    fi
    ;;
  esac
done
