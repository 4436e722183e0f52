"""Loads a backbone that detco exported into torchvision, strictly, and says what it found.

    load_in_torchvision.py FILE [FILE ...] [--train SHARDS --test SHARDS] [--size PX --share S]

All files must hold the same tensors. With shards, the kNN top-1 of torchvision's features is printed
too: images read by Pillow and Python's webdataset, so nothing of detco but its files takes part.
"""

import argparse
import glob
import io
import sys

import torch
import torchvision
import webdataset
from PIL import Image
from torch.nn import functional
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet


def read(path):
    """Name -> tensor of a .safetensors or .pth file."""
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, weights_only=True)


def resnet_for(weights):
    """torchvision's ResNet of the depth, width and stem that the names and shapes speak of."""
    block = Bottleneck if "layer1.0.conv3.weight" in weights else BasicBlock
    stages = [f"layer{stage}." for stage in (1, 2, 3, 4)]
    blocks = [len({n.split(".")[1] for n in weights if n.startswith(s)}) for s in stages]
    net = ResNet(block, blocks)
    net.fc = torch.nn.Identity()
    width = weights["bn1.weight"].shape[0]
    for name, module in list(net.named_modules()):
        # The narrow networks of the small recipes: every layer in proportion.
        if isinstance(module, torch.nn.Conv2d):
            shape = weights[f"{name}.weight"].shape
            cifar = name == "conv1" and shape[-1] == 3
            new = torch.nn.Conv2d(
                shape[1],
                shape[0],
                shape[-1],
                stride=1 if cifar else module.stride,
                padding=1 if cifar else module.padding,
                bias=False,
            )
        elif isinstance(module, torch.nn.BatchNorm2d):
            new = torch.nn.BatchNorm2d(module.num_features * width // 64)
        else:
            continue
        parent, _, last = name.rpartition(".")
        setattr(net.get_submodule(parent), last, new)
    if weights["conv1.weight"].shape[-1] == 3:
        net.maxpool = torch.nn.Identity()
    net.load_state_dict(weights, strict=True)
    return net.eval(), sum(blocks) * (3 if block is Bottleneck else 2) + 2, width


def samples(folder, size, share):
    """Centred squares of `share` of the short edge, and labels, of all shards in a folder."""
    mean = torch.tensor([0.485, 0.456, 0.406])
    std = torch.tensor([0.229, 0.224, 0.225])
    shards = sorted(glob.glob(f"{folder}/*.tar"))
    if not shards:
        sys.exit(f"error: no shards in {folder}")
    images, labels = [], []
    for sample in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False):
        image = Image.open(io.BytesIO(sample.get("jpg") or sample["png"])).convert("RGB")
        edge = share * min(image.size)
        left, top = (image.width - edge) / 2, (image.height - edge) / 2
        box = (left, top, left + edge, top + edge)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        images.append(((pixels.view(size, size, 3) / 255 - mean) / std).permute(2, 0, 1))
        labels.append(int(sample["cls"]))
    return torch.stack(images), torch.tensor(labels)


@torch.no_grad()
def features(net, images):
    return functional.normalize(torch.cat([net(part) for part in images.split(64)]), dim=1)


def knn_top1(train, train_labels, test, test_labels, k=200, temperature=0.1):
    """The weighted vote of Wu et al. (2018), as in `detco eval knn`."""
    near, index = (test @ train.T).topk(min(k, len(train)), dim=1)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    votes = torch.zeros(len(test), classes)
    votes.scatter_add_(1, train_labels[index], (near / temperature).exp())
    return 100 * (votes.argmax(1) == test_labels).double().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--train")
    parser.add_argument("--test")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--share", type=float, help="as detco: 1 below 96 pixels, else 0.875")
    args = parser.parse_args()
    if args.share is None:
        args.share = 1.0 if args.size < 96 else 0.875

    first = read(args.files[0])
    for path in args.files[1:]:
        other = read(path)
        if first.keys() != other.keys():
            sys.exit(f"error: {args.files[0]} and {path} hold different tensors")
        for name, tensor in first.items():
            if not torch.equal(tensor, other[name]):
                sys.exit(f"error: {name} differs between {args.files[0]} and {path}")
    net, depth, width = resnet_for(first)
    print(f"torchvision {torchvision.__version__}: ResNet-{depth}, width {width}, loaded strictly")
    if len(args.files) > 1:
        print(f"the same {len(first)} tensors to the bit in all {len(args.files)} files")
    if args.train and args.test:
        train, train_labels = samples(args.train, args.size, args.share)
        test, test_labels = samples(args.test, args.size, args.share)
        top1 = knn_top1(features(net, train), train_labels, features(net, test), test_labels)
        print(f"kNN top-1 of torchvision's features: {top1:.2f} %")


if __name__ == "__main__":
    main()
