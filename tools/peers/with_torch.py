"""Loaders on torch's DataLoader: torchvision on Pillow images, torchvision v2 on tensors,
albumentations on OpenCV arrays, and webdataset with torchvision.

A worker decodes, renders and collates; a batch crosses to the consumer in shared memory. For T1 the
frame is dropped where it was decoded and one byte of it crosses, so that no loader pays for moving
full-size frames.
"""

import glob
import os
import random

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from recipe import BATCH, BLUR_P, GLOBAL, GRAY_P, JITTER, JITTER_P, LOCAL, PATCH, SIGMA, corners


class PillowBlur:
    """MoCo's blur: Pillow's, with a radius drawn each time."""

    def __call__(self, image):
        from PIL import ImageFilter

        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*SIGMA)))


class OnPillow:
    """torchvision's first transforms, on Pillow images; arrays [h, w, 3] come out."""

    def __init__(self):
        from torchvision import transforms as T

        colour = [
            T.RandomApply([T.ColorJitter(*JITTER)], p=JITTER_P),
            T.RandomGrayscale(p=GRAY_P),
            T.RandomApply([PillowBlur()], p=BLUR_P),
        ]
        flip, crop = T.RandomHorizontalFlip(), T.RandomResizedCrop
        self.plain = T.Compose([crop(GLOBAL[0], scale=GLOBAL[1]), flip])
        self.globe = T.Compose([crop(GLOBAL[0], scale=GLOBAL[1]), *colour, flip])
        self.local = T.Compose([crop(LOCAL[0], scale=LOCAL[1]), *colour, flip])

    @staticmethod
    def read(file):
        from PIL import Image

        return Image.open(file).convert("RGB")

    @staticmethod
    def byte(image):
        return image.getpixel((0, 0))[0]

    @staticmethod
    def finish(image):
        return np.array(image)

    @staticmethod
    def patches(image):
        image = np.asarray(image)
        cut = [image[y : y + PATCH, x : x + PATCH] for y, x in corners(random.randint)]
        return np.stack(cut)


class OnTensors:
    """torchvision's v2 transforms, on u8 tensors [3, h, w], which come out."""

    def __init__(self):
        from torchvision.transforms import v2 as T

        colour = [
            T.RandomApply([T.ColorJitter(*JITTER)], p=JITTER_P),
            T.RandomGrayscale(p=GRAY_P),
            T.RandomApply([T.GaussianBlur(23, SIGMA)], p=BLUR_P),
        ]
        flip = T.RandomHorizontalFlip()

        def crop(side, scale):
            return T.RandomResizedCrop(side, scale=scale, antialias=True)

        self.plain = T.Compose([crop(*GLOBAL), flip])
        self.globe = T.Compose([crop(*GLOBAL), *colour, flip])
        self.local = T.Compose([crop(*LOCAL), *colour, flip])

    @staticmethod
    def read(file):
        from torchvision.io import ImageReadMode, decode_jpeg, read_file

        return decode_jpeg(read_file(file), mode=ImageReadMode.RGB)

    @staticmethod
    def byte(image):
        return int(image[0, 0, 0])

    @staticmethod
    def finish(image):
        return image

    @staticmethod
    def patches(image):
        cut = [image[:, y : y + PATCH, x : x + PATCH] for y, x in corners(random.randint)]
        return torch.stack(cut)


class OnArrays:
    """albumentations, on OpenCV arrays [h, w, 3], which come out."""

    def __init__(self):
        import albumentations as A
        import cv2

        cv2.setNumThreads(0)
        reach = [(1 - x, 1 + x) for x in JITTER[:3]]
        colour = [
            A.ColorJitter(*reach, (-JITTER[3], JITTER[3]), p=JITTER_P),
            A.ToGray(p=GRAY_P),
            A.GaussianBlur(blur_limit=0, sigma_limit=SIGMA, p=BLUR_P),
        ]
        flip = A.HorizontalFlip(p=0.5)

        def crop(side, scale):
            # INTER_AREA is OpenCV's antialiased reduction; its INTER_LINEAR skips pixels.
            how = cv2.INTER_AREA
            return A.RandomResizedCrop(size=(side, side), scale=scale, interpolation=how)

        def arrays(*steps):
            compose = A.Compose(list(steps))
            return lambda image: compose(image=image)["image"]

        self.plain = arrays(crop(*GLOBAL), flip)
        self.globe = arrays(crop(*GLOBAL), *colour, flip)
        self.local = arrays(crop(*LOCAL), *colour, flip)

    @staticmethod
    def read(file):
        import cv2

        return cv2.imread(file, cv2.IMREAD_COLOR_RGB)

    @staticmethod
    def byte(image):
        return int(image[0, 0, 0])

    @staticmethod
    def finish(image):
        return np.ascontiguousarray(image)

    patches = staticmethod(OnPillow.patches)


def render(ops, task, image):
    """What crosses to the consumer for one decoded image."""
    if task == "T1":
        return ops.byte(image)
    if task == "T2":
        return ops.finish(ops.plain(image))
    globes = [ops.finish(ops.globe(image)) for _ in range(2)]
    return (*globes, *(ops.patches(ops.local(image)) for _ in range(2)))


class Files(Dataset):
    """The images by number."""

    def __init__(self, files, ops, task):
        self.files, self.ops, self.task = files, ops, task

    def __len__(self):
        return len(self.files)

    def __getitem__(self, number):
        return render(self.ops, self.task, self.ops.read(self.files[number]))


class Endless(Sampler):
    """One epoch after the other, each in its own order."""

    def __init__(self, length):
        self.length = length

    def __iter__(self):
        while True:
            yield from torch.randperm(self.length).tolist()


def one_thread(_worker):
    torch.set_num_threads(1)


def batches(peer, task, workers, data):
    """Endless batches: T1 [n]; T2 [n, 224, 224, 3]; T3 two of those and two [n, 9, 64, 64, 3].

    torchvision v2 has the channels before the rows.
    """
    torch.set_num_threads(1)
    if peer == "webdataset":
        return iter(webdataset(task, workers, data))
    ops = {
        "torchvision-pil": OnPillow,
        "torchvision-v2": OnTensors,
        "albumentations": OnArrays,
    }[peer]()
    files = Files(data.files, ops, task)
    loader = DataLoader(
        files,
        batch_size=BATCH,
        sampler=Endless(len(files)),
        num_workers=workers,
        worker_init_fn=one_thread,
        prefetch_factor=2,
    )
    return iter(loader)


def webdataset(task, workers, data):
    import webdataset as wds

    ops = OnPillow()
    shards = sorted(glob.glob(os.path.join(data.shards, "*.tar")))
    samples = wds.WebDataset(shards, resampled=True, shardshuffle=False).shuffle(200)
    samples = samples.decode("pilrgb").to_tuple("jpg").map(lambda one: render(ops, task, one[0]))
    samples = samples.batched(BATCH, collation_fn=default_collate)
    return wds.WebLoader(
        samples,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=one_thread,
        prefetch_factor=2,
    )
