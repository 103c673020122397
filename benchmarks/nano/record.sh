#!/usr/bin/env bash
# Record a nano's traces and train its memory indexer, on all GPUs of this machine.
#
#     OUT=results benchmarks/nano/record.sh TOKENS MODEL
#
# TOKENS is what fmsim.nano.text.pack_tokens wrote, MODEL the nano's directory. Traces of held-out
# text are what ships; those of the training text are what the indexers learn from, from states one
# window old. One indexer is trained for each set of layers of LAYERS. The best of those with at most
# MOST layers, by the mass that it recalls on the held-out traces, says whose index keys ship.
# OUT gets shards of traces.tar (`cat traces.tar.* | tar x`), the indexers with their logs and
# evaluations in indexers.tgz, and record.log: eight files at most, each below 16 MiB.
# It needs fmsim's dependencies and those of fmsim[model]. On four H100 some 3 minutes to record and 2
# to train are expected; it has not run on GPUs yet.
# Settings: HELD and TRAIN as CONTEXT:STEPS and CONTEXT:COUNT, STEPS of a training trace, PER_GPU
# processes, LAYERS, MOST, INDEXER_STEPS, WORK the folder in between, N GPUs, DEVICE, PYTHON, and
# PART: "record" or "train" alone, for two calls of one machine.
set -u
root=$(cd "$(dirname "$0")/../.." && pwd)
tokens=$1 model=$2
python=${PYTHON:-python3} device=${DEVICE:-cuda} work=${WORK:-$(mktemp -d)} part=${PART:-all}
gpus=${N:-$(nvidia-smi -L | wc -l)} per_gpu=${PER_GPU:-3} steps=${STEPS:-512} most=${MOST:-2}
held=${HELD:-512000:512 128000:192 32768:128}
train=${TRAIN:-524288:6 131072:6 32768:12 8192:8}
layers=${LAYERS:-0,1,2,3,4,5 0,2,4 1,3,5 1,4}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=4
mkdir -p "$OUT" "$work"/{held,train,log,indexers,ship}
cli() { "$python" -c "from fmsim.cli import main; main()" "$@"; }

jobs_of() { # one line a job, the longest contexts first
  for item in $held; do
    context=${item%:*} name=nano-$(((${item%:*} + 500) / 1000))k
    [ "$context" = 512000 ] && name=nano-500k
    echo "$context $name held --split held_out --context $context --steps ${item#*:}"
  done
  for item in $train; do
    for seed in $(seq 1 "${item#*:}"); do
      echo "${item%:*} train-${item%:*}-$seed train --split train --context ${item%:*} --seeds $seed --steps $steps"
    done
  done
}

if [ "$part" != train ]; then
  began=$SECONDS
  # every third job is a long one, so that a GPU seldom holds two of them
  jobs_of | sort -s -n -r -k1,1 | awk '{ line[NR] = $0 } END {
    long = 1; short = NR; while (long <= short) {
      print line[long++]
      for (i = 0; i < 2 && long <= short; i++) print line[short--] } }' >"$work/jobs"
  export GPUS=$gpus PYTHON=$python RECORD_DEVICE=$device WORK=$work TOKENS=$tokens MODEL=$model
  xargs -P $((gpus * per_gpu)) --process-slot-var=SLOT -L 1 bash -c '
    name=$2 folder=$3; shift 3
    CUDA_VISIBLE_DEVICES=$((SLOT % GPUS)) $PYTHON -u -m fmsim.nano.measure.record_traces \
      --model "$MODEL" --corpus "$TOKENS" --out "$WORK/$folder" --name "$name" "$@" \
      --device "$RECORD_DEVICE" >"$WORK/log/$name.log" 2>&1 || echo "$name failed"' bash \
    <"$work/jobs"
  echo "recorded in $((SECONDS - began)) s: $(ls "$work"/held | wc -l) and $(ls "$work"/train | wc -l) files"
fi
[ "$part" = record ] && { tail -qn 4 "$work"/log/nano-*.log; exit; }

began=$SECONDS number=0
cli indexer native "$model" --out "$work/native.safetensors" >"$work/log/native.log" 2>&1
known=$(ls "$work"/train/*.safetensors | grep -v -- "-1-") # of each length the first context judges
judging=$(ls "$work"/train/*-1-*.safetensors | sed 's/^/--held-out /')
for chosen in $layers; do
  name=layers-${chosen//,/-}
  (
    export CUDA_VISIBLE_DEVICES=$((number % gpus))
    cli indexer train $known $judging --layers "$chosen" --state-age 1 --min-layers 1 \
      --steps "${INDEXER_STEPS:-2000}" --out "$work/indexers/$name.safetensors" --device "$device" \
      >"$work/indexers/$name.log" 2>&1
    cli indexer eval "$work/indexers/$name.safetensors" "$work"/held/*.safetensors --state-age 1 \
      --native "$work/native.safetensors" --json >"$work/indexers/$name.json" 2>>"$work/indexers/$name.log"
  ) &
  number=$((number + 1))
done
wait
tail -qn 1 "$work"/indexers/*.log
best=$($python - "$work/indexers" "$most" <<'P'
import json, sys
from pathlib import Path

found = {}
for path in sorted(Path(sys.argv[1]).glob("*.json")):
    if not path.read_text().strip():
        continue
    row = json.loads(path.read_text())
    place = row["kept_shares"].index(0.1)
    recall = {key: row[key]["lsa (max)"][place] for key in ("mass_recall", "golden_recall")}
    print(path.stem, recall, file=sys.stderr)
    if len(path.stem.split("-")) - 1 <= int(sys.argv[2]):
        found[path.stem] = recall["mass_recall"]
print(max(found, key=found.get))
P
)
keyed=${best#layers-}
echo "indexers in $((SECONDS - began)) s; the keys of layers ${keyed//-/,} ship"
for context in $(ls "$work"/held/*.safetensors | sed 's/-[a-z]*.safetensors$//' | sort -u); do
  cli trace pack "$context"-*.safetensors --keyed "${keyed//-/,}" --out "$work/ship"
done
cp "$work/indexers/$best.safetensors" "$work/ship/indexer.safetensors"
tar cf - -C "$work/ship" . | split -b 15M - "$OUT/traces.tar."
tar czf "$OUT/indexers.tgz" -C "$work" indexers log
ls -l "$OUT"
