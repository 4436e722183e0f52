"""One peer on one task: prints `{"images_per_s": ..., "images": ..., "seconds": ...}`.

The window opens when the loader has run for a while, so neither its start nor its drain is counted;
it ends with a whole number of batches of every worker. The consumer takes a batch and drops it.
Which cores this may use is the caller's affair: every thread and process here inherits it.

    python measure.py PEER --task T3 --workers 1 --files LIST --shards DIR --beton FILE --seconds 8
    python measure.py PEER --check                 imports it and prints versions
    ... --show SHEET.png                           one batch: shapes, types, means, and a picture
"""

import argparse
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import sys
import tempfile
import time

from recipe import BATCH

# Its module here, and the packages whose versions matter.
PEERS = {
    "torchvision-pil": ("with_torch", ["torch", "torchvision", "pillow"]),
    "torchvision-v2": ("with_torch", ["torch", "torchvision"]),
    "webdataset": ("with_torch", ["webdataset", "torch", "torchvision", "pillow"]),
    "albumentations": (
        "with_torch", ["albumentations", "opencv-python-headless", "torch"],
    ),
    "dali": ("with_dali", ["nvidia-dali-cuda130"]),
    "ffcv": ("with_ffcv", ["ffcv", "numba", "torch"]),
    "spdl": ("with_spdl", ["spdl-io", "torch", "torchvision"]),
}
# More than the module's own imports: what it imports when asked for a view.
LATE = {
    "torchvision-pil": ["torchvision", "PIL.Image"],
    "torchvision-v2": ["torchvision.transforms.v2", "torchvision.io"],
    "webdataset": ["webdataset", "torchvision"],
    "albumentations": ["albumentations", "cv2"],
    "spdl": ["torchvision.transforms.v2"],
}
WARM_SECONDS = 2
# FFCV's slots take turns; each has scratch that is first touched in its first batch.
WARM_BATCHES = 6
IMAGES_MIN = 512


def window(batches, workers, seconds):
    """Images and seconds of a steady window of at least `seconds`."""
    started, taken = time.perf_counter(), 0
    while taken < WARM_BATCHES or time.perf_counter() - started < WARM_SECONDS:
        next(batches)
        taken += 1
    started, taken = time.perf_counter(), 0
    while True:
        next(batches)
        taken += 1
        elapsed = time.perf_counter() - started
        # Workers deliver in turns: only whole turns count.
        if taken % workers == 0 and elapsed >= seconds and taken * BATCH >= IMAGES_MIN:
            return taken * BATCH, elapsed


def arrays(peer, task, batch):
    """The batch as numpy arrays, whatever it is made of."""
    import numpy as np

    def array(part):
        if hasattr(part, "is_dense_tensor"):  # DALI: frames have their own sizes
            dense = part.is_dense_tensor()
            return part.as_array() if dense else np.concatenate([np.ravel(one) for one in part])
        return part.numpy() if hasattr(part, "numpy") else np.asarray(part)

    if peer == "ffcv" and task == "T3":
        return importlib.import_module("with_ffcv").parts(batch)
    whole = hasattr(batch, "shape") or not isinstance(batch, (list, tuple))
    return [array(part) for part in ([batch] if whole else batch)]


def show(peer, task, batch, sheet):
    """Says what a batch holds; draws its first four samples, a row each."""
    import numpy as np
    from PIL import Image

    columns = []
    for views in arrays(peer, task, batch):
        said = f"{peer} {task} {views.shape} {views.dtype}"
        print(said, f"mean {views.mean():.1f} std {views.std():.1f} max {views.max()}")
        if views.ndim < 4:
            continue
        if views.shape[-1] != 3:
            views = np.moveaxis(views, -3, -1)
        if views.ndim == 5:  # patches: three to a row
            n, _, side, _, _ = views.shape
            views = views.reshape(n, 3, 3, side, side, 3).swapaxes(2, 3)
            views = views.reshape(n, 3 * side, 3 * side, 3)
        tall = np.full((4, 224, views.shape[2] + 4, 3), 255, np.uint8)
        tall[:, : views.shape[1], : views.shape[2]] = views[:4]
        columns.append(tall.reshape(-1, *tall.shape[2:]))
    if columns and sheet:
        Image.fromarray(np.concatenate(columns, axis=1)).save(sheet)


def check(peer):
    """Imports everything and prints versions as JSON."""
    module, packages = PEERS[peer]
    for name in [module, *LATE.get(peer, [])]:
        importlib.import_module(name)
    print(json.dumps({package: importlib.metadata.version(package) for package in packages}))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--task", choices=["T1", "T2", "T3"])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--files", help="a list of images, one a line")
    parser.add_argument("--shards", help="a folder that `detco pack` wrote")
    parser.add_argument("--beton", help="FFCV's file")
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--show", metavar="PNG")
    options = parser.parse_args()
    # albumentations would ask the network for a newer version.
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    if options.check:
        check(options.peer)
        return
    with open(options.files, encoding="utf-8") as names:
        options.files = names.read().splitlines()
    module = importlib.import_module(PEERS[options.peer][0])
    batches = iter(module.batches(options.peer, options.task, options.workers, options))
    if options.show:
        show(options.peer, options.task, next(batches), options.show)
    else:
        images, elapsed = window(batches, options.workers, options.seconds)
        print(json.dumps({"images_per_s": images / elapsed, "images": images, "seconds": elapsed}))


def leave():
    """Ends at once: endless loaders have no end to wait for, and some interpreters hang in theirs."""
    sys.stdout.flush()
    # Workers that outlive this process would run into the next peer's turn.
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    os._exit(0)


if __name__ == "__main__":
    # Libraries leave files where temporary ones go (DALI one an expression): they go with this folder.
    with tempfile.TemporaryDirectory(prefix="detco-peer-", ignore_cleanup_errors=True) as scratch:
        os.environ["TMPDIR"] = tempfile.tempdir = scratch
        main()
    leave()
