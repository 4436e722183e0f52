"""Writes small seeds for the targets `weights` and `config` below this folder.

Run it with the Python in `.venv`. The files that `tools/oracle/export_files.py` makes are whole networks, too large
to be changed byte by byte: here each form holds a few tensors, or all names of a ResNet-18 with one number each.
"""

import collections
import pathlib
import pickle
import shutil

import numpy
import safetensors.torch
import torch
import torchvision

HERE = pathlib.Path(__file__).resolve().parent


def main():
    folder = HERE / "corpus" / "weights"
    folder.mkdir(parents=True, exist_ok=True)
    few = {"conv1.weight": torch.arange(6.0).view(2, 3), "bn1.num_batches_tracked": torch.tensor(3)}
    few["layer1.0.conv1.weight"] = few["conv1.weight"].t()
    few["half"], few["brain"] = torch.ones(2, dtype=torch.float16), torch.ones(2, dtype=torch.bfloat16)
    names = [name for name in torchvision.models.resnet18(weights=None).state_dict() if not name.startswith("fc.")]
    all_names = {name: torch.zeros(1) for name in names}
    for kind, tensors in [("few", few), ("all", all_names)]:
        behind = {f"module.encoder_q.{name}": tensor for name, tensor in tensors.items()}
        beside = {"state_dict": behind, "epoch": 7, "arch": "resnet18", "args": collections.OrderedDict(lr=0.1)}
        for name, content in [("plain", tensors), ("beside", beside)]:
            torch.save(content, folder / f"{kind}-{name}.pth")
            torch.save(content, folder / f"{kind}-{name}-legacy.pth", _use_new_zipfile_serialization=False)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(contiguous, folder / f"{kind}.safetensors", metadata={"format": "pt"})
        arrays = {name: numpy.zeros((2, 1), numpy.float32) for name in tensors}
        for protocol in range(6):
            with open(folder / f"{kind}-{protocol}.pkl", "wb") as file:
                pickle.dump({"model": arrays, "__author__": "nobody"}, file, protocol=protocol)
    config = HERE / "corpus" / "config"
    config.mkdir(parents=True, exist_ok=True)
    for recipe in (HERE.parent.parent / "src" / "recipes").glob("*.toml"):
        shutil.copy(recipe, config)


if __name__ == "__main__":
    main()
