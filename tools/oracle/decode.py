"""Makes JPEG and PNG files of many kinds, and says what Pillow sees in them.

    python decode.py make FOLDER         writes *.jpg, *.png and, for each, *.rgb (raw RGB of Pillow)
    python decode.py read FOLDER FILE..  writes FOLDER/<n>.rgb for existing files

Prints one JSON line a file: {"file", "rgb", "width", "height", "mode", "orientation", "progressive"}.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, features

# Pillow writes no others (its "4:1:1" is 4:2:0): the Rust test makes 4:4:0, 4:1:1 and 4:1:0 itself.
SUBSAMPLING = {"444": "4:4:4", "422": "4:2:2", "420": "4:2:0"}


def picture(width, height, seed, channels=3):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    planes = []
    for c in range(channels):
        wave = np.sin(x * 0.11 + c + seed) + np.cos(y * 0.07 - 2 * c)
        edge = ((x // 13 + y // 9 + c) % 2) * 0.8
        planes.append(120 + 45 * (wave + edge - 0.4) + rng.normal(0, 4, (height, width)))
    return np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8)


def report(path, rgb, image):
    exif = image.getexif().get(0x0112, 1)
    rgb.write_bytes(image.convert("RGB").tobytes())
    print(json.dumps({
        "file": path.name if path.parent == rgb.parent else str(path), "rgb": rgb.name,
        "width": image.width, "height": image.height, "mode": image.mode,
        # One of ImageNet's has 0.
        "orientation": exif if 1 <= exif <= 8 else 1,
        "progressive": bool(image.info.get("progressive", 0)),
    }))


def make(folder):
    sizes = [(1, 1), (2, 3), (7, 9), (8, 8), (16, 16), (17, 33), (33, 17), (64, 48), (250, 187), (15, 1), (1, 40)]
    for i, (w, h) in enumerate(sizes):
        rgb = Image.fromarray(picture(w, h, i))
        variants = {}
        for name, sampling in SUBSAMPLING.items():
            for progressive in (False, True):
                variants[f"{name}{'p' if progressive else ''}"] = dict(
                    subsampling=sampling, progressive=progressive, quality=90)
        variants["q30"] = dict(quality=30)
        variants["q100"] = dict(quality=100, subsampling="4:4:4")
        variants["restart"] = dict(quality=85, restart_marker_blocks=2)
        variants["restartp"] = dict(quality=85, restart_marker_rows=1, progressive=True)
        variants["optimized"] = dict(quality=85, optimize=True)
        variants["rgb"] = dict(quality=90, keep_rgb=True)
        variants["comment"] = dict(quality=85, comment=b"\xff\xd9 not the end \xff\xda")
        exif = Image.Exif()
        exif[0x0112] = 1 + i % 8
        variants["exif"] = dict(quality=85, exif=exif)
        gray, cmyk = rgb.convert("L"), Image.fromarray(picture(w, h, i, 4), "CMYK")
        files = [(f"{name}.jpg", rgb, options) for name, options in variants.items()]
        for name in ("444", "420", "420p", "restart"):
            files.append((f"gray{name}.jpg", gray, variants[name]))
            files.append((f"cmyk{name}.jpg", cmyk, variants[name]))
        files += [("rgb.png", rgb, {}), ("gray.png", gray, {}), ("rgba.png", rgb.convert("RGBA"), {}),
                  ("palette.png", rgb.quantize(16), {})]
        for name, image, options in files:
            path = folder / f"{w}x{h}-{name}"
            image.save(path, **options)
            show(folder, path)
            if name.startswith("cmyk"):
                ycck = folder / f"{w}x{h}-ycck{name[4:]}"
                ycck.write_bytes(as_ycck(path.read_bytes()))
                show(folder, ycck)


def as_ycck(data):
    """Says in the Adobe segment that the first three inks are YCbCr. Any bytes are a valid YCCK picture."""
    at = data.index(b"Adobe")
    assert data[at + 11] == 0, "Pillow writes CMYK with transform 0"
    return data[:at + 11] + b"\x02" + data[at + 12:]


def show(folder, path):
    with Image.open(path) as image:
        image.load()
        report(path, folder / (path.name + ".rgb"), image)


def main():
    what, folder = sys.argv[1], Path(sys.argv[2])
    assert features.check_feature("libjpeg_turbo"), "the oracle is Pillow with libjpeg-turbo"
    if what == "make":
        make(folder)
    else:
        for i, name in enumerate(sys.argv[3:]):
            with Image.open(name) as image:
                image.load()
                report(Path(name), folder / f"{i}.rgb", image)


if __name__ == "__main__":
    main()
