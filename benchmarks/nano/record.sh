#!/usr/bin/env bash
# Record a nano's traces and train its memory indexer, on all GPUs of this machine.
#
#     OUT=results benchmarks/nano/record.sh TOKENS MODEL
#
# TOKENS is what fmsim.nano.text.pack_tokens wrote, MODEL the nano's directory. Traces of held-out
# text are what ships; those of the training text are what the indexers learn from, from states one
# window old. One indexer is trained for each set of layers of LAYERS.
# PART says what is done: "record" and "train" want a GPU and leave in OUT the held-out traces with
# all layers' index keys (shards of traces.tar: `cat traces.tar.* | tar x`), and the indexers with
# the logs (shards of indexers.tgz), each file below 16 MiB. "choose" reads those two from OUT on any
# machine: it evaluates the indexers on the held-out traces, takes the best by mass of those with at
# most MOST layers, and writes what ships into OUT/ship: the indexer, and the traces with the keys of
# its layers (of the contexts WHOLE, of all layers), those that SHORTER names cut: 30 MB hold no more.
# Settings: HELD and TRAIN as CONTEXT:STEPS and CONTEXT:COUNT, STEPS of a training trace, PER_GPU
# processes, PER_JOB contexts of one process, LAYERS, MOST, INDEXER_STEPS, WHOLE, SHORTER, WORK the
# folder in between, N GPUs, DEVICE, PYTHON. On two H200 recording took 201 s, the indexers 98 s.
set -u
root=$(cd "$(dirname "$0")/../.." && pwd)
tokens=$1 model=$2
python=${PYTHON:-python3} device=${DEVICE:-cuda} work=${WORK:-$(mktemp -d)} part=${PART:-record train choose}
gpus=${N:-$(nvidia-smi -L | wc -l)} per_gpu=${PER_GPU:-3} steps=${STEPS:-512} most=${MOST:-2}
held=${HELD:-512000:512 128000:320 32768:256}
train=${TRAIN:-524288:4 131072:4 32768:6 8192:4} per_job=${PER_JOB:-2}
layers=${LAYERS:-0,1,2,3,4,5 1,4 0,3 2,5 4 2}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=4
mkdir -p "$OUT" "$work"/{held,train,log,indexers}
cli() { "$python" -c "from fmsim.cli import main; main()" "$@"; }

jobs_of() { # one line a job, the longest contexts first
  for item in $held; do
    context=${item%:*} name=nano-$((${item%:*} / 1000))k
    [ "$context" = 512000 ] && name=nano-500k
    echo "$context $name held --split held_out --context $context --steps ${item#*:}"
  done
  for item in $train; do
    local context=${item%:*} first last
    for first in $(seq 1 "$per_job" "${item#*:}"); do
      last=$((first + per_job - 1 < ${item#*:} ? first + per_job - 1 : ${item#*:}))
      name=train-$context
      [ "$first" = "$last" ] && name=$name-$first # where there are several, the seed is added
      echo "$context $name train --split train --context $context --steps $steps --seeds" \
        $(seq "$first" "$last")
    done
  done
}

if [[ $part = *record* ]]; then
  began=$SECONDS
  # every third job is a long one, so that a GPU seldom holds two of them
  jobs_of | sort -s -n -r -k1,1 | awk '{ line[NR] = $0 } END {
    long = 1; short = NR; while (long <= short) {
      print line[long++]
      for (i = 0; i < 2 && long <= short; i++) print line[short--] } }' >"$work/jobs"
  export GPUS=$gpus PYTHON=$python RECORD_DEVICE=$device WORK=$work TOKENS=$tokens MODEL=$model
  xargs -P $((gpus * per_gpu)) --process-slot-var=SLOT -L 1 bash -c '
    name=$2 folder=$3 log=$WORK/log/$2-${!#}.log; shift 3
    CUDA_VISIBLE_DEVICES=$((SLOT % GPUS)) $PYTHON -u -m fmsim.nano.measure.record_traces \
      --model "$MODEL" --corpus "$TOKENS" --out "$WORK/$folder" --name "$name" \
      --device "$RECORD_DEVICE" "$@" >"$log" 2>&1 || echo "$log: failed"
    echo "$(date +%T) $name $*"' bash <"$work/jobs"
  echo "recorded in $((SECONDS - began)) s: $(ls "$work"/held | wc -l) and $(ls "$work"/train | wc -l) files"
  tail -qn 4 "$work"/log/nano-*.log
  tar cf - -C "$work/held" . | split -b 15M - "$OUT/traces.tar."
  tar czf "$OUT/logs.tgz" -C "$work" log
fi

if [[ $part = *train* ]]; then
  began=$SECONDS number=0
  known=$(ls "$work"/train/*.safetensors | grep -v -- "-1-") # of each length the first context judges
  judging=$(ls "$work"/train/*-1-*.safetensors | sed 's/^/--held-out /')
  for chosen in $layers; do
    name=layers-${chosen//,/-}
    CUDA_VISIBLE_DEVICES=$((number % gpus)) cli indexer train $known $judging --layers "$chosen" \
      --state-age 1 --min-layers 1 --steps "${INDEXER_STEPS:-1000}" --device "$device" \
      --out "$work/indexers/$name.safetensors" >"$work/log/$name.log" 2>&1 &
    number=$((number + 1))
  done
  wait
  tail -qn 1 "$work"/log/layers-*.log
  echo "indexers in $((SECONDS - began)) s"
  rm -f "$work"/indexers/*.state
  tar czf - -C "$work" indexers log | split -b 15M - "$OUT/indexers.tgz."
fi
ls -l "$OUT"
[[ $part = *choose* ]] || exit 0

rm -rf "$OUT/ship" "$work/all"
mkdir -p "$OUT/ship" "$work/all"
cat "$OUT"/traces.tar.* | tar xf - -C "$work/all"
cat "$OUT"/indexers.tgz.* | tar xzf - -C "$work"
for found in "$work"/indexers/*.safetensors; do
  cli indexer eval "$found" "$work"/all/*.safetensors --state-age 1 --json >"${found%.safetensors}.json"
done
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
echo "the keys of layers ${keyed//-/,} ship"
$python "$root/benchmarks/nano/ship.py" "$work/all" "$OUT/ship" --keyed "${keyed//-/,}" \
  --whole "${WHOLE-nano-32k}" --steps ${SHORTER-nano-500k-memory:512 nano-128k-needles:320
  nano-128k-memory:198 nano-128k-continuation:96 nano-32k-memory:168 nano-32k-continuation:96}
cp "$work/indexers/$best.safetensors" "$OUT/ship/indexer.safetensors"
ls -l "$OUT/ship"
