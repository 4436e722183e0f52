#!/bin/bash
# Two nodes on one machine: each rank in a network of its own, a link of 100 Mbit/s
# between them, which is cut while they train and mended afterwards. As root:
#   tools/cluster/netns.sh DETCO SHARDS
# where DETCO is the program. Shows: training across the link and what it carries; both ranks ending
# with code 69 within the timeout of the cut; the run going on from its checkpoint.
set -euo pipefail
detco=$1
data=$2
# shellcheck source=nodes.sh
source "$(dirname "${BASH_SOURCE[0]}")/nodes.sh"
sets+=(--start-timeout 60 --set train.epochs=4 --set checkpoint.every_steps=5
  --set dist.timeout_seconds=10 --set dist.slow_seconds=5)
shape 100

rank() { # rank RANK NAMESPACE: in the background, what it says goes to $out/said.RANK
  RANK=$1 WORLD_SIZE=2 ip netns exec "$2" "$detco" train detco-small --data "$data" \
    --out "$out/run" --or-resume "${sets[@]}" >>"$out/said.$1" 2>&1 &
}

steps() { grep -c '"loss"' "$out/run/metrics.jsonl" 2>/dev/null || true; }
sent() { ip netns exec "$1" cat /sys/class/net/veth0/statistics/tx_bytes; }

wait_for() { # until so many steps are made
  while [[ $(steps) -lt $1 ]]; do
    sleep 0.1
    kill -0 "$first" || { cat "$out"/said.*; exit 1; }
  done
}

rank 0 "$a"; first=$!
rank 1 "$b"; second=$!
wait_for 4
begin=$(sent "$a") from=$(steps)
wait_for 12
bytes=$(( ($(sent "$a") - begin) / ($(steps) - from) ))
counted=$(grep -o '"dist/megabytes_sent":[0-9.]*' "$out/run/metrics.jsonl" | tail -1)
echo "across the link: $bytes bytes a step sent by rank 0, $counted by its own count"

echo "cutting the link after step $(steps)"
ip -n "$a" link set veth0 down
cut=$SECONDS
code=0; wait "$first" || code=$?
echo "rank 0 ended with code $code after $((SECONDS - cut)) s"
[[ $code == 69 ]]
code=0; wait "$second" || code=$?
echo "rank 1 ended with code $code after $((SECONDS - cut)) s"
[[ $code == 69 ]]
grep -h '^error' "$out"/said.*

echo "mending the link"
ip -n "$a" link set veth0 up
at=$(steps)
rank 0 "$a"; first=$!
rank 1 "$b"; second=$!
wait "$first"
wait "$second"
grep -h '^resuming\|^finished' "$out/said.0"
twice=$(grep '"loss"' "$out/run/metrics.jsonl" | grep -o '"step":[0-9]*' | sort | uniq -d | wc -l)
echo "$(steps) steps in the metrics ($at before the cut), $twice of them twice"
[[ $twice == 0 ]]
