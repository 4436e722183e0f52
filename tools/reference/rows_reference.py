"""SimCLR and Rotation in PyTorch, as short as the papers allow: what the trainer is compared with.

    python rows_reference.py

Standard input brings a line of JSON (settings) and two groups of tensors (`tensors.py`): the encoder, then the
views (`<step>.crops.0`, `<step>.crops.1`, ...). After each step everything that can be compared leaves as a group by
standard output.

SimCLR: Chen et al., ICML 2020, algorithm 1. Rotation: Gidaris et al., ICLR 2018. LARS as in BYOL's code: weight
decay, then the trust ratio, then momentum, then the learning rate.
"""

import json
import sys

import torch
import torchvision
from detco_reference import PerDeviceBatchNorm, mlp
from tensors import receive, send
from torch import nn
from torch.nn import functional as F


def head_of(case, channels):
    if case["method"] == "rotation":
        return nn.Sequential(nn.Linear(channels, 4))
    if not case["norm"]:
        return mlp(channels, channels, case["dim"])
    return nn.Sequential(
        nn.Linear(channels, channels, bias=False),
        PerDeviceBatchNorm(channels),
        nn.ReLU(),
        nn.Linear(channels, case["dim"], bias=False),
        PerDeviceBatchNorm(case["dim"]),
    )


class Encoder(nn.Module):
    def __init__(self, case):
        super().__init__()
        net = getattr(torchvision.models, case["backbone"])(norm_layer=PerDeviceBatchNorm)
        channels = net.fc.in_features
        net.fc = nn.Identity()
        self.backbone = net
        name = "rotation" if case["method"] == "rotation" else "global"
        self.head = head_of(case, channels)
        self.add_module(name, nn.ModuleDict({"5": self.head}))
        del self._modules["head"]
        self.heads = [self._modules[name]["5"]]

    def forward(self, images):
        return self.heads[0](self.backbone(images))


def simclr(case, encoder, views):
    """Both views of a sample side by side: the rows of a BN group are whole samples."""
    images = torch.stack(views, 1).flatten(0, 1)
    z = F.normalize(encoder(images), dim=1)
    loss = 0
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        similar = z[others] @ z[i] / case["temperature"]
        positive = z[i ^ 1] @ z[i] / case["temperature"]
        loss = loss + torch.logsumexp(similar, 0) - positive
    return loss / len(z)


def rotation(case, encoder, views):
    """Four quarter turns of each image, against the clock."""
    crops = views[0]
    if case["rotations"] == 4:
        images = torch.stack([torch.rot90(crops, k, (2, 3)) for k in range(4)], 1).flatten(0, 1)
        labels = torch.arange(4).repeat(len(crops))
    else:
        labels = torch.tensor(case["turns"])
        images = torch.stack([torch.rot90(x, int(k), (1, 2)) for x, k in zip(crops, labels)])
    return F.cross_entropy(encoder(images), labels)


class Optimizer:
    """`torch.optim.SGD`, or LARS by hand; without decay and trust for vectors where they are left out."""

    def __init__(self, case, parameters):
        self.case, self.parameters = case, dict(parameters)
        self.momenta = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.lars = case["optimizer"] == "lars"
        if not self.lars:
            free = [p for p in self.parameters.values() if p.dim() <= 1 and not case["decay_vectors"]]
            rest = [p for p in self.parameters.values() if p.dim() > 1 or case["decay_vectors"]]
            self.sgd = torch.optim.SGD(
                [
                    {"params": rest, "weight_decay": case["weight_decay"]},
                    {"params": free, "weight_decay": 0.0},
                ],
                lr=case["lr"],
                momentum=case["momentum"],
                nesterov=case["nesterov"],
            )

    @torch.no_grad()
    def step(self):
        if not self.lars:
            self.sgd.step()
            for name, p in self.parameters.items():
                self.momenta[name] = self.sgd.state[p]["momentum_buffer"]
            return
        case = self.case
        for name, p in self.parameters.items():
            g, left_out = p.grad, p.dim() <= 1 and not case["decay_vectors"]
            if not left_out:
                g = g + case["weight_decay"] * p
                if p.norm() > 0 and g.norm() > 0:
                    g = case["trust"] * p.norm() / g.norm() * g
            self.momenta[name].mul_(case["momentum"]).add_(g)
            p.sub_(case["lr"] * self.momenta[name])


def main():
    case = json.loads(sys.stdin.buffer.readline())
    torch.set_num_threads(case["threads"])
    torch.set_default_dtype(getattr(torch, case["dtype"]))
    PerDeviceBatchNorm.devices = case["bn_splits"]
    encoder = Encoder(case)
    initial = {k.removeprefix("query."): v for k, v in receive().items()}
    encoder.load_state_dict(initial, strict=True)
    frozen = {name for name, _ in encoder.named_parameters()} - set(case["trained"])
    for name, p in encoder.named_parameters():
        p.requires_grad_(name not in frozen)
    views = receive()
    trained = [(name, p) for name, p in encoder.named_parameters() if name not in frozen]
    optimizer = Optimizer(case, trained)
    loss_of = simclr if case["method"] == "simclr" else rotation

    for step in range(case["steps"]):
        own = [views[f"{step}.crops.{i}"] for i in range(case["views"])]
        loss = loss_of(case | {"turns": case["turns"][step]}, encoder, own)
        encoder.zero_grad()
        loss.backward()
        optimizer.step()
        out = {"loss": loss}
        out |= {f"query.{name}": t for name, t in encoder.state_dict().items()}
        for name, p in trained:
            out[f"grad.{name}"] = p.grad
            out[f"momentum.{name}"] = optimizer.momenta[name]
        send(out)


if __name__ == "__main__":
    main()
