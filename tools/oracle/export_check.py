"""Checks exported backbones with the programs they are meant for.

    export_check.py torchvision ARCH FILE       strict load into torchvision, all but fc
    export_check.py features ARCH FILE X.st     the same, then features of X["images"] against X["features"]
    export_check.py detectron2 FILE.pkl REFERENCE.safetensors
"""

import pickle
import re
import sys

import numpy
import safetensors
import safetensors.torch
import torch
import torchvision


def read(path):
    if path.endswith(".safetensors"):
        return safetensors.torch.load_file(path)
    plain = torch.load(path, weights_only=True)
    mapped = torch.load(path, weights_only=True, mmap=True)
    assert type(plain) is dict
    assert plain.keys() == mapped.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor, mapped[name]), name
        # torch aligns storages to 64 bytes so that kernels may use them where they are mapped.
        assert tensor.numel() == 0 or mapped[name].data_ptr() % 64 == 0, name
    return plain


def load(arch, path):
    state = read(path)
    network = getattr(torchvision.models, arch)(weights=None)
    # Every tensor moves away from its value at start, so that a silent non-load would show.
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.fill_(7)
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert missing == ["fc.weight", "fc.bias"], missing
    assert unexpected == [], unexpected
    for name, tensor in network.state_dict().items():
        if not name.startswith("fc."):
            assert tensor.dtype == state[name].dtype, name
            assert torch.equal(tensor, state[name]), name
    return network


def torchvision_(arch, path):
    load(arch, path)
    if path.endswith(".safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            print(file.metadata()["detco"])


def features(arch, path, reference):
    network = load(arch, path).eval()
    network.fc = torch.nn.Identity()
    reference = safetensors.torch.load_file(reference)
    with torch.no_grad():
        found = network(reference["images"])
    expected = reference["features"]
    assert found.shape == expected.shape, (found.shape, expected.shape)
    # Something to compare: features differ between images and are not all nought.
    assert expected.std(0).max() > 0
    worst = ((found - expected).abs() / expected.abs().max()).max().item()
    print(f"{worst:.3e}")
    assert worst <= 1e-5, worst


def detectron2_name(name):
    """facts, section 5: what convert-pretrain-to-detectron2.py does, by regular expressions."""
    if "layer" not in name:
        name = "stem." + name
    name = re.sub(r"layer(\d)", lambda m: f"res{int(m[1]) + 1}", name)
    name = re.sub(r"bn(\d)", r"conv\1.norm", name)
    name = name.replace("downsample.0", "shortcut")
    return name.replace("downsample.1", "shortcut.norm")


def detectron2(path, reference):
    with open(path, "rb") as file:
        # As detectron2's DetectionCheckpointer opens it.
        found = pickle.load(file, encoding="latin1")
    assert found.keys() == {"model", "__author__", "matching_heuristics"}, found.keys()
    assert found["matching_heuristics"] is True
    expected = {
        detectron2_name(name): tensor.numpy()
        for name, tensor in safetensors.torch.load_file(reference).items()
    }
    model = found["model"]
    assert model.keys() == expected.keys(), model.keys() ^ expected.keys()
    for name, array in expected.items():
        assert type(model[name]) is numpy.ndarray, name
        assert model[name].dtype == array.dtype, name
        assert model[name].shape == array.shape, name
        assert numpy.array_equal(model[name], array), name
        assert model[name].flags.c_contiguous, name
        # detectron2 hands arrays to torch.
        torch.from_numpy(model[name])
    print(found["__author__"])


if __name__ == "__main__":
    checks = {"torchvision": torchvision_, "features": features, "detectron2": detectron2}
    checks[sys.argv[1]](*sys.argv[2:])
