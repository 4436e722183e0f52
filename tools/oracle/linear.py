"""Linear classifiers by PyTorch.

    python linear.py sgd IN OUT SETTINGS     updates of torch's Linear (behind BatchNorm1d) by torch's SGD
    python linear.py logistic IN COST        the minimum of scikit-learn's objective of logistic regression, by torch's
                                             L-BFGS in float64: objective and predictions, a JSON line
    python linear.py pool IN OUT             torch's AvgPool2d and AdaptiveAvgPool2d of maps res2 to res5

IN and OUT are safetensors. sgd: rows [steps, n, d], classes [steps, n], weight [classes, d]; SETTINGS is JSON: rates, momentum,
nesterov, weight_decay, norm, factors (one a step). logistic: rows, classes, test.
"""

import json
import sys

import torch
from safetensors.torch import load_file, save_file


def sgd(path, out, settings):
    settings, given, found = json.loads(settings), load_file(path), {}
    classes, d = given["weight"].shape
    for i, rate in enumerate(settings["rates"]):
        norm = torch.nn.BatchNorm1d(d, affine=False) if settings["norm"] else torch.nn.Identity()
        linear = torch.nn.Linear(d, classes)
        net = torch.nn.Sequential(norm, linear).to(given["rows"].dtype)
        with torch.no_grad():
            linear.weight.copy_(given["weight"])
            linear.bias.zero_()
        optimizer = torch.optim.SGD(
            linear.parameters(),
            lr=rate,
            momentum=settings["momentum"],
            nesterov=settings["nesterov"],
            weight_decay=settings["weight_decay"],
        )
        for rows, labels, factor in zip(given["rows"], given["classes"], settings["factors"]):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(net(rows), labels)
            loss.backward()
            optimizer.step()
        net.eval()
        found[f"weight.{i}"] = linear.weight.detach().clone()
        found[f"bias.{i}"] = linear.bias.detach().clone()
        found[f"logits.{i}"] = net(given["rows"][0]).detach().clone()
        found[f"loss.{i}"] = loss.detach().reshape(1).double()
    save_file(found, out)


def logistic(path, cost):
    given = load_file(path)
    rows, classes = given["rows"].double(), given["classes"]
    count = int(classes.max()) + 1
    weight = torch.zeros(count, rows.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=20_000,
        max_eval=40_000,
        tolerance_grad=1e-11,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def objective():
        penalty = (weight**2).sum() / (2 * float(cost) * len(rows))
        return torch.nn.functional.cross_entropy(rows @ weight.T + bias, classes) + penalty

    def closure():
        optimizer.zero_grad()
        value = objective()
        value.backward()
        return value

    optimizer.step(closure)
    with torch.no_grad():
        predictions = (given["test"].double() @ weight.T + bias).argmax(1)
        print(json.dumps({"objective": float(objective()), "predictions": predictions.tolist()}))


# VISSL's and OpenSelfSup's windows on the maps of a ResNet-50 at 224 pixels: kernel, stride.
WINDOWS = {"res2": (16, 8), "res3": (13, 5), "res4": (8, 3), "res5": (6, 1)}


def pool(path, out):
    found = {}
    for name, maps in load_file(path).items():
        level = name.split(".")[0]
        if name.endswith(".odd"):
            side = int((9216 // maps.shape[1]) ** 0.5)
            pooled = torch.nn.AdaptiveAvgPool2d(min(side, maps.shape[2]))(maps)
        else:
            pooled = torch.nn.AvgPool2d(*WINDOWS[level])(maps)
        found[name] = pooled.flatten(1).contiguous()
    save_file(found, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"sgd": sgd, "logistic": logistic, "pool": pool}[sys.argv[1]](*sys.argv[2:])
