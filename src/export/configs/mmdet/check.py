"""Checks that the backbone inside a detector is the exported one, before anything is trained.

    python check.py [CONFIG.py ...]       all configs of this folder, where none is named

Holds every tensor of backbone.pth against the detector's, and the maps of Res2 to Res5 that the detector computes of
the image in reference.npz, given as its pipeline gives images, against those that detco computed.
"""

import glob
import os
import sys

import numpy
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules

HERE = os.path.dirname(os.path.abspath(__file__))
TOLERANCE = 1e-4  # of a map's largest value


def equal_tensors(model):
    """The number of tensors in the file. Each must be in the model, with the same numbers."""
    state = model.backbone.state_dict()
    if model.backbone.num_stages == 3:
        state.update(model.roi_head.shared_head.state_dict())
    expected = torch.load("backbone.pth", weights_only=True)
    for name, tensor in expected.items():
        if name not in state or not torch.equal(state[name], tensor):
            raise SystemExit(f"{name} of backbone.pth is not in the detector")
    return len(expected)


def is_trained(model):
    """Nothing of the backbone may be frozen: the tables train all of it."""
    model.train()
    frozen = [name for name, parameter in model.backbone.named_parameters() if not parameter.requires_grad]
    frozen += [name for name, module in model.backbone.named_modules() if not module.training]
    if frozen:
        raise SystemExit(f"{frozen[0]} and {len(frozen) - 1} more are frozen")


def maps(model, image):
    """Res2 to Res5 of an RGB image inside the detector. A C4 detector has Res5 in its head."""
    pixels = torch.from_numpy(image[..., ::-1].transpose(2, 0, 1).copy())  # the pipeline reads BGR
    x = model.data_preprocessor({"inputs": [pixels], "data_samples": None})["inputs"]
    found, hooks = {}, []
    for name in model.backbone.res_layers:
        stage = f"res{int(name[-1]) + 1}"
        keep = lambda module, inputs, output, stage=stage: found.update({stage: output})
        hooks.append(getattr(model.backbone, name).register_forward_hook(keep))
    model.backbone(x)
    for hook in hooks:
        hook.remove()
    if "res5" not in found:
        found["res5"] = model.roi_head.shared_head.layer4(found["res4"])
    return found


def check(model):
    """Ends the program where the detector's backbone is not ours."""
    count = equal_tensors(model)
    is_trained(model)
    reference = numpy.load("reference.npz")
    with torch.no_grad():
        found = maps(model.eval(), reference["image"])
    print(f"{count} tensors are those of backbone.pth, and all are trained")
    for name, tensor in sorted(found.items()):
        expected = reference[name]
        if tuple(tensor.shape) != expected.shape:
            raise SystemExit(f"{name} has the shape {tuple(tensor.shape)}, expected {expected.shape}")
        worst = abs(tensor.numpy() - expected).max() / abs(expected).max()
        print(f"{name}: differs by {worst:.1e} of the largest value")
        if not worst <= TOLERANCE:
            raise SystemExit(f"{name} is not what detco computes: channel order, mean, std, stride or norm differ")


if __name__ == "__main__":
    configs = [os.path.abspath(path) for path in sys.argv[1:]] or sorted(glob.glob(os.path.join(HERE, "table*.py")))
    os.chdir(HERE)  # the configs name backbone.pth beside them
    sys.path.insert(0, HERE)
    register_all_modules()
    for path in configs:
        print(os.path.basename(path))
        model = revert_sync_batchnorm(MODELS.build(Config.fromfile(path).model))
        model.init_weights()
        check(model)
