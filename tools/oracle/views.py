"""Renders view plans with Pillow and torchvision and compares them with what `detco-shards` made.

    python views.py FOLDER

FOLDER holds `plans.json`: a list of cases {image, width, height, plan, out}. `image` and `out` are files of
raw RGB bytes; `out` is [size, size, 3] or, for a view with a grid, [patches, patch, patch, 3].
Prints one JSON line a case: {"mean": .., "worst": .., "share": ..} in grey levels and share of bytes that differ.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from resizing import resize
from torchvision.transforms import functional as F
from torchvision.transforms import InterpolationMode


SIMPLE = {
    "autocontrast": ImageOps.autocontrast,
    "equalize": ImageOps.equalize,
    "invert": ImageOps.invert,
}


def apply(image, op):
    if op == "gray":
        return F.rgb_to_grayscale(image, num_output_channels=3)
    if op == "flip":
        return F.hflip(image)
    if isinstance(op, str):
        return SIMPLE[op](image)
    (name, value), = op.items()
    if name == "affine":
        filter = Image.Resampling.BICUBIC if value["bicubic"] else Image.Resampling.BILINEAR
        fill = (124, 116, 104)
        return image.transform(
            image.size, Image.Transform.AFFINE, value["matrix"], resample=filter, fillcolor=fill
        )
    if name == "posterize":
        return ImageOps.posterize(image, value)
    if name == "solarize":
        return ImageOps.solarize(image, value)
    if name == "solarizeadd":
        return image.point([min(255, i + value) if i < 128 else i for i in range(256)] * 3)
    value = float(np.float32(value))
    if name == "brightness":
        return F.adjust_brightness(image, value)
    if name == "contrast":
        return F.adjust_contrast(image, value)
    if name == "saturation":
        return F.adjust_saturation(image, value)
    if name == "hue":
        return F.adjust_hue(image, value)
    if name == "blur":
        return image.filter(ImageFilter.GaussianBlur(radius=value))
    if name == "sharpness":
        return ImageEnhance.Sharpness(image).enhance(value)
    raise ValueError(name)


def view(image, plan):
    box, size = plan["crop"], plan["size"]
    filter = InterpolationMode(plan["filter"])
    if plan.get("resized"):
        # torchvision's Resize(short), whose sides have to be those of the plan.
        sides = F.resize(image, min(plan["resized"]), interpolation=filter, antialias=True).size
        assert sides == tuple(plan["resized"]), (sides, plan["resized"])
        image = resize(image, *sides, filter)
    image = F.crop(image, box["top"], box["left"], box["height"], box["width"])
    image = resize(image, size, size, filter)
    for op in plan["ops"]:
        image = apply(image, op)
    return F.hflip(image) if plan["flip"] else image


def patches(image, plan):
    whole, grid = np.asarray(view(image, plan)), plan["grid"]
    cells, patch = grid["cells"], grid["patch"]
    cell = plan["size"] // cells
    out = []
    for i in grid["order"]:
        left, top = grid["offsets"][i]
        top, left = (i // cells) * cell + top, (i % cells) * cell + left
        out.append(whole[top:top + patch, left:left + patch])
    return np.stack(out)


def main(folder):
    images = {}
    for case in json.loads((folder / "plans.json").read_text()):
        if case["image"] not in images:
            raw = (folder / case["image"]).read_bytes()
            images[case["image"]] = Image.frombytes("RGB", (case["width"], case["height"]), raw)
        image = images[case["image"]]
        want = patches(image, case["plan"]) if case["plan"].get("grid") else np.asarray(view(image, case["plan"]))
        got = np.frombuffer((folder / case["out"]).read_bytes(), np.uint8).reshape(want.shape)
        error = np.abs(got.astype(np.int16) - want.astype(np.int16))
        print(json.dumps({
            "mean": float(error.mean()), "worst": int(error.max()), "share": float((error > 0).mean()),
        }))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
