"""Attention maps in plain NumPy.

    attention.py FILE.safetensors OUT.safetensors
    attention.py resize IMAGE SHORT OUT.safetensors    torchvision's Resize on Pillow's pixels, [h, w, 3]

Reads maps [n, c, h, w], size [2] (height, width) and boxes [n, k, 4] (left, top, width, height). Writes, for mean,
sum-squares and eigen, the maps [n, height, width] and the figures [n, 4]: energy share, area share, pointed, IoU.
"""

import sys

import numpy
import safetensors.numpy


def bilinear(map, height, width):
    """Enlarged with pixel centres at halves."""
    def axis(inputs, outputs):
        places = numpy.clip((numpy.arange(outputs) + 0.5) * inputs / outputs - 0.5, 0, None)
        low = numpy.minimum(places.astype(int), inputs - 1)
        high = numpy.minimum(low + 1, inputs - 1)
        share = places - low
        matrix = numpy.zeros((outputs, inputs))
        for i in range(outputs):
            matrix[i, low[i]] += 1 - share[i]
            matrix[i, high[i]] += share[i]
        return matrix

    return axis(map.shape[0], height) @ map @ axis(map.shape[1], width).T


def eigen(map):
    rows = map.reshape(map.shape[0], -1).T
    along = (rows @ numpy.linalg.svd(rows, full_matrices=False)[2][0]).reshape(map.shape[1:])
    return along if numpy.corrcoef(along.ravel(), map.mean(0).ravel())[0, 1] >= 0 else -along


def figures(map, boxes):
    y, x = numpy.mgrid[: map.shape[0], : map.shape[1]] + 0.5
    masks = [(x >= l) & (x < l + w) & (y >= t) & (y < t + h) for l, t, w, h in boxes]
    union = numpy.any(masks, axis=0)
    bright = map >= map.mean()
    top = numpy.unravel_index(numpy.argmax(map), map.shape)
    best = max((bright & m).sum() / (bright | m).sum() for m in masks)
    return [map[union].sum() / map.sum(), union.mean(), float(union[top]), best]


def resize(image, short, out):
    from PIL import Image
    from resizing import resize_short

    pixels = resize_short(Image.open(image).convert("RGB"), int(short))
    safetensors.numpy.save_file({"pixels": numpy.array(pixels)}, out)


if sys.argv[1] == "resize":
    resize(*sys.argv[2:])
    sys.exit()
data = safetensors.numpy.load_file(sys.argv[1])
height, width = data["size"].tolist()
methods = {"mean": lambda m: m.mean(0), "sum-squares": lambda m: (m**2).sum(0), "eigen": eigen}
found = {}
for name, method in methods.items():
    maps, numbers = [], []
    for map, boxes in zip(data["maps"].astype(numpy.float64), data["boxes"]):
        reduced = method(map)
        reduced = (reduced - reduced.min()) / (reduced.max() - reduced.min())
        maps.append(bilinear(reduced, height, width))
        numbers.append(figures(maps[-1], boxes))
    found[name] = numpy.array(maps)
    found[name + ".figures"] = numpy.array(numbers)
safetensors.numpy.save_file(found, sys.argv[2])
