"""DenseCL, BYOL, SwAV and Jigsaw in PyTorch, as short as the papers allow: what the trainer is compared with.

    python methods_reference.py

Standard input brings a line of JSON (settings) and two groups of tensors (`tensors.py`): the student and the queues,
then the views (`<step>.<group>.<view>`). After each step everything that can be compared leaves as a group by standard
output.

DenseCL: Wang et al., CVPR 2021, equations 1 to 4. BYOL: Grill et al., NeurIPS 2020, equations 1 to 3. SwAV: Caron et
al., NeurIPS 2020, equations 1 to 5 and listing 1. Jigsaw: Goyal et al., ICCV 2019, appendix. Losses are loops over
samples, cells and views, gradients autograd's.
"""

import copy
import json
import sys

import torch
import torchvision
from detco_reference import PerDeviceBatchNorm, mlp
from rows_reference import Optimizer
from tensors import receive, send
from torch import nn
from torch.nn import functional as F


def backbone(case):
    net = getattr(torchvision.models, case["backbone"])(norm_layer=PerDeviceBatchNorm)
    channels = net.fc.in_features
    net.fc = nn.Identity()
    return net, channels


def res5(net, images):
    x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
    return net.layer4(net.layer3(net.layer2(net.layer1(x))))


def at_5(module):
    return nn.ModuleDict({"5": module})


class Method:
    """What all four share: a student, perhaps a teacher that follows it, perhaps queues."""

    def __init__(self, case, initial):
        self.case = case
        self.student = self.make()
        state = {k.removeprefix("query."): v for k, v in initial.items() if k.startswith("query.")}
        self.student.load_state_dict(state, strict=True)
        self.queues = {k: v for k, v in initial.items() if k.startswith("queue.") and v.dim() == 2}
        self.pointer = 0
        self.teacher = None

    def make_teacher(self):
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    @torch.no_grad()
    def follow(self):
        ours = dict(self.student.named_parameters())
        for name, p in self.teacher.named_parameters():
            p.copy_(self.case["ema"] * p + (1 - self.case["ema"]) * ours[name])

    def enqueue(self, keys):
        """Keys [n, d] for each queue take the places of the oldest."""
        for queue, k in zip(self.queues.values(), keys):
            queue[:, self.pointer : self.pointer + len(k)] = k.detach().T
        self.pointer = (self.pointer + len(keys[0])) % self.case["queue"]

    def before(self, step):
        pass

    def after_backward(self, step):
        pass


class DenseCL(Method):
    def __init__(self, case, initial):
        super().__init__(case, initial)
        self.make_teacher()

    def make(self):
        net, c = backbone(self.case)
        d = self.case["dim"]
        modules = {"backbone": net, "global": at_5(mlp(c, c, d)), "dense": at_5(mlp(c, c, d))}
        student = nn.Module()
        for name, module in modules.items():
            student.add_module(name, module)
        return student

    @staticmethod
    def embed(encoder, images):
        """Global [n, d], dense [n, d, h, w], map [n, c, h, w]; none of unit length."""
        features = res5(encoder.backbone, images)
        first, _, last = encoder.dense["5"]
        conv = lambda x, layer: F.conv2d(x, layer.weight[:, :, None, None], layer.bias)
        dense = conv(F.relu(conv(features, first)), last)
        return getattr(encoder, "global")["5"](features.mean((2, 3))), dense, features

    def contrast(self, query, key, queue):
        """-log of the positive's share, of one query."""
        t = self.case["temperature"]
        z = torch.cat([(query @ key)[None], query @ queue]) / t
        return torch.logsumexp(z.double(), 0) - z[0].double()

    def loss(self, views, step):
        case = self.case
        shuffle = torch.tensor(case["shuffles"][step])
        self.follow()
        q, q_dense, q_map = self.embed(self.student, views["crops"][0])
        with torch.no_grad():
            k, k_dense, k_map = self.embed(self.teacher, views["crops"][1][shuffle])
            back = torch.argsort(shuffle)
            k, k_dense, k_map = k[back], k_dense[back], k_map[back]
            pooled = F.normalize(k_dense.mean((2, 3)), dim=1)
            k, k_dense = F.normalize(k, dim=1), F.normalize(k_dense, dim=1)
        q, q_dense = F.normalize(q, dim=1), F.normalize(q_dense, dim=1)
        ring, dense_ring = [queue.clone() for queue in self.queues.values()]
        losses, dense_losses = [], []
        for i in range(len(q)):
            losses.append(self.contrast(q[i], k[i], ring))
            ours, theirs = q_dense[i].flatten(1).T, k_dense[i].flatten(1).T  # [cells, d]
            for cell, feature in enumerate(q_map[i].flatten(1).T.detach()):
                cosines = [F.cosine_similarity(feature, other, 0) for other in k_map[i].flatten(1).T]
                match = int(torch.stack(cosines).argmax())
                dense_losses.append(self.contrast(ours[cell], theirs[match], dense_ring))
        self.keys = [k, pooled]
        terms = {"res5/gg": torch.stack(losses).mean(), "res5/dense": torch.stack(dense_losses).mean()}
        weight = case["dense_weight"] if step >= case["dense_from"] else 0.0
        return (1 - weight) * terms["res5/gg"] + weight * terms["res5/dense"], terms

    def after(self):
        self.enqueue(self.keys)


class Byol(Method):
    def __init__(self, case, initial):
        super().__init__(case, initial)
        self.make_teacher()
        del self.teacher.predictor

    def make(self):
        net, c = backbone(self.case)
        hidden, d = self.case["hidden"], self.case["dim"]
        head = lambda c: nn.Sequential(
            nn.Linear(c, hidden), PerDeviceBatchNorm(hidden), nn.ReLU(), nn.Linear(hidden, d, bias=False)
        )
        student = nn.Module()
        student.add_module("backbone", net)
        student.add_module("global", at_5(head(c)))
        student.add_module("predictor", at_5(head(d)))
        return student

    def loss(self, views, step):
        self.follow()
        first, second = views["first"][0], views["second"][0]
        project = lambda encoder, x: getattr(encoder, "global")["5"](encoder.backbone(x))
        predict = lambda x: self.student.predictor["5"](project(self.student, x))
        with torch.no_grad():
            targets = [project(self.teacher, x) for x in (first, second)]
        distance = lambda p, t: sum(
            (a / a.norm() - b / b.norm()).square().sum() for a, b in zip(p, t)
        ) / len(p)
        terms = {
            "res5/first": distance(predict(first), targets[1]),
            "res5/second": distance(predict(second), targets[0]),
        }
        return self.case["scale"] * sum(terms.values()), terms

    def after(self):
        pass


class SwAV(Method):
    def make(self):
        net, c = backbone(self.case)
        hidden, d = self.case["hidden"], self.case["dim"]
        student = nn.Module()
        student.add_module("backbone", net)
        head = nn.Sequential(
            nn.Linear(c, hidden), PerDeviceBatchNorm(hidden), nn.ReLU(), nn.Linear(hidden, d)
        )
        student.add_module("global", at_5(head))
        # Its first place is the division by the length, which has no weights.
        prototypes = nn.ModuleDict({"1": nn.Linear(d, self.case["prototypes"], bias=False)})
        student.add_module("prototypes", at_5(prototypes))
        return student

    @torch.no_grad()
    def before(self, step):
        weight = self.student.prototypes["5"]["1"].weight
        weight.copy_(F.normalize(weight, dim=1))

    @torch.no_grad()
    def codes(self, scores):
        """Listing 1 of the paper: scores [b, k] to codes [b, k]."""
        q = torch.exp(scores / self.case["epsilon"]).T
        q /= q.sum()
        k, b = q.shape
        for _ in range(self.case["rounds"]):
            q *= (torch.ones(k) / k / q.sum(1))[:, None]
            q *= (torch.ones(b) / b / q.sum(0))[None]
        return (q / q.sum(0, keepdim=True)).T

    def loss(self, views, step):
        case = self.case
        # Views of one size through the backbone together, a sample's side by side.
        features = []
        for group in ("crops", "small"):
            if views.get(group):
                images = torch.stack(views[group], 1)
                rows = self.student.backbone(images.flatten(0, 1))
                features.append(rows.unflatten(0, images.shape[:2]))
        features = torch.cat(features, 1)  # [n, views, c]
        n, count = features.shape[:2]
        z = F.normalize(getattr(self.student, "global")["5"](features.flatten(0, 1)), dim=1)
        weight = self.student.prototypes["5"]["1"].weight
        scores = (z @ weight.T).unflatten(0, (n, count))
        z = z.detach().unflatten(0, (n, count))
        loss = 0
        for assigned in (0, 1):
            with torch.no_grad():
                rows = z[:, assigned]
                if case["queue"] > 0 and step >= case["queue_from"]:
                    rows = torch.cat([rows, list(self.queues.values())[assigned].T])
                code = self.codes(rows @ weight.T)[:n]
            others = [view for view in range(count) if view != assigned]
            of_views = [
                -(code * F.log_softmax(scores[:, view] / case["temperature"], 1)).sum(1).mean()
                for view in others
            ]
            loss = loss + sum(of_views) / len(others) / 2
        self.keys = [z[:, 0], z[:, 1]]
        return loss, {"res5/swav": loss}

    def after_backward(self, step):
        if step < self.case["freeze_updates"]:
            self.student.prototypes["5"]["1"].weight.grad = None

    def after(self):
        if self.case["queue"] > 0:
            self.enqueue(self.keys)


class Jigsaw(Method):
    def make(self):
        net, c = backbone(self.case)
        hidden = self.case["hidden"]
        student = nn.Module()
        student.add_module("backbone", net)
        patch = nn.Sequential(nn.Linear(c, hidden), PerDeviceBatchNorm(hidden), nn.ReLU())
        join = nn.Linear(9 * hidden, self.case["permutations"])
        student.add_module("jigsaw", at_5(nn.ModuleDict({"patch": patch, "join": join})))
        return student

    def loss(self, views, step):
        patches = views["patches"][0]
        head = self.student.jigsaw["5"]
        each = head["patch"](self.student.backbone(patches.flatten(0, 1)))
        orders = torch.tensor(self.case["orders"][step])
        log_p = F.log_softmax(head["join"](each.reshape(len(patches), -1)), 1)
        loss = -sum(row[order] for row, order in zip(log_p, orders)) / len(orders)
        return loss, {"res5/jigsaw": loss}

    def after(self):
        pass


class Updates(Optimizer):
    """Those of the parameters that have gradients."""

    def step(self):
        everything = self.parameters
        self.parameters = {name: p for name, p in everything.items() if p.grad is not None}
        super().step()
        self.parameters = everything


def main():
    case = json.loads(sys.stdin.buffer.readline())
    torch.set_num_threads(case["threads"])
    torch.set_default_dtype(getattr(torch, case["dtype"]))
    PerDeviceBatchNorm.devices = case["bn_splits"]
    method = {"densecl": DenseCL, "byol": Byol, "swav": SwAV, "jigsaw": Jigsaw}[case["method"]](case, receive())
    views = receive()
    optimizer = Updates(case, method.student.named_parameters())

    for step in range(case["steps"]):
        own = {
            group: [views[f"{step}.{group}.{i}"] for i in range(count)]
            for group, count in case["groups"].items()
        }
        method.before(step)
        loss, terms = method.loss(own, step)
        method.student.zero_grad()
        loss.backward()
        method.after_backward(step)
        optimizer.step()
        method.after()
        out = {"loss": loss, **method.queues}
        if method.queues:
            out["queue.pointer"] = torch.tensor(method.pointer)
        out |= {f"loss.{name}": term for name, term in terms.items()}
        out |= {f"query.{name}": t for name, t in method.student.state_dict().items()}
        if method.teacher is not None:
            out |= {f"key.{name}": t for name, t in method.teacher.state_dict().items()}
        for name, p in method.student.named_parameters():
            if p.grad is not None:
                out[f"grad.{name}"] = p.grad
                out[f"momentum.{name}"] = optimizer.momenta[name]
        send(out)


if __name__ == "__main__":
    main()
