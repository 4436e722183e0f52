"""Support vector machines by scikit-learn: the machine, the published protocol, and low-shot trials.

    svm.py machine FILE OUT       decision values of LinearSVC, to its minimum and as the protocol stops it
    svm.py precision FILE         average precisions: scikit-learn's, and the area below the curve
    svm.py weights OUT            a ResNet-18 of torchvision's own drawing
    svm.py protocol VOC WEIGHTS COSTS    the protocol on a folder of PASCAL VOC, from pixels on, in both its forms
    svm.py timed FILE             the time that the published scripts take for the classes of the file, a process a core
    svm.py lowshot VOC WEIGHTS COSTS FIXED FILE... trials given as lists of samples

FILE is .safetensors; COSTS are separated by commas. All but the first and the third print; JSON, but for the time.
"""

import glob
import json
import os
import sys
import warnings

import numpy
import safetensors.numpy
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC

EXACT = {"tol": 1e-8, "max_iter": 1_000_000}
PUBLISHED = {"tol": 1e-4, "max_iter": 2000}


def machine(cost, end):
    return LinearSVC(
        C=cost, class_weight={1: 2, -1: 1}, intercept_scaling=1.0, penalty="l2", loss="squared_hinge", dual=True,
        random_state=0, **end,
    )


def area(values, positive):
    """Precision over recall, made monotone from the right."""
    hits = positive[numpy.argsort(-values, kind="stable")].astype(float)
    recall = numpy.concatenate([[0.0], numpy.cumsum(hits) / hits.sum()])
    precision = numpy.cumsum(hits) / numpy.arange(1, len(hits) + 1)
    highest = numpy.maximum.accumulate(precision[::-1])[::-1]
    return float(numpy.sum(numpy.diff(recall) * highest))


def machines(path, out):
    data = safetensors.numpy.load_file(path)
    rows, targets, test = data["rows"], data["targets"], data["test"]
    found = {}
    for name, end in (("exact", EXACT), ("published", PUBLISHED)):
        values = numpy.zeros((len(data["costs"]), targets.shape[1], len(test)))
        for i, cost in enumerate(data["costs"]):
            for k in range(targets.shape[1]):
                values[i, k] = machine(cost, end).fit(rows, targets[:, k]).decision_function(test)
        found[name] = values
    safetensors.numpy.save_file(found, out)


def precisions(path):
    data = safetensors.numpy.load_file(path)
    cases = zip(data["values"], data["positive"] > 0)
    print(json.dumps([[float(average_precision_score(p, v)), area(v, p)] for v, p in cases]))


def weights(out):
    import torch
    import torchvision

    torch.manual_seed(5)
    net = torchvision.models.resnet18(weights=None)
    tensors = {name: t for name, t in net.state_dict().items() if not name.startswith("fc.")}
    safetensors.numpy.save_file({name: t.numpy() for name, t in tensors.items()}, out)


def features(voc, weights_file, images):
    """Res5 of a ResNet-18, pooled to 4 x 4, of images squashed to 224 pixels."""
    import torch
    import torchvision
    from PIL import Image
    from resizing import resize, resize_short
    from torchvision import transforms

    net = torchvision.models.resnet18(weights=None)
    tensors = safetensors.numpy.load_file(weights_file)
    missing = net.load_state_dict({n: torch.from_numpy(t) for n, t in tensors.items()}, strict=False)
    assert set(missing.missing_keys) == {"fc.weight", "fc.bias"} and not missing.unexpected_keys, missing
    net.eval()
    view = transforms.Compose([
        transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ])
    body = torch.nn.Sequential(*list(net.children())[:-2], torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten())
    rows = []
    with torch.no_grad():
        for name in images:
            image = Image.open(os.path.join(voc, "JPEGImages", name + ".jpg")).convert("RGB")
            image = resize(resize_short(image, 256), 224, 224)
            rows.append(body(view(image)[None])[0].numpy())
    rows = numpy.array(rows).astype(numpy.float64)
    return rows / (numpy.linalg.norm(rows, axis=1, keepdims=True) + 1e-5)


def both(voc, weights_file, train, test):
    """Features of two sets, in coordinates of the space that they span: inner products, and so machines, are the same,
    and scikit-learn goes through a hundred numbers a row in place of 8,192."""
    rows = numpy.concatenate([features(voc, weights_file, images) for images in (train, test)])
    rows = numpy.linalg.qr(rows.T)[1].T
    return rows[: len(train)], rows[len(train) :]


def split(voc, name):
    """Images, and of each class 1, 0 and -1 (difficult) an image, as OpenSelfSup stores them."""
    lists = os.path.join(voc, "ImageSets", "Main")
    with open(os.path.join(lists, name + ".txt")) as file:
        images = file.read().split()
    stored = {"1": 1, "-1": 0, "0": -1}
    labels = {}
    for path in sorted(glob.glob(os.path.join(lists, f"*_{name}.txt"))):
        with open(path) as file:
            of = dict(line.split() for line in file)
        labels[os.path.basename(path)[: -len(f"_{name}.txt")]] = numpy.array([stored[of[i]] for i in images])
    return images, labels


def protocol(voc, weights_file, costs):
    costs = [float(cost) for cost in costs.split(",")]
    (train, train_labels), (test, test_labels) = split(voc, "trainval"), split(voc, "test")
    x, y = both(voc, weights_file, train, test)
    sets = (x, train_labels), (y, test_labels)
    print(json.dumps({form: classes(*sets, costs, form) for form in ("as-published", "ignore")}))


def classes(train, test, costs, difficult):
    (x, train_labels), (y, test_labels) = train, test
    found = {}
    for name, stored in train_labels.items():
        kept = stored != -1 if difficult == "ignore" else numpy.ones(len(stored), bool)
        rows, targets = x[kept], numpy.where(stored[kept] == 1, 1, -1)
        score = lambda c: cross_val_score(machine(c, EXACT), rows, targets, cv=3, scoring="average_precision").mean()
        curve = [float(score(cost)) for cost in costs]
        cost = costs[int(numpy.argmax(curve))]
        values = machine(cost, EXACT).fit(rows, targets).decision_function(y)
        tested = test_labels[name] != -1
        ap = area(values[tested], test_labels[name][tested] == 1)
        found[name] = {"ap": 100 * ap, "cost": cost, "curve": [100 * one for one in curve]}
    return found


def lowshot(voc, weights_file, costs, fixed, files):
    costs = [float(cost) for cost in costs.split(",")] + [float(fixed)]
    (train, _), (test, test_labels) = split(voc, "trainval"), split(voc, "test")
    x, y = both(voc, weights_file, train, test)
    figures = []
    for path in files:
        with open(path) as file:
            samples = json.load(file)
        means = []
        for cost in costs:
            aps = []
            for name, stored in test_labels.items():
                of = numpy.array([samples[image][name] if image in samples else -1 for image in train])
                fit = machine(cost, EXACT).fit(x[of != -1], numpy.where(of[of != -1] == 1, 1, -1))
                tested = stored != -1
                aps.append(area(fit.decision_function(y[tested]), stored[tested] == 1))
            means.append(100 * float(numpy.mean(aps)))
        figures.append(means)
    print(json.dumps(figures))


def timed_class(rows, targets, costs):
    curve = []
    for cost in costs:
        fit = machine(cost, PUBLISHED)
        curve.append(100 * cross_val_score(fit, rows, targets, cv=3, scoring="average_precision").mean())
        fit.fit(rows, targets)
    return curve


def timed(path):
    import time

    import joblib

    data = safetensors.numpy.load_file(path)
    rows, classes = data["rows"], data["targets"].T
    start = time.time()
    work = [joblib.delayed(timed_class)(rows, targets, data["costs"]) for targets in classes]
    curves = joblib.Parallel(n_jobs=os.cpu_count())(work)
    print(f"scikit-learn: {time.time() - start:.1f} s for {len(classes)} classes in {os.cpu_count()} processes")
    for curve in curves:
        print(f"scikit-learn: cost {data['costs'][int(numpy.argmax(curve))]}, cross-validation {numpy.round(curve, 4)}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="sklearn")
    verb, given = sys.argv[1], sys.argv[2:]
    if verb == "lowshot":
        lowshot(*given[:4], given[4:])
    else:
        {"machine": machines, "precision": precisions, "weights": weights, "protocol": protocol, "timed": timed}[verb](*given)
