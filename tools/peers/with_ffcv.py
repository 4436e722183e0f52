"""FFCV, with operations of our own where it has none.

FFCV decodes a sample for one view, and has no hue, gray or Gaussian blur. `Frame` (T1), `Crops` and
`Colour` (T3) are written for this comparison, in numba, as a user of FFCV would have to. T2 is FFCV as
it comes. Colour is one linear step with the four factors in a fixed order, cheaper than
torchvision's four.

Run as a program, this writes the file that FFCV reads: `with_ffcv.py FILE_LIST OUT.beton`. FFCV
would encode the pictures anew; here it gets the same JPEG bytes as everyone.
"""

import os
import sys
from dataclasses import replace

import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder, get_random_crop
from ffcv.libffcv import imdecode, resize_crop
from ffcv.loader import Loader, OrderOption
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.transforms import RandomHorizontalFlip, ToTensor
from numba import njit

from recipe import (
    BATCH, BLUR_P, CELL, GLOBAL, GRAY_P, GRID, JITTER, JITTER_P, LOCAL, PATCH, RATIO, SIGMA,
)

U8 = np.dtype("u1")
G, L = GLOBAL[0], LOCAL[0]
CROPS = 2 * 3 * (G * G + L * L)
PATCHES = 3 * GRID * GRID * PATCH * PATCH
VIEWS = 2 * (3 * G * G + PATCHES)
RADIUS_MAX = int(np.ceil(3 * SIGMA[1]))
BRIGHTNESS, CONTRAST, SATURATION, HUE = JITTER


def frame_bytes(metadata):
    """Scratch of a slot: the largest frame."""
    return int(metadata["width"].max()) * int(metadata["height"].max()) * 3


class Frame(SimpleRGBImageDecoder):
    """T1: decodes into scratch and hands on one byte."""

    def declare_state_and_memory(self, previous):
        memory = AllocationQuery((1,), U8), AllocationQuery((frame_bytes(self.metadata),), U8)
        return replace(previous, jit_mode=True, shape=(1,), dtype=U8), memory

    def generate_code(self):
        read, each, decode = self.memory_read, Compiler.get_iterator(), Compiler.compile(imdecode)

        def run(indices, memory, metadata, state):
            out, scratch = memory
            for k in each(len(indices)):
                field = metadata[indices[k]]
                h, w = np.uint32(field["height"]), np.uint32(field["width"])
                raw = read(field["data_ptr"], state)
                decode(raw, scratch[k], h, w, h, w, 0, 0, 1, 1, False, False)
                out[k, 0] = scratch[k, 0]
            return out[: len(indices)]

        run.is_parallel = True
        return run


class Crops(SimpleRGBImageDecoder):
    """T3: decodes once and makes the four crops with FFCV's own box and resize (INTER_AREA)."""

    def declare_state_and_memory(self, previous):
        memory = AllocationQuery((CROPS,), U8), AllocationQuery((frame_bytes(self.metadata),), U8)
        return replace(previous, jit_mode=True, shape=(CROPS,), dtype=U8), memory

    def generate_code(self):
        read, each, decode = self.memory_read, Compiler.get_iterator(), Compiler.compile(imdecode)
        resize, box = Compiler.compile(resize_crop), Compiler.compile(get_random_crop)
        ratio, wide, near = np.array(RATIO), np.array(GLOBAL[1]), np.array(LOCAL[1])

        def run(indices, memory, metadata, state):
            out, scratch = memory
            for k in each(len(indices)):
                field = metadata[indices[k]]
                h, w = np.uint32(field["height"]), np.uint32(field["width"])
                raw = read(field["data_ptr"], state)
                decode(raw, scratch[k], h, w, h, w, 0, 0, 1, 1, False, False)
                image = scratch[k][: 3 * h * w].reshape(h, w, 3)
                at = 0
                for number in range(4):
                    side = G if number < 2 else L
                    y, x, ch, cw = box(h, w, wide if number < 2 else near, ratio)
                    crop = out[k][at : at + 3 * side * side].reshape(side, side, 3)
                    resize(image, y, y + ch, x, x + cw, crop)
                    at += 3 * side * side
            return out[: len(indices)]

        run.is_parallel = True
        return run


def compiled(function):
    return njit(nogil=True, fastmath=True, error_model="numpy")(function)


@compiled
def luma(image, side):
    """Mean of the gray image: what contrast turns about."""
    total = 0
    for y in range(side):
        for x in range(side):
            total += 299 * image[y, x, 0] + 587 * image[y, x, 1] + 114 * image[y, x, 2]
    return total / (1000.0 * side * side)


@compiled
def draw_colour(mean, m):
    """Draws jitter and gray into m [3, 4], one linear map of RGB; hue is a turn in YIQ."""
    brightness = contrast = saturation = 1.0
    turn = 0.0
    if np.random.rand() < JITTER_P:
        brightness = np.random.uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS)
        contrast = np.random.uniform(1 - CONTRAST, 1 + CONTRAST)
        saturation = np.random.uniform(1 - SATURATION, 1 + SATURATION)
        turn = np.random.uniform(-HUE, HUE) * 2 * np.pi
    if np.random.rand() < GRAY_P:
        saturation = 0.0
    c, s = np.cos(turn), np.sin(turn)
    weight = np.array([0.299, 0.587, 0.114])
    across = np.array([[0.701, -0.587, -0.114], [-0.299, 0.413, -0.114], [-0.299, -0.587, 0.886]])
    around = np.array([[0.168, 0.330, -0.497], [-0.328, 0.035, 0.292], [1.250, -1.050, -0.203]])
    for i in range(3):
        for j in range(3):
            hue = weight[j] + across[i, j] * c + around[i, j] * s
            m[i, j] = (saturation * hue + (1 - saturation) * weight[j]) * brightness * contrast
        m[i, 3] = mean * brightness * (1 - contrast)


@compiled
def colour(image, m, side, out):
    """image [side, side, 3] u8 -> out [side, 3 * side] float32 in 0..255, by the map m."""
    low, high = np.float32(0), np.float32(255)
    for y in range(side):
        for x in range(side):
            r = np.float32(image[y, x, 0])
            g = np.float32(image[y, x, 1])
            b = np.float32(image[y, x, 2])
            for i in range(3):
                value = m[i, 0] * r + m[i, 1] * g + m[i, 2] * b + m[i, 3]
                out[y, 3 * x + i] = min(max(value, low), high)


@compiled
def draw_kernel(kernel):
    """Draws a Gaussian into kernel and returns its radius."""
    sigma = np.random.uniform(SIGMA[0], SIGMA[1])
    radius = int(np.ceil(3 * sigma))
    total = 0.0
    for i in range(2 * radius + 1):
        kernel[i] = np.exp(-0.5 * ((i - radius) / sigma) ** 2)
        total += kernel[i]
    for i in range(2 * radius + 1):
        kernel[i] /= total
    return radius


@compiled
def blurred_row(pixels, y, kernel, radius, side, padded, row):
    """Row y of pixels [side, 3 * side], blurred into row [3 * side]; edges are mirrored."""
    width, margin = 3 * side, 3 * radius
    padded[margin : margin + width] = 0
    for i in range(2 * radius + 1):
        from_y = abs(y + i - radius)
        from_y = 2 * side - 2 - from_y if from_y >= side else from_y
        weight = kernel[i]
        for x in range(width):
            padded[margin + x] += weight * pixels[from_y, x]
    for i in range(1, radius + 1):
        for c in range(3):
            padded[margin - 3 * i + c] = padded[margin + 3 * i + c]
            padded[margin + width + 3 * i - 3 + c] = padded[margin + width - 3 * i - 3 + c]
    row[:] = 0
    for i in range(2 * radius + 1):
        weight = kernel[i]
        for x in range(width):
            row[x] += weight * padded[3 * i + x]


@compiled
def store(row, flip, side, out):
    """row [3 * side] float32 -> out [side, 3] u8, mirrored if flip."""
    half = np.float32(0.5)
    if flip:
        for x in range(side):
            for c in range(3):
                out[side - 1 - x, c] = np.uint8(row[3 * x + c] + half)
    else:
        for x in range(side):
            for c in range(3):
                out[x, c] = np.uint8(row[3 * x + c] + half)


@compiled
def view(image, side, out):
    """Colour, blur and flip of one view [side, side, 3], u8 to u8."""
    m = np.empty((3, 4), np.float32)
    draw_colour(luma(image, side), m)
    pixels = np.empty((side, 3 * side), np.float32)
    colour(image, m, side, pixels)
    flip = np.random.rand() < 0.5
    if np.random.rand() < BLUR_P:
        kernel = np.empty(2 * RADIUS_MAX + 1, np.float32)
        radius = draw_kernel(kernel)
        padded = np.empty(3 * (side + 2 * RADIUS_MAX), np.float32)
        row = np.empty(3 * side, np.float32)
        for y in range(side):
            blurred_row(pixels, y, kernel, radius, side, padded, row)
            store(row, flip, side, out[y])
    else:
        for y in range(side):
            store(pixels[y], flip, side, out[y])


@compiled
def cut(image, out):
    """Nine patches of image [255, 255, 3] into out [9, 64, 64, 3], in random order."""
    slack = CELL - PATCH
    order = np.random.permutation(GRID * GRID)
    for place in range(GRID * GRID):
        cell = order[place]
        y = cell // GRID * CELL + np.random.randint(0, slack + 1)
        x = cell % GRID * CELL + np.random.randint(0, slack + 1)
        out[place] = image[y : y + PATCH, x : x + PATCH]


class Colour(Operation):
    """T3: the four crops of `Crops` -> two global views and two patch sets in one row of bytes."""

    def declare_state_and_memory(self, previous):
        memory = AllocationQuery((VIEWS,), U8)
        return replace(previous, jit_mode=True, shape=(VIEWS,), dtype=U8), memory

    def generate_code(self):
        each = Compiler.get_iterator()

        def run(crops, out):
            for k in each(crops.shape[0]):
                whole = np.empty((L, L, 3), np.uint8)
                at, to, size = 0, 0, 3 * G * G
                for _ in range(2):
                    crop = crops[k][at : at + size].reshape(G, G, 3)
                    view(crop, G, out[k][to : to + size].reshape(G, G, 3))
                    at, to = at + size, to + size
                size = 3 * L * L
                for _ in range(2):
                    view(crops[k][at : at + size].reshape(L, L, 3), L, whole)
                    patches = out[k][to : to + PATCHES].reshape(GRID * GRID, PATCH, PATCH, 3)
                    cut(whole, patches)
                    at, to = at + size, to + PATCHES
            return out[: crops.shape[0]]

        run.is_parallel = True
        return run


def batches(_peer, task, workers, data):
    """Endless batches: T1 [n, 1]; T2 [n, 224, 224, 3]; T3 [n, bytes of the four views]."""
    image = {
        "T1": [Frame(), ToTensor()],
        "T2": [RandomResizedCropRGBImageDecoder((G, G), scale=GLOBAL[1]), RandomHorizontalFlip(),
               ToTensor()],
        "T3": [Crops(), Colour(), ToTensor()],
    }[task]
    # FFCV's epochs start slowly. One long epoch of repeated indices is faster for it.
    repeats = -(-1_000_000 // len(data.files))
    loader = Loader(
        data.beton,
        batch_size=BATCH,
        num_workers=workers,
        os_cache=True,
        order=OrderOption.RANDOM,
        drop_last=True,
        batches_ahead=2,
        indices=np.tile(np.arange(len(data.files)), repeats),
        pipelines={"image": image, "label": [IntDecoder()]},
    )
    for batch, _labels in loader:
        yield batch


def parts(batch):
    """A T3 batch as two [n, 224, 224, 3] and two [n, 9, 64, 64, 3]."""
    rows, at, views = np.asarray(batch), 0, []
    for shape in 2 * [(G, G, 3)] + 2 * [(GRID * GRID, PATCH, PATCH, 3)]:
        size = int(np.prod(shape))
        views.append(rows[:, at : at + size].reshape(-1, *shape))
        at += size
    return views


def write(files, beton):
    """Writes FFCV's file with the JPEG bytes as they are."""
    from ffcv.writer import DatasetWriter
    from PIL import Image

    def keep(_self, destination, image, malloc):
        jpeg, (width, height) = image
        destination["mode"] = IMAGE_MODES["jpg"]
        destination["height"], destination["width"] = height, width
        destination["data_ptr"], storage = malloc(len(jpeg))
        storage[:] = np.frombuffer(jpeg, np.uint8)

    RGBImageField.encode = keep

    class Source:
        def __len__(self):
            return len(files)

        def __getitem__(self, number):
            with open(files[number], "rb") as file, Image.open(files[number]) as image:
                return (file.read(), image.size), 0

    fields = {"image": RGBImageField(write_mode="jpg"), "label": IntField()}
    DatasetWriter(beton, fields, num_workers=1).from_indexed_dataset(Source(), chunksize=50)


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as names:
        write(names.read().splitlines(), sys.argv[2])
    sys.stdout.flush()
    os._exit(0)  # an interpreter with FFCV's compiled operations may hang in its last collection
