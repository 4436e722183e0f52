"""Statistics of batch normalisation computed anew, by torch.

    recompute_bn.py FILE.safetensors OUT.safetensors

Reads a ResNet-18 (torchvision's names, without its classifier) and batch.0, batch.1, ... [n, 3, h, w]; writes its
tensors after torch's update_bn over the batches.
"""

import sys

import torch
import torchvision
from safetensors.torch import load_file, save_file

data = load_file(sys.argv[1])
batches = [data.pop(f"batch.{i}") for i in range(sum(name.startswith("batch.") for name in data))]
net = torchvision.models.resnet18()
missing, unexpected = net.load_state_dict(data, strict=False)
assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected, (missing, unexpected)
torch.optim.swa_utils.update_bn(batches, net)
save_file({name: tensor for name, tensor in net.state_dict().items() if name in data}, sys.argv[2])
