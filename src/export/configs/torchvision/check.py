"""Checks that the backbone inside a detector is the exported one, before anything is trained.

    python check.py [CONFIG.json ...]       all configs of this folder, where none is named

Holds every tensor of backbone.pth against the detector's, and the maps of Res2 to Res5 that the detector computes of
the image in reference.npz against those that detco computed. train.py does the same at its start.
"""

import glob
import os
import sys

import numpy
import torch
from torchvision.ops import FrozenBatchNorm2d
from torchvision.transforms.functional import to_tensor

from detector import HERE, WEIGHTS, detector, read_config

TOLERANCE = 1e-4  # of a map's largest value


def equal_tensors(body):
    """The number of tensors in the file. Each must be in the model, with the same numbers."""
    state = body.state_dict()
    expected = torch.load(WEIGHTS, weights_only=True)
    for name, tensor in expected.items():
        if name not in state or not torch.equal(state[name].cpu(), tensor):
            raise SystemExit(f"{name} of backbone.pth is not in the detector")
    return len(expected)


def is_trained(body):
    """Nothing of the backbone may be frozen: the tables train all of it."""
    frozen = [name for name, parameter in body.named_parameters() if not parameter.requires_grad]
    frozen += [name for name, module in body.named_modules() if isinstance(module, FrozenBatchNorm2d)]
    if frozen:
        raise SystemExit(f"{frozen[0]} and {len(frozen) - 1} more are frozen")


def maps(model, image):
    """Res2 to Res5 of an RGB image inside the detector, which normalises it. It is not resized."""
    body = model.backbone.body
    device = next(body.parameters()).device
    pixels = model.transform.normalize(to_tensor(image).to(device))
    found, hooks = {}, []
    for i in (2, 3, 4, 5):
        keep = lambda module, inputs, output, name=f"res{i}": found.update({name: output})
        hooks.append(body[f"layer{i - 1}"].register_forward_hook(keep))
    model.backbone(pixels[None])
    for hook in hooks:
        hook.remove()
    return found


def check(model):
    """Ends the program where the detector's backbone is not ours."""
    count = equal_tensors(model.backbone.body)
    is_trained(model.backbone.body)
    reference = numpy.load(os.path.join(HERE, "reference.npz"))
    was_training = model.training
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        found = maps(model.eval(), reference["image"])
    torch.backends.cudnn.allow_tf32 = tf32
    model.train(was_training)
    print(f"{count} tensors are those of backbone.pth, and all are trained")
    for name, tensor in sorted(found.items()):
        expected = reference[name]
        if tuple(tensor.shape) != expected.shape:
            raise SystemExit(f"{name} has the shape {tuple(tensor.shape)}, expected {expected.shape}")
        worst = abs(tensor.cpu().numpy() - expected).max() / abs(expected).max()
        print(f"{name}: differs by {worst:.1e} of the largest value")
        if not worst <= TOLERANCE:
            raise SystemExit(f"{name} is not what detco computes: channel order, mean, std, stride or norm differ")


if __name__ == "__main__":
    configs = sys.argv[1:] or sorted(glob.glob(os.path.join(HERE, "table*.json")))
    for path in configs:
        print(os.path.basename(path))
        check(detector(read_config(path)))
