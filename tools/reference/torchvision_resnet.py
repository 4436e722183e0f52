"""What torchvision makes of the trainer's weights.

    python torchvision_resnet.py FOLDER

FOLDER holds `case.json` (`{"backbone": "resnet50"}`), `weights.safetensors` (loaded strictly, so names
and shapes are torchvision's) and `images.safetensors` (`images` [n, 3, h, w]). Writes `maps.safetensors`:
`res2`..`res5` and `features` (the pooled Res5), all in evaluation mode.
"""

import json
import sys
from pathlib import Path

import torch
import torchvision
from safetensors.torch import load_file, save_file


@torch.no_grad()
def main(folder):
    case = json.loads((folder / "case.json").read_text())
    torch.set_num_threads(case["threads"])
    net = getattr(torchvision.models, case["backbone"])()
    net.fc = torch.nn.Identity()
    net.load_state_dict(load_file(folder / "weights.safetensors"), strict=True)
    net.eval()
    maps = {}
    for level, stage in enumerate((net.layer1, net.layer2, net.layer3, net.layer4), start=2):
        stage.register_forward_hook(lambda _, __, out, level=level: maps.update({f"res{level}": out}))
    images = load_file(folder / "images.safetensors")["images"]
    features = net(images)
    save_file({**maps, "features": features}, folder / "maps.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
