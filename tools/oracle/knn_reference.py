"""Weighted kNN (Wu et al., 2018) in plain NumPy, in float64, one query at a time.

    knn_reference.py FILE.safetensors K T

Reads train_features [m, c], train_classes [m], test_features [n, c], test_classes [n]; prints JSON:
top1, top5 in percent, and how many queries are too close to call in float32.
"""

import json
import sys

import numpy
import safetensors.numpy


def unit(rows):
    rows = rows.astype(numpy.float64)
    return rows / numpy.maximum(numpy.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


data = safetensors.numpy.load_file(sys.argv[1])
k, temperature = int(sys.argv[2]), float(sys.argv[3])
train, test = unit(data["train_features"]), unit(data["test_features"])
train_classes, test_classes = data["train_classes"], data["test_classes"]
k = min(k, len(train))
top1 = top5 = close = 0
for feature, wanted in zip(test, test_classes):
    similarity = train @ feature
    # Nearest first; of equally near ones the first in memory.
    order = sorted(range(len(train)), key=lambda row: (-similarity[row], row))
    votes = {}
    for row in order[:k]:
        cls = int(train_classes[row])
        votes[cls] = votes.get(cls, 0.0) + numpy.exp(similarity[row] / temperature)
    ranked = sorted(votes, key=lambda cls: (-votes[cls], cls))
    top1 += ranked[0] == wanted
    top5 += wanted in ranked[:5]
    gaps = [1 - votes[b] / votes[a] for a, b in zip(ranked[:6], ranked[1:6])]
    if k < len(train):
        gaps.append((similarity[order[k - 1]] - similarity[order[k]]) / temperature)
    # An exact tie is decided by the order, and float32 sees it as one too.
    close += any(0 < gap < 2e-5 for gap in gaps)
n = len(test)
print(json.dumps({"top1": 100 * top1 / n, "top5": 100 * top5 / n, "close": close}))
