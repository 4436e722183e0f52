"""Checks that the backbone inside a detector is the exported one, before anything is trained.

    python check.py [CONFIG.yaml ...]       all configs of this folder, where none is named

Holds every tensor of backbone.pkl against the detector's, and the maps of Res2 to Res5 that the detector computes of
the image in reference.npz, read as it reads images, against those that detco computed. train.py does the same at its
start.
"""

import glob
import importlib.util
import os
import pickle
import sys

import numpy
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from PIL import Image

from detector import HERE, WEIGHTS, read_config

TOLERANCE = 1e-4  # of a map's largest value


def equal_tensors(model):
    """The number of tensors in the file. Each must be in the model once, with the same numbers."""
    with open(WEIGHTS, "rb") as file:
        expected = pickle.load(file, encoding="latin1")["model"]
    state = model.state_dict()
    for name, array in expected.items():
        found = [tensor for at, tensor in state.items() if at.endswith("." + name)]
        if len(found) != 1 or not torch.equal(found[0].cpu(), torch.from_numpy(array)):
            raise SystemExit(f"{name} of backbone.pkl is not in the detector")
    return len(expected)


def is_trained(model):
    """Nothing of the backbone may be frozen: the tables train all of it."""
    backbone = getattr(model.backbone, "bottom_up", model.backbone)
    frozen = [name for name, parameter in backbone.named_parameters() if not parameter.requires_grad]
    frozen += [name for name, module in backbone.named_modules() if isinstance(module, FrozenBatchNorm2d)]
    if frozen:
        raise SystemExit(f"{frozen[0]} and {len(frozen) - 1} more are frozen: MODEL.BACKBONE.FREEZE_AT is not 0")


def maps(model, cfg, image):
    """Res2 to Res5 of an RGB image inside the detector. A C4 detector has Res5 in its head."""
    pixels = convert_PIL_to_numpy(Image.fromarray(image), cfg.INPUT.FORMAT)
    pixels = torch.from_numpy(numpy.ascontiguousarray(pixels.transpose(2, 0, 1)))
    images = model.preprocess_image([{"image": pixels, "height": image.shape[0], "width": image.shape[1]}])
    images = images[0] if isinstance(images, tuple) else images
    backbone = getattr(model.backbone, "bottom_up", model.backbone)
    found, hooks = {}, []
    for name in ("res2", "res3", "res4", "res5"):
        if hasattr(backbone, name):
            keep = lambda module, inputs, output, name=name: found.update({name: output})
            hooks.append(getattr(backbone, name).register_forward_hook(keep))
    model.backbone(images.tensor)
    for hook in hooks:
        hook.remove()
    if "res5" not in found:
        found["res5"] = model.roi_heads.res5[:3](found["res4"])
    return found


def check(model, cfg):
    """Ends the program where the detector's backbone is not ours."""
    count = equal_tensors(model)
    is_trained(model)
    reference = numpy.load(os.path.join(HERE, "reference.npz"))
    was_training = model.training
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        found = maps(model.eval(), cfg, reference["image"])
    torch.backends.cudnn.allow_tf32 = tf32
    model.train(was_training)
    print(f"{count} tensors are those of backbone.pkl, and all are trained")
    for name, tensor in sorted(found.items()):
        expected = reference[name]
        if tuple(tensor.shape) != expected.shape:
            raise SystemExit(f"{name} has the shape {tuple(tensor.shape)}, expected {expected.shape}")
        worst = abs(tensor.cpu().numpy() - expected).max() / abs(expected).max()
        print(f"{name}: differs by {worst:.1e} of the largest value")
        if not worst <= TOLERANCE:
            raise SystemExit(f"{name} is not what detco computes: channel order, mean, std, stride or norm differ")


if __name__ == "__main__":
    configs = sys.argv[1:] or sorted(glob.glob(os.path.join(HERE, "table*.yaml")))
    for path in configs:
        print(os.path.basename(path))
        if not sys.argv[1:] and "sparse-rcnn" in path and not importlib.util.find_spec("sparsercnn"):
            print("not checked: projects/SparseRCNN of Sparse R-CNN is not on PYTHONPATH")
            continue
        cfg = read_config(path, ["MODEL.DEVICE", "cpu"])
        model = build_model(cfg)
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        check(model, cfg)
