"""Average precision by pycocotools, and by PASCAL VOC's definition.

    python ap.py FILE

FILE is a JSON list of cases {truth, found}: COCO's annotations and results. Prints one JSON line a case:
{"coco": twelve numbers, "voc07": AP50 and AP75, "voc10": the same}; in VOC's, crowds are its difficult objects.
-1 where there is nothing to detect, as pycocotools has it.
"""

import contextlib
import copy
import io
import json
import sys

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def coco(truth, found):
    # pycocotools takes an object of number 0 for none: numbers begin with 1.
    with contextlib.redirect_stdout(io.StringIO()):
        there = COCO()
        there.dataset = copy.deepcopy(truth)
        there.createIndex()
        if not found:
            return None
        evaluation = COCOeval(there, there.loadRes(copy.deepcopy(found)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(number) for number in evaluation.stats]


def voc_class(truth, found, category, threshold, points):
    """One category: objects by image, detections by falling score, then the curve."""
    objects = [a for a in truth["annotations"] if a["category_id"] == category]
    count = sum(1 for a in objects if not a["iscrowd"])
    if count == 0:
        return None
    mine = [f for f in found if f["category_id"] == category]
    mine = [mine[i] for i in np.argsort([-f["score"] for f in mine], kind="stable")]
    hit, met = np.zeros(len(mine)), set()
    miss = np.zeros(len(mine))
    for i, one in enumerate(mine):
        there = [(j, a) for j, a in enumerate(objects) if a["image_id"] == one["image_id"]]
        overlaps = [iou(one["bbox"], a["bbox"]) for _, a in there]
        k = int(np.argmax(overlaps)) if overlaps else -1
        if k < 0 or overlaps[k] <= threshold:
            miss[i] = 1
        elif not there[k][1]["iscrowd"]:
            (miss if there[k][0] in met else hit)[i] = 1
            met.add(there[k][0])
    hit, miss = np.cumsum(hit), np.cumsum(miss)
    recall = hit / count
    precision = hit / np.maximum(hit + miss, np.finfo(np.float64).eps)
    if points:
        reached = [precision[recall >= t] for t in np.arange(0, 1.1, 0.1)]
        return sum(p.max() if p.size else 0 for p in reached) / 11
    recall = np.concatenate([[0], recall, [1]])
    envelope = np.maximum.accumulate(np.concatenate([[0], precision, [0]])[::-1])[::-1]
    return float(np.sum((recall[1:] - recall[:-1]) * envelope[1:]))


def iou(a, b):
    """Of boxes that hold the pixels at both of their ends."""
    sides = [min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) + 1 for i in (0, 1)]
    shared = max(sides[0], 0) * max(sides[1], 0)
    return shared / ((a[2] + 1) * (a[3] + 1) + (b[2] + 1) * (b[3] + 1) - shared)


def voc(truth, found, points):
    numbers = []
    for threshold in (0.5, 0.75):
        each = [voc_class(truth, found, c["id"], threshold, points) for c in truth["categories"]]
        each = [number for number in each if number is not None]
        numbers.append(float(np.mean(each)) if each else -1.0)
    return numbers


def main(path):
    with open(path) as file:
        cases = json.load(file)
    for case in cases:
        truth, found = case["truth"], case["found"]
        print(json.dumps({
            "coco": coco(truth, found), "voc07": voc(truth, found, True), "voc10": voc(truth, found, False),
        }))


if __name__ == "__main__":
    main(sys.argv[1])
