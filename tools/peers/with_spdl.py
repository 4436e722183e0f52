"""SPDL: FFmpeg decodes, in a pipeline of threads.

T2 is done inside FFmpeg's filter graph. FFmpeg has no colour jitter, so T3 is torchvision v2 on
SPDL's frames, in SPDL's threads.
"""

import math
import random

import spdl.io
import torch
from spdl.pipeline import PipelineBuilder

from recipe import BATCH, GLOBAL, RATIO
from with_torch import OnTensors, render


def box(width, height, scale):
    """torchvision's RandomResizedCrop.get_params, but for its rare last resort."""
    for _ in range(10):
        area = width * height * random.uniform(*scale)
        ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, width - w), random.randint(0, height - h), w, h
    return 0, 0, width, height


def decoded(file):
    return spdl.io.load_image(file)


def one_view(file):
    packets = spdl.io.demux_image(file)
    side, scale = GLOBAL
    x, y, w, h = box(packets.codec.width, packets.codec.height, scale)
    flip = "hflip," if random.random() < 0.5 else ""
    steps = f"crop={w}:{h}:{x}:{y}:exact=1,scale={side}:{side}:flags=bilinear,{flip}format=rgb24"
    return spdl.io.decode_packets(packets, filter_desc=steps)


def batches(_peer, task, workers, data):
    """Endless batches: T1 a list of bytes; T2 [n, 224, 224, 3]; T3 as torchvision v2's."""
    torch.set_num_threads(1)
    ops = OnTensors() if task == "T3" else None

    def four_views(file):
        return render(ops, task, spdl.io.to_torch(decoded(file)).permute(2, 0, 1))

    def one_byte(file):
        return int(spdl.io.to_numpy(decoded(file))[0, 0, 0])

    def files():
        while True:
            yield from random.sample(data.files, len(data.files))

    one, collate = {
        "T1": (one_byte, lambda bytes_: bytes_),
        "T2": (one_view, lambda frames: spdl.io.to_torch(spdl.io.convert_frames(frames))),
        "T3": (four_views, lambda views: [torch.stack(parts) for parts in zip(*views)]),
    }[task]
    builder = PipelineBuilder().add_source(files()).pipe(one, concurrency=workers)
    pipeline = builder.aggregate(BATCH).pipe(collate).add_sink(2).build(num_threads=workers)
    with pipeline.auto_stop():
        yield from pipeline
