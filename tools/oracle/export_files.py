"""Writes weight files the way other programs do, for `--init` to read.

    export_files.py FOLDER      writes FOLDER/*.pth|*.safetensors and FOLDER/reference.safetensors
"""

import collections
import pathlib
import sys
import zipfile

import safetensors.torch
import torch
import torchvision

folder = pathlib.Path(sys.argv[1])
torch.manual_seed(3)
# torchvision's names, an eighth of its channels: the files are many, the names are the point.
network = torchvision.models.resnet18(weights=None)
state = network.state_dict()  # with its _metadata
for name, tensor in state.items():
    narrow = [size // 8 if size >= 64 else size for size in tensor.shape]
    state[name] = torch.tensor(12345) if tensor.dtype == torch.int64 else torch.randn(narrow)
backbone = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
safetensors.torch.save_file(backbone, folder / "reference.safetensors")

# torchvision: the state dict of a whole classifier, with its _metadata.
torch.save(state, folder / "torchvision.pth")
safetensors.torch.save_file(state, folder / "torchvision.safetensors")

# MoCo: a checkpoint of DistributedDataParallel with both encoders, queue and optimizer.
moco = collections.OrderedDict()
for encoder, factor in [("encoder_q", 1), ("encoder_k", 2)]:
    for name, tensor in state.items():
        moco[f"module.{encoder}.{name}"] = tensor * factor
moco["module.queue"] = torch.randn(128, 64)
moco["module.queue_ptr"] = torch.zeros(1, dtype=torch.long)
parameter = torch.nn.Parameter(torch.randn(5, 4))
parameter.grad = torch.randn(5, 4)
optimizer = torch.optim.SGD([parameter], lr=0.03, momentum=0.9)
optimizer.step()
torch.save(
    {"epoch": 200, "arch": "resnet50", "state_dict": moco, "optimizer": optimizer.state_dict()},
    folder / "moco.pth",
)
# Parameters rather than tensors, under "model".
torch.save(
    {"model": {name: torch.nn.Parameter(t, requires_grad=False) for name, t in state.items()}},
    folder / "parameters.pth",
)

# Views: transposed, with an offset, and all of one storage.
views = {}
total = sum(tensor.numel() for tensor in backbone.values() if tensor.dtype == torch.float32)
flat, at = torch.empty(total + 5), 5
for name, tensor in backbone.items():
    if tensor.dtype != torch.float32:
        views[name] = tensor
        continue
    window = flat[at : at + tensor.numel()]
    at += tensor.numel()
    if tensor.dim() == 4:
        a, b, c, d = tensor.shape
        window = window.view(d, a, c, b).permute(1, 3, 2, 0)
    else:
        window = window.view(tensor.shape)
    window.copy_(tensor)
    views[name] = window
torch.save({f"backbone.{name}": tensor for name, tensor in views.items()}, folder / "views.pth")

# Half precision loses digits: compared with what it kept.
half = {n: t.bfloat16() if t.dtype == torch.float32 else t for n, t in backbone.items()}
torch.save(half, folder / "bfloat16.pth")
safetensors.torch.save_file(half, folder / "bfloat16.safetensors")
safetensors.torch.save_file(
    {n: t.float() if t.dtype == torch.bfloat16 else t for n, t in half.items()},
    folder / "bfloat16-reference.safetensors",
)

# Before torch 0.4.1 there was no num_batches_tracked.
old = {n: t for n, t in backbone.items() if not n.endswith("num_batches_tracked")}
torch.save(old, folder / "old.pth")

# What must be refused.
torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
torch.save({"state_dict": state, "args": pathlib.PurePosixPath("x")}, folder / "code.pth")
torch.save({"a": torch.ones(2), "b": torch.ones(2)}, folder / "other.pth")
torch.save({**state, "layer1.0.se.weight": torch.ones(2)}, folder / "se.pth")
nan = dict(backbone)
nan["layer2.0.bn1.bias"] = torch.full_like(nan["layer2.0.bn1.bias"], float("nan"))
torch.save(nan, folder / "nan.pth")
torch.save({**backbone, "layer1.0.conv1.weight": torch.ones(4, dtype=torch.int32)}, folder / "int.pth")
with zipfile.ZipFile(folder / "old.pth") as source:
    with zipfile.ZipFile(folder / "deflated.pth", "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with zipfile.ZipFile(folder / "stretched.pth", "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, data[:-4] if name.endswith("/data/7") else data)
