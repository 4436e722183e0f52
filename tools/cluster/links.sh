#!/bin/bash
# Holds `detco plan` against measured steps: two nodes on one machine, each a network namespace with
# one or two ranks, and links of several speeds between them. As root:
#   tools/cluster/links.sh DETCO SHARDS [STEPS]
# where DETCO is the program. The steps of the same ranks over a link without a bound are taken as
# the computing; what a slower link adds is what the plan has to foresee. Prints a table.
set -euo pipefail
detco=$1
data=$2
steps=${3:-16}
# shellcheck source=nodes.sh
source "$(dirname "${BASH_SOURCE[0]}")/nodes.sh"
sets+=(--set "train.steps_max=$steps" --set train.epochs=100 --set dist.bucket_mb=1)

train() { # train NAME RANKS: so many ranks in all, half of them in each namespace
  local pids=() rank
  for ((rank = 0; rank < $2; rank++)); do
    local ns=$a
    ((rank < $2 / 2)) || ns=$b
    RANK=$rank WORLD_SIZE=$2 \
      ip netns exec "$ns" "$detco" train detco-small --data "$data" --out "$out/$1" \
      "${sets[@]}" >>"$out/said.$1.$rank" 2>&1 &
    pids+=($!)
  done
  for rank in "${pids[@]}"; do
    wait "$rank" || { cat "$out/said.$1".*; exit 1; }
  done
}

# Milliseconds of a step without waiting for data: the median, the first three left out.
milliseconds() {
  python3 - "$out/$1/metrics.jsonl" <<'PY'
import json, statistics, sys
records = [json.loads(line) for line in open(sys.argv[1])]
steps = [r for r in records if "images_per_second" in r and r["step"] > 3]
print(statistics.median(32e3 / r["images_per_second"] * (1 - r["wait_share"]) for r in steps))
PY
}

foreseen() { # foreseen MILLISECONDS RANKS GBIT: milliseconds of a step, by the plan
  "$detco" plan --recipe detco-small --nodes 2 --gpus $(($2 / 2)) --batch $((32 / $2)) \
    --step-ms "$1" --net "$3" --latency-us 0 --set dist.bucket_mb=1 --json |
    python3 -c 'import json, sys; print(32e3 / json.load(sys.stdin)["forecast"]["images_per_s"])'
}

echo "| ranks | link, Mbit/s | computing, ms | step foreseen, ms | step measured, ms | foreseen / measured |"
echo "|---|---|---|---|---|---|"
for ranks in 2 4; do
  for mbit in 300 100 50; do
    # Right before: other programs on the machine change what a step takes from minute to minute.
    train "free-$mbit-$ranks" $ranks
    shape $mbit
    train "$mbit-$ranks" $ranks
    shape
    computing=$(milliseconds "free-$mbit-$ranks")
    python3 - $ranks $mbit "$computing" "$(foreseen "$computing" $ranks "${mbit}e-3")" \
      "$(milliseconds "$mbit-$ranks")" <<'PY'
import sys
ranks, mbit, *times = sys.argv[1:]
computing, foreseen, measured = map(float, times)
print(f"| {ranks} | {mbit} | {computing:.0f} | {foreseen:.0f} | {measured:.0f} | {foreseen / measured:.2f} |")
PY
  done
done
