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
id=$$
a=detco-a-$id b=detco-b-$id
out=$(mktemp -d)

clean() {
  for ns in "$a" "$b"; do
    ip netns pids "$ns" 2>/dev/null | xargs -r kill -9 || true
    ip netns del "$ns" 2>/dev/null || true
  done
  rm -rf "$out"
}
trap clean EXIT

ip netns add "$a"
ip netns add "$b"
ip link add veth0 netns "$a" type veth peer name veth0 netns "$b"
node=1
for ns in "$a" "$b"; do
  ip -n "$ns" address add 10.77.0.$node/24 dev veth0
  ip -n "$ns" link set lo up
  ip -n "$ns" link set veth0 up
  node=2
done

sets=(--set train.device=cpu --set train.threads=1 --set data.workers=1 --set train.batch=32
  --set "train.steps_max=$steps" --set train.epochs=100 --set monitor.every_steps=1
  --set dist.bucket_mb=1)

train() { # train NAME RANKS: so many ranks in all, half of them in each namespace
  local pids=() rank
  for ((rank = 0; rank < $2; rank++)); do
    local ns=$a
    ((rank < $2 / 2)) || ns=$b
    RANK=$rank WORLD_SIZE=$2 MASTER_ADDR=10.77.0.1 MASTER_PORT=29700 OMP_NUM_THREADS=1 \
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
shape() { # shape MBIT, or nothing to unbind
  for ns in "$a" "$b"; do
    if [[ $# == 0 ]]; then
      tc -n "$ns" qdisc del dev veth0 root
    else
      tc -n "$ns" qdisc replace dev veth0 root tbf rate "${1}mbit" burst 256kbit latency 50ms
    fi
  done
}

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
