#!/bin/bash
# Two nodes on one machine: each rank in a network of its own, a link of 100 Mbit/s
# between them, which is cut while they train and mended afterwards. As root:
#   tools/cluster/netns.sh DETCO SHARDS
# where DETCO is the program. Shows: training across the link and what it carries; both ranks ending
# with code 69 within the timeout of the cut; the run going on from its checkpoint.
set -euo pipefail
detco=$1
data=$2
id=$$
a=detco-a-$id b=detco-b-$id
out=$(mktemp -d)

clean() {
  ip netns pids "$a" 2>/dev/null | xargs -r kill -9 || true
  ip netns pids "$b" 2>/dev/null | xargs -r kill -9 || true
  ip netns del "$a" 2>/dev/null || true
  ip netns del "$b" 2>/dev/null || true
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
  tc -n "$ns" qdisc add dev veth0 root tbf rate 100mbit burst 64kbit latency 50ms
  node=2
done

rank() { # rank RANK NAMESPACE: in the background, what it says goes to $out/said.RANK
  RANK=$1 WORLD_SIZE=2 MASTER_ADDR=10.77.0.1 MASTER_PORT=29700 OMP_NUM_THREADS=1 \
    ip netns exec "$2" "$detco" train detco-small --data "$data" --out "$out/run" --or-resume \
    --start-timeout 60 --set train.device=cpu --set train.threads=1 --set data.workers=1 \
    --set train.batch=32 --set train.epochs=4 --set checkpoint.every_steps=5 \
    --set monitor.every_steps=1 --set dist.timeout_seconds=10 --set dist.slow_seconds=5 \
    >>"$out/said.$1" 2>&1 &
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
