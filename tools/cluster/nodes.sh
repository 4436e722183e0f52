# Two nodes on one machine, for the scripts beside this one, which source it, as root: the network
# namespaces $a and $b with veth0 between them, and $out for files. All of it is gone at exit.
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

# What all ranks train with, and where they meet.
export MASTER_ADDR=10.77.0.1 MASTER_PORT=29700 OMP_NUM_THREADS=1
sets=(--set train.device=cpu --set train.threads=1 --set data.workers=1 --set train.batch=32
  --set monitor.every_steps=1)

shape() { # shape MBIT: bounds the link; without a number it has no bound any more
  for ns in "$a" "$b"; do
    if [[ $# == 0 ]]; then
      tc -n "$ns" qdisc del dev veth0 root
    else
      tc -n "$ns" qdisc replace dev veth0 root tbf rate "${1}mbit" burst 256kbit latency 50ms
    fi
  done
}
