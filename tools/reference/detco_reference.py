"""DetCo and MoCo in PyTorch, as short as the papers allow: what the trainer is compared with.

    python detco_reference.py

Standard input brings a line of JSON (settings and, for each step, the shuffle) and two groups of tensors
(`tensors.py`): the query encoder and the queues, then the views (`<step>.global.0`, `<step>.local.1`,
...). After each step everything that can be compared leaves as a group by standard output.

DetCo: Xie et al., ICCV 2021, equations 1 to 5. MoCo: He et al., CVPR 2020, algorithm 1, section 3.3.
"""

import copy
import json
import sys

import torch
import torchvision
from tensors import receive, send
from torch import nn
from torch.nn import functional as F


class PerDeviceBatchNorm(nn.BatchNorm2d):
    """BatchNorm of a batch spread over `devices` GPUs: each normalises its share by itself."""

    devices = 1

    def forward(self, x):
        parts, means, variances = [], [], []
        for share in x.chunk(self.devices):
            mean, variance = self.running_mean.clone(), self.running_var.clone()
            parts.append(
                F.batch_norm(share, mean, variance, self.weight, self.bias, True, self.momentum, self.eps)
            )
            means.append(mean)
            variances.append(variance)
        self.running_mean.copy_(torch.stack(means).mean(0))
        self.running_var.copy_(torch.stack(variances).mean(0))
        self.num_batches_tracked += 1
        return torch.cat(parts)


class Pirl(nn.Module):
    """Every patch through its own small head, then all nine together."""

    def __init__(self, channels, dim):
        super().__init__()
        self.patch = mlp(channels, channels, dim)
        self.join = nn.Linear(9 * dim, dim)

    def forward(self, features):
        patches = features.unflatten(1, (9, -1))
        return self.join(self.patch(patches).flatten(1))


def mlp(*sizes):
    layers = []
    for inner, outer in zip(sizes, sizes[1:]):
        layers += [nn.ReLU(), nn.Linear(inner, outer)]
    return nn.Sequential(*layers[1:])


class Encoder(nn.Module):
    def __init__(self, case):
        super().__init__()
        self.levels = case["levels"]
        net = getattr(torchvision.models, case["backbone"])(norm_layer=PerDeviceBatchNorm)
        net.fc = nn.Identity()
        self.backbone = net
        expansion = net.layer1[0].expansion
        width = {level: 64 * 2 ** (level - 2) * expansion for level in self.levels}
        dim = case["dim"]

        def global_head(c):
            return mlp(c, dim) if case["head"] == "linear" else mlp(c, c, dim)

        def local_head(c):
            if case["local_head"] == "pirl":
                return Pirl(c, dim)
            hidden = 9 * c if case["local_head"] == "9c-9c" else c
            return mlp(9 * c, hidden, dim)

        self.add_module("global", nn.ModuleDict({str(i): global_head(width[i]) for i in self.levels}))
        if case["local"]:
            self.local = nn.ModuleDict({str(i): local_head(width[i]) for i in self.levels})

    def stages(self, x):
        net = self.backbone
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        for level, stage in zip((2, 3, 4, 5), (net.layer1, net.layer2, net.layer3, net.layer4)):
            x = stage(x)
            yield level, F.adaptive_avg_pool2d(x, 1).flatten(1)
            if level == max(self.levels):
                return

    def crops(self, images):
        """Images [n, 3, h, w] to {level: [n, d]}."""
        heads = getattr(self, "global")
        return {
            level: F.normalize(heads[str(level)](f), dim=1)
            for level, f in self.stages(images)
            if level in self.levels
        }

    def patches(self, images):
        """Patches [n, 9, 3, p, p] to {level: [n, d]}: the nine features side by side."""
        n = len(images)
        return {
            level: F.normalize(self.local[str(level)](f.reshape(n, -1)), dim=1)
            for level, f in self.stages(images.flatten(0, 1))
            if level in self.levels
        }


class DetCo:
    def __init__(self, case, initial):
        self.case = case
        self.query = Encoder(case)
        state = {k.removeprefix("query."): v for k, v in initial.items() if k.startswith("query.")}
        self.query.load_state_dict(state, strict=True)
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.queues = {k: v for k, v in initial.items() if k.startswith("queue.") and v.dim() == 2}
        self.pointer = 0

    def follow(self):
        for k, q in zip(self.key.parameters(), self.query.parameters()):
            k.lerp_(q, 1 - self.case["ema"])  # ema * k + (1 - ema) * q

    def losses(self, crops, patches, shuffle):
        """(query crop, key crop), (query patches, key patches) to the terms and their logits."""
        case = self.case
        q_g = self.query.crops(crops[0])
        q_l = self.query.patches(patches[0]) if patches else {}

        with torch.no_grad():
            self.follow()
            back = torch.argsort(shuffle)
            k_g = {i: k[back] for i, k in self.key.crops(crops[1][shuffle]).items()}
            k_l = {}
            if patches:
                k_l = {i: k[back] for i, k in self.key.patches(patches[1][shuffle]).items()}

        self.latest = {"global": k_g, "local": k_l}
        return self.contrast(q_g, q_l, k_g, k_l)

    def negatives(self, name):
        """A queue as it is now: it changes before some look at the logits' gradients."""
        return self.queues[name].clone()

    def contrast(self, q_g, q_l, k_g, k_l):
        """Embeddings by level to the terms and their logits."""
        case = self.case
        terms, logits = {}, {}
        for level in case["levels"]:
            pairs = {"gg": (q_g, k_g, "global")}
            if q_l:
                pairs["ll"] = (q_l, k_l, "local")
                pairs["gl"] = (q_l, k_g, "global")
            for pair, (q, k, scope) in pairs.items():
                q, k = q[level], k[level]
                negatives = self.negatives(f"queue.{scope}.{level}")
                positive = (q * k).sum(1, keepdim=True)
                z = torch.cat([positive, q @ negatives], dim=1)
                z = z / case["temperature"]
                logits[f"{level}.{pair}"] = z
                # Where a positive is far above all negatives, float32 keeps three digits of the loss and of
                # p - 1, the positive's gradient.
                exact = z.double() if case.get("loss_in_float64") else z
                terms[f"{level}.{pair}"] = F.cross_entropy(
                    exact, torch.zeros(len(z), dtype=torch.long, device=z.device)
                )
        return terms, logits

    def enqueue(self):
        n = self.case["batch"]
        for scope, keys in self.latest.items():
            for level, k in keys.items():
                self.queues[f"queue.{scope}.{level}"][:, self.pointer : self.pointer + n] = k.T
        self.pointer = (self.pointer + n) % self.case["queue"]


def main():
    case = json.loads(sys.stdin.buffer.readline())
    torch.set_num_threads(case["threads"])
    torch.set_default_dtype(getattr(torch, case["dtype"]))
    PerDeviceBatchNorm.devices = case["bn_splits"]
    detco = DetCo(case, receive())
    views = receive()
    weights = dict(zip(case["levels"], case["level_weights"]))
    sgd = torch.optim.SGD(
        detco.query.parameters(),
        lr=case["lr"],
        momentum=case["momentum"],
        weight_decay=case["weight_decay"],
    )

    # For tests of the comparison: terms whose gradients are wrong by a factor, and whose losses are not.
    wrong = case["wrong_factors"]

    def total(terms, factors):
        return sum(weights[int(name[0])] * factors.get(name, 1) * term for name, term in terms.items())

    for step, shuffle in enumerate(case["shuffles"]):
        crops = [views[f"{step}.global.{i}"] for i in (0, 1)]
        patches = [views[f"{step}.local.{i}"] for i in (0, 1)] if case["local"] else None
        terms, logits = detco.losses(crops, patches, torch.tensor(shuffle))
        loss = total(terms, {})
        sgd.zero_grad()
        total(terms, wrong).backward()
        sgd.step()
        detco.enqueue()

        out = {"loss": loss, "queue.pointer": torch.tensor(detco.pointer), **detco.queues}
        out |= {f"loss.{name}": term for name, term in terms.items()}
        out |= {f"logits.{name}": z for name, z in logits.items()}
        out |= {f"query.{name}": t for name, t in detco.query.state_dict().items()}
        out |= {f"key.{name}": t for name, t in detco.key.state_dict().items()}
        for name, p in detco.query.named_parameters():
            if p.grad is not None:
                out[f"grad.{name}"] = p.grad
                out[f"momentum.{name}"] = sgd.state[p]["momentum_buffer"]
        send(out)


if __name__ == "__main__":
    main()
