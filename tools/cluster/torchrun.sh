#!/bin/sh
# DetCo under torchrun; the same line on every node, with the first node's name:
#   tools/cluster/torchrun.sh HOST NODES shards/train runs/a
# torchrun starts all ranks again, up to three times, when one is lost; --or-resume goes on from the
# last checkpoint. The run's folder is written by rank 0, wherever torchrun puts it: keep it on a
# disk that all nodes see.
exec torchrun --no-python --nnodes="$2" --nproc-per-node=8 --max-restarts=3 \
  --rdzv-backend=c10d --rdzv-endpoint="$1:29400" --rdzv-id=detco \
  detco train detco-r50 --data "$3" --out "$4" --or-resume --set "model.bn_splits=$(($2 * 8))"
