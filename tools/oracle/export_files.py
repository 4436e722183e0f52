"""Writes weight files the way other programs do, for `--init` to read.

    export_files.py FOLDER      writes FOLDER/*.pth|*.safetensors and FOLDER/reference.safetensors
"""

import argparse
import collections
import copy
import datetime
import enum
import io
import pathlib
import pickle
import sys
import tarfile
import zipfile

import numpy

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

double = {n: t.double() if t.dtype == torch.float32 else t for n, t in backbone.items()}
torch.save({"model": double}, folder / "double.pth")
half = {n: t.half() if t.dtype == torch.float32 else t for n, t in backbone.items()}
torch.save({"model": half}, folder / "half.pth")
safetensors.torch.save_file(
    {n: t.float() if t.dtype == torch.float16 else t for n, t in half.items()},
    folder / "half-reference.safetensors",
)

# torch's format before 1.6: MoCo's checkpoint, views of one storage, other pickle protocols.
old_format = {"_use_new_zipfile_serialization": False}
torch.save({"epoch": 200, "state_dict": moco}, folder / "legacy.pth", **old_format)
torch.save({f"backbone.{name}": tensor for name, tensor in views.items()}, folder / "legacy-views.pth", **old_format)
torch.save(state, folder / "legacy-4.pth", pickle_protocol=4, **old_format)
for protocol in (1, 3, 4, 5):
    torch.save(state, folder / f"protocol-{protocol}.pth", pickle_protocol=protocol)


# What research code saves beside its weights.
class Mode(enum.Enum):
    TRAIN = 1


class StateDict(collections.OrderedDict):
    pass


class Slots:
    __slots__ = ("a",)


class Evil:
    """Unpickled as code, it makes a folder."""

    def __reduce__(self):
        return (pathlib.Path.mkdir, (folder / "was-run",))


slots = Slots()
slots.a = 1
baggage = {
    "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("x"), betas=(0.9, 0.99)),
    "epoch": numpy.int64(3),
    "best_acc": numpy.float64(71.1),
    "history": numpy.arange(12, dtype=numpy.float32).reshape(3, 4),
    "names": numpy.array(["a", "bc"], dtype=object),
    "when": datetime.datetime(2021, 2, 7, tzinfo=datetime.timezone.utc),
    "seen": {1, 2},
    "frozen": frozenset("ab"),
    "mode": Mode.TRAIN,
    "slots": slots,
    "rng": (numpy.random.RandomState(0).get_state(), 2**200, -(2**70), 1.5, None, b"x", bytearray(b"y")),
    "counter": collections.Counter("abc"),
    "default": collections.defaultdict(list, {"a": [1]}),
    "evil": Evil(),
    "state_dict": StateDict(moco),
}
for protocol in (2, 4, 5):
    torch.save(baggage, folder / f"baggage-{protocol}.pth", pickle_protocol=protocol)
torch.save(baggage, folder / "baggage-legacy.pth", **old_format)

# A whole module, and a TorchScript archive.
for name, tensor in backbone.items():
    owner = network.get_submodule(name.rpartition(".")[0])
    leaf = name.rpartition(".")[2]
    if leaf in owner._parameters:
        owner._parameters[leaf] = torch.nn.Parameter(tensor)
    else:
        owner._buffers[leaf] = tensor
torch.save(torch.nn.Sequential(collections.OrderedDict(backbone=network)), folder / "module.pth")
torch.jit.script(network).save(str(folder / "script.pt"))

# DINO: student and teacher; VISSL: four containers; mmselfsup: one network under two names.
torch.save(
    {
        "student": {f"module.backbone.{n}": t for n, t in state.items()},
        "teacher": {f"backbone.{n}": t * 2 for n, t in state.items()},
        "args": argparse.Namespace(),
    },
    folder / "dino.pth",
)
trunk = {f"_feature_blocks.{n}": t for n, t in backbone.items()}
torch.save(
    {"classy_state_dict": {"base_model": {"model": {"trunk": trunk, "heads": {}}}}}, folder / "vissl.torch"
)
aliased = {f"{p}{n}": t for p in ("backbone.", "online_net.0.") for n, t in backbone.items()}
aliased.update({f"target_net.0.{n}": t * 2 for n, t in backbone.items()})
torch.save({"meta": {"time": "now"}, "state_dict": aliased}, folder / "mmselfsup.pth")

# Children by number: torchvision's, and those of a network without ReLU and max pool modules.
for name, first in (("numbered.pth", 4), ("numbered-2.pth", 2)):
    child = {"conv1": 0, "bn1": 1} | {f"layer{i + 1}": first + i for i in range(4)}
    numbered = {f"backbone.{child[n.split('.')[0]]}.{n.partition('.')[2]}": t for n, t in backbone.items()}
    if first == 2:
        numbered = {n.replace("downsample", "shortcut"): t for n, t in numbered.items()}
    torch.save({"state_dict": numbered}, folder / name)


# detectron2's names, in arrays; transformers' names.
def detectron2(name):
    head, *rest = name.split(".")
    name = ".".join([f"res{int(head[5:]) + 1}", *rest] if head.startswith("layer") else ["stem", head, *rest])
    for i in "123":
        name = name.replace(f"bn{i}.", f"conv{i}.norm.")
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def transformers(name):
    head, *rest = name.split(".")
    kind = {"conv": "convolution", "bn": "normalization"}
    if not head.startswith("layer"):
        return ".".join(["resnet.embedder.embedder", kind[head[:-1]], *rest])
    block, part, *leaf = rest
    start = f"resnet.encoder.stages.{int(head[5:]) - 1}.layers.{block}"
    if part == "downsample":
        return ".".join([start, "shortcut", ["convolution", "normalization"][int(leaf[0])], *leaf[1:]])
    return ".".join([start, "layer", str(int(part[-1]) - 1), kind[part[:-1]], *leaf])


arrays = {detectron2(n): t.numpy() for n, t in backbone.items()}
arrays["res5.1.conv2.weight"] = numpy.asfortranarray(arrays["res5.1.conv2.weight"])
for protocol in (0, 2, 3, 4, 5):
    with open(folder / f"detectron2-{protocol}.pkl", "wb") as file:
        whole = {"model": arrays, "__author__": "x", "matching_heuristics": True}
        pickle.dump(whole, file, protocol=protocol)
torch.save({"model": {f"backbone.bottom_up.{detectron2(n)}": t for n, t in backbone.items()}}, folder / "model_final.pth")
safetensors.torch.save_file({transformers(n): t for n, t in backbone.items()}, folder / "transformers.safetensors")

# What must be refused.
with tarfile.open(folder / "tar.pth", "w", format=tarfile.PAX_FORMAT) as tar:
    for name in ("sys_info", "pickle", "tensors", "storages"):
        tar.addfile(tarfile.TarInfo(name), io.BytesIO())
big = copy.copy(arrays)
big["res2.0.conv1.weight"] = big["res2.0.conv1.weight"].astype(">f4")
(folder / "big-array.pkl").write_bytes(pickle.dumps({"model": big}))
legacy = (folder / "legacy-4.pth").read_bytes()
flag = legacy.index(b"little_endian")
true = legacy.index(b"\x88", flag)
(folder / "big-legacy.pth").write_bytes(legacy[:true] + b"\x89" + legacy[true + 1 :])
(folder / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
(folder / "page.pth").write_text("\n<!DOCTYPE html><html></html>")
(folder / "gzip.pth").write_bytes(b"\x1f\x8b\x08\0")
several = {f"{p}.{n}": t * (i + 1) for i, p in enumerate(("rgb", "flow")) for n, t in backbone.items()}
torch.save(several, folder / "several.pth")
torch.save({n.replace("conv1.weight", "conv1.0.weight", 1) if n == "conv1.weight" else n: t for n, t in backbone.items()}, folder / "deep.pth")
torch.save({**backbone, "conv1.weight": torch.zeros(2, 2, dtype=torch.complex64)}, folder / "complex.pth")
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
    with zipfile.ZipFile(folder / "big.pth", "w") as target:
        for name in source.namelist():
            target.writestr(name, b"big" if name.endswith("/byteorder") else source.read(name))
    with zipfile.ZipFile(folder / "stretched.pth", "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, data[:-4] if name.endswith("/data/7") else data)
