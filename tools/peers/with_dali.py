"""NVIDIA DALI with CPU operators alone, reading the shards that `detco pack` wrote by their indexes.

Batches stay in DALI's own buffers: nothing is copied into another library's tensors.
"""

import glob
import os

import numpy as np
from nvidia.dali import fn, pipeline_def, types

from recipe import (
    BATCH, BLUR_P, CELL, GLOBAL, GRAY_P, GRID, JITTER, JITTER_P, LOCAL, PATCH, RATIO, SIGMA,
)

TRIANGULAR = types.INTERP_TRIANGULAR  # antialiased, as everyone else's


def uniform(reach):
    return fn.random.uniform(range=list(reach))


def coin(probability):
    return fn.cast(fn.random.coin_flip(probability=probability), dtype=types.FLOAT)


def flipped(image):
    return fn.flip(image, horizontal=fn.random.coin_flip())


def view(encoded_or_image, side, scale):
    """One coloured, blurred, flipped view [side, side, 3]."""
    image = fn.random_resized_crop(
        encoded_or_image,
        size=[side, side],
        random_area=list(scale),
        random_aspect_ratio=list(RATIO),
        interp_type=TRIANGULAR,
    )
    on, colour = coin(JITTER_P), 1.0 - coin(GRAY_P)
    brightness, contrast, saturation = (1.0 + on * uniform((-x, x)) for x in JITTER[:3])
    hue = on * uniform((-360 * JITTER[3], 360 * JITTER[3]))
    image = fn.color_twist(
        image, brightness=brightness, contrast=contrast, saturation=saturation * colour, hue=hue
    )
    if fn.random.coin_flip(probability=BLUR_P, dtype=types.BOOL):
        image = fn.gaussian_blur(image, sigma=uniform(SIGMA))
    else:
        image = image
    return flipped(image)


def patches(image):
    """Nine patches [9, 64, 64, 3]. DALI does not shuffle within a sample: they stay in order."""
    size = types.Constant(np.array([PATCH, PATCH], np.int32), device="cpu")
    slack = CELL - PATCH
    cut = []
    for cell in range(GRID * GRID):
        corner = np.array([cell // GRID * CELL, cell % GRID * CELL], np.int32)
        offset = fn.random.uniform(range=[-0.499, slack + 0.499], shape=[2])
        at = fn.cast(offset, dtype=types.INT32) + types.Constant(corner, device="cpu")
        cut.append(fn.slice(image, at, size, axes=[0, 1]))
    return fn.stack(*cut, axis=0)


def batches(_peer, task, workers, data):
    """Endless batches as DALI's pipeline returns them: a tuple of tensor lists."""
    shards = sorted(glob.glob(os.path.join(data.shards, "*.tar")))
    indexes = [os.path.splitext(shard)[0] + ".idx" for shard in shards]

    @pipeline_def(
        batch_size=BATCH,
        num_threads=workers,
        device_id=None,
        prefetch_queue_depth=2,
        enable_conditionals=True,
    )
    def graph():
        encoded = fn.readers.webdataset(
            paths=shards,
            index_paths=indexes,
            ext=["jpg"],
            random_shuffle=True,
            missing_component_behavior="error",
            name="reader",
        )
        if task == "T2":
            crop = fn.decoders.image_random_crop(
                encoded,
                device="cpu",
                output_type=types.RGB,
                random_area=list(GLOBAL[1]),
                random_aspect_ratio=list(RATIO),
            )
            side = [GLOBAL[0], GLOBAL[0]]
            return flipped(fn.resize(crop, size=side, interp_type=TRIANGULAR))
        image = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        if task == "T1":
            return image
        globes = [view(image, *GLOBAL) for _ in range(2)]
        return (*globes, *(patches(view(image, *LOCAL)) for _ in range(2)))

    pipeline = graph()
    pipeline.build()
    while True:
        yield pipeline.run()
