"""What torchvision makes of the trainer's weights.

    python torchvision_resnet.py

Standard input brings a line of JSON (`{"backbone": "resnet50", "threads": 1}`) and two groups of tensors
(`tensors.py`): the weights (loaded strictly, so names and shapes are torchvision's) and `images`
[n, 3, h, w]. One group leaves: `res2`..`res5` and `features` (the pooled Res5), in evaluation mode.
"""

import json
import sys

import torch
import torchvision
from tensors import receive, send


@torch.no_grad()
def main():
    case = json.loads(sys.stdin.buffer.readline())
    torch.set_num_threads(case["threads"])
    net = getattr(torchvision.models, case["backbone"])()
    net.fc = torch.nn.Identity()
    net.load_state_dict(receive(), strict=True)
    net.eval()
    maps = {}
    for level, stage in enumerate((net.layer1, net.layer2, net.layer3, net.layer4), start=2):
        stage.register_forward_hook(lambda _, __, out, level=level: maps.update({f"res{level}": out}))
    images = receive()["images"]
    features = net(images)
    send({**maps, "features": features})


if __name__ == "__main__":
    main()
