"""nvJPEG called alone in a loop: images a second, printed as one line of JSON.

    python3 nvjpeg_alone.py SHARD.tar... [--images 512] [--batch 64] [--threads 16] [--seconds 4]
        [--library PATH]

Straight calls of the library, found through the loader's path: full batches for the hardware engine, and
single images by the hybrid back end in so many threads, each with two states in turn. Nothing else is done
with the pixels: this is what a pipeline around it is measured against. Beside it what our pipeline does not
do: the hardware engine fed from page-locked memory, and batches without it (`gpu-batched`).
"""

import argparse
import ctypes
import json
import statistics
import tarfile
import threading
import time
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p

HYBRID, GPU_HYBRID, HARDWARE = 1, 2, 3
RGBI = 5
# As our own decoder asks for it: interpolated chroma; where codes are read on the CPU, no damaged ones.
INTERPOLATED, STRICT = 1 << 5, 1 << 2
PADDING = 4 << 20
SIDE, CSS_444 = 512, 0  # what batches' memory is set aside for
WINDOWS = 5


class Image(ctypes.Structure):
    _fields_ = [("channel", c_void_p * 4), ("pitch", c_size_t * 4)]


class Failed(Exception):
    pass


class Nvjpeg:
    """The library with one back end."""

    def __init__(self, library, backend):
        self.library, self.handle = library, c_void_p()
        flags = INTERPOLATED | (STRICT if backend == HYBRID else 0)
        self.call("nvjpegCreateEx", c_int(backend), None, None, c_uint(flags), byref(self.handle))
        if backend == HYBRID:
            self.call("nvjpegSetDeviceMemoryPadding", c_size_t(PADDING), self.handle)
            self.call("nvjpegSetPinnedMemoryPadding", c_size_t(PADDING), self.handle)

    def call(self, name, *arguments):
        status = getattr(self.library, name)(*arguments)
        if status != 0:
            raise Failed(f"{name}: status {status}")

    def new(self, name):
        made = c_void_p()
        self.call(name, self.handle, byref(made))
        return made

    def size(self, jpeg):
        components, sampling, widths, heights = c_int(), c_int(), (c_int * 4)(), (c_int * 4)()
        sizes = byref(components), byref(sampling), widths, heights
        self.call("nvjpegGetImageInfo", self.handle, jpeg, c_size_t(len(jpeg)), *sizes)
        return widths[0], heights[0]

    def takes(self, stream, jpeg):
        refused, nothing = c_int(1), c_int(0)
        try:
            self.call("nvjpegJpegStreamParse", self.handle, jpeg, c_size_t(len(jpeg)), nothing, nothing, stream)
            self.call("nvjpegDecodeBatchedSupported", self.handle, stream, byref(refused))
        except Failed:
            return False
        return refused.value == 0

    def reserve(self, state, images):
        """Memory for batches; without it nvJPEG allocates when it decodes."""
        sizes = c_int(images), c_int(SIDE), c_int(SIDE), c_int(CSS_444), c_int(RGBI)
        try:
            self.call("nvjpegDecodeBatchedPreAllocate", self.handle, state, *sizes)
        except Failed:
            pass


def pitch(width):
    """Bytes of a row, as our decoder lays them."""
    return (width * 3 + 15) // 16 * 16


def target(torch, size):
    """Memory for an image, and how nvJPEG is told of it."""
    width, height = size
    memory = torch.empty(height * pitch(width), dtype=torch.uint8, device="cuda")
    image = Image()
    image.channel[0], image.pitch[0] = memory.data_ptr(), pitch(width)
    return memory, image


def rate(work, seconds):
    """Median images a second of the windows; `work` decodes for so long and returns how many."""
    work(seconds / 2)
    rates = []
    for _ in range(WINDOWS):
        start = time.perf_counter()
        images = work(seconds / WINDOWS)
        rates.append(images / (time.perf_counter() - start))
    return dict(images_per_s=statistics.median(rates), windows=rates)


def hardware(torch, library, jpegs, args, pinned=False):
    nvjpeg = Nvjpeg(library, HARDWARE)
    engines, cores = c_uint(), c_uint()
    nvjpeg.call("nvjpegGetHardwareDecoderInfo", nvjpeg.handle, byref(engines), byref(cores))
    if engines.value == 0:
        raise Failed("no hardware engine")
    return batched(torch, nvjpeg, jpegs, args, pinned) | dict(engines=engines.value, cores=cores.value)


def hardware_pinned(torch, library, jpegs, args):
    return hardware(torch, library, jpegs, args, pinned=True)


def gpu_batched(torch, library, jpegs, args):
    """Batches whose codes the GPU's own cores read: larger than 50, as nvjpeg.h has it."""
    return batched(torch, Nvjpeg(library, GPU_HYBRID), jpegs, args, pinned=False)


def batched(torch, nvjpeg, jpegs, args, pinned):
    header = nvjpeg.new("nvjpegJpegStreamCreate")
    jpegs = [jpeg for jpeg in jpegs if nvjpeg.takes(header, jpeg)]
    if not jpegs:
        raise Failed("the engine takes none of the images")
    stream = torch.cuda.Stream()
    batches, size = [], min(args.batch, len(jpegs))
    for first in range(0, len(jpegs) - size + 1, size):
        some = jpegs[first : first + size]
        targets = [target(torch, nvjpeg.size(jpeg)) for jpeg in some]
        data = (c_char_p * size)(*some)
        if pinned:
            some = [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8).pin_memory() for jpeg in some]
            data = (c_void_p * size)(*(jpeg.data_ptr() for jpeg in some))
        lengths = (c_size_t * size)(*map(len, some))
        images = (Image * size)(*(t[1] for t in targets))
        batches.append((size, data, lengths, images, (targets, some)))
    states = [nvjpeg.new("nvjpegJpegStateCreate") for _ in range(2)]
    for state in states:
        nvjpeg.reserve(state, size)
    events = [torch.cuda.Event() for _ in states]
    turn = 0

    def work(seconds):
        nonlocal turn
        images, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            count, data, lengths, targets, _ = batches[turn % len(batches)]
            state, event = states[turn % 2], events[turn % 2]
            event.synchronize()  # its batch before last is done
            nvjpeg.call("nvjpegDecodeBatchedInitialize", nvjpeg.handle, state, c_int(count), c_int(1), c_int(RGBI))
            queue = c_void_p(stream.cuda_stream)
            nvjpeg.call("nvjpegDecodeBatched", nvjpeg.handle, state, data, lengths, targets, queue)
            event.record(stream)
            images, turn = images + count, turn + 1
        stream.synchronize()
        return images

    return rate(work, args.seconds) | dict(taken=len(jpegs))


def taken(torch, nvjpeg, jpegs):
    """The images that the back end decodes, and their sizes."""
    state, kept, sizes = nvjpeg.new("nvjpegJpegStateCreate"), [], []
    stream = torch.cuda.current_stream()
    for jpeg in jpegs:
        try:
            size = nvjpeg.size(jpeg)
            memory, image = target(torch, size)
            arguments = jpeg, c_size_t(len(jpeg)), c_int(RGBI), byref(image), c_void_p(stream.cuda_stream)
            nvjpeg.call("nvjpegDecode", nvjpeg.handle, state, *arguments)
            stream.synchronize()
        except Failed:  # four inks, and what else nvJPEG refuses
            continue
        kept.append(jpeg)
        sizes.append(size)
    if not kept:
        raise Failed("it decodes none of the images")
    return kept, sizes


def hybrid(torch, library, jpegs, args):
    nvjpeg = Nvjpeg(library, HYBRID)
    jpegs, sizes = taken(torch, nvjpeg, jpegs)
    largest = max(sizes, key=lambda size: pitch(size[0]) * size[1])
    workers = []
    for number in range(args.threads):
        lanes = [(nvjpeg.new("nvjpegJpegStateCreate"), target(torch, largest)) for _ in range(2)]
        workers.append((number, lanes, torch.cuda.Stream()))

    def work(seconds):
        counts, failed, end = [0] * len(workers), [], time.perf_counter() + seconds

        def run(number, lanes, stream):
            torch.cuda.set_device(0)  # the device's context, in this thread
            at = number
            try:
                while time.perf_counter() < end:
                    state, (_, image) = lanes[counts[number] % 2]
                    jpeg, width = jpegs[at % len(jpegs)], sizes[at % len(jpegs)][0]
                    image.pitch[0] = pitch(width)
                    arguments = jpeg, c_size_t(len(jpeg)), c_int(RGBI), byref(image), c_void_p(stream.cuda_stream)
                    nvjpeg.call("nvjpegDecode", nvjpeg.handle, state, *arguments)
                    counts[number] += 1
                    at += len(workers)
                stream.synchronize()
            except Failed as failure:
                failed.append(failure)

        threads = [threading.Thread(target=run, args=worker) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
        return sum(counts)

    return rate(work, args.seconds) | dict(threads=args.threads, taken=len(jpegs))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shard", nargs="+")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--library", default="libnvjpeg.so.13")
    args = parser.parse_args()

    library = ctypes.CDLL(args.library)
    jpegs = []
    for shard in args.shard:
        with tarfile.open(shard) as archive:
            for member in archive:
                if member.name.endswith((".jpg", ".jpeg")) and len(jpegs) < args.images:
                    jpegs.append(archive.extractfile(member).read())
    version = []
    for part in range(3):
        value = c_int()
        library.nvjpegGetProperty(c_int(part), byref(value))
        version.append(value.value)
    import torch

    figures = dict(version=version, images=len(jpegs))
    if torch.cuda.is_available():
        torch.cuda.init()
    measures = dict(hardware=hardware, hybrid=hybrid)
    measures |= {"hardware-pinned": hardware_pinned, "gpu-batched": gpu_batched}
    for name, measure in measures.items():
        try:
            figures[name] = measure(torch, library, jpegs, args)
        except (Failed, RuntimeError) as failure:  # the latter is PyTorch's
            figures[name] = dict(error=str(failure))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
