"""Reads a config of this folder and makes its detector. check.py and train.py share it."""

import json
import os

import torch
import torchvision
from torch import nn
from torchvision.models.detection import KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

HERE = os.path.dirname(os.path.abspath(__file__))
WEIGHTS = os.path.join(HERE, "backbone.pth")


def read_config(path):
    with open(path) as file:
        return json.load(file)


def detector(config, weights=WEIGHTS, norm=nn.BatchNorm2d):
    """The detector, with the backbone of a file, or of random weights where `weights` is empty."""
    net = getattr(torchvision.models, config["backbone"])(weights=None, norm_layer=norm)
    if weights:
        missing, unexpected = net.load_state_dict(torch.load(weights, weights_only=True), strict=False)
        if missing != ["fc.weight", "fc.bias"] or unexpected:
            raise SystemExit(f"{weights} is no {config['backbone']}: missing {missing}, unexpected {unexpected}")
    of_stage = {f"layer{i}": net.inplanes // 2 ** (4 - i) for i in (1, 2, 3, 4)}
    sizes = {"min_size": config["short_sides"], "max_size": config["long_side"]}
    if config["detector"] == "retinanet":
        del of_stage["layer1"]
        pyramid = with_pyramid(net, of_stage, LastLevelP6P7(net.inplanes, 256), norm)
        model = RetinaNet(pyramid, 1 + config["classes"], detections_per_img=100, **sizes)
    else:
        pyramid = with_pyramid(net, of_stage, LastLevelMaxPool(), norm)
        sizes["rpn_post_nms_top_n_train"] = config["proposals"]
        kind = {"mask_rcnn": MaskRCNN, "keypoint_rcnn": KeypointRCNN}[config["detector"]]
        model = kind(pyramid, 1 + config["classes"], **sizes)
    # Where it is trained, the transform draws a short side; where it is not, it takes the last one.
    assert model.transform.min_size[-1] == config["test_short_side"]
    return model


def with_pyramid(net, of_stage, extra, norm):
    names = {name: str(i) for i, name in enumerate(of_stage)}
    return BackboneWithFPN(net, names, list(of_stage.values()), 256, extra, norm)
