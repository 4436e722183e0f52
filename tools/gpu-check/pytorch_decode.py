"""torchvision's decode_jpeg on the GPU: images a second, printed as one line of JSON.

    python3 pytorch_decode.py SHARD.tar... [--images 512] [--rounds 5] [--batch 64] [--device cuda]
"""

import argparse
import json
import statistics
import tarfile
import time

import torch
from torchvision.io import ImageReadMode, decode_jpeg


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shard", nargs="+")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()

    encoded = []
    for shard in args.shard:
        with tarfile.open(shard) as archive:
            for member in archive:
                if member.name.endswith((".jpg", ".jpeg")) and len(encoded) < args.images:
                    bytes_ = archive.extractfile(member).read()
                    encoded.append(torch.frombuffer(bytearray(bytes_), dtype=torch.uint8))
    rates, refused = [], set()
    for number in range(args.rounds + 1):
        done, start = 0, time.perf_counter()
        for first in range(0, len(encoded), args.batch):
            batch = encoded[first : first + args.batch]
            batch = [one for i, one in enumerate(batch) if first + i not in refused]
            try:
                done += len(decode_jpeg(batch, mode=ImageReadMode.RGB, device=args.device))
            except RuntimeError:  # one that nvJPEG refuses spoils its batch: find it
                for i in range(first, min(first + args.batch, len(encoded))):
                    try:
                        decode_jpeg([encoded[i]], mode=ImageReadMode.RGB, device=args.device)
                    except RuntimeError:
                        refused.add(i)
        if args.device == "cuda":
            torch.cuda.synchronize()
        if number > 0:
            rates.append(done / (time.perf_counter() - start))
    print(json.dumps(dict(median_per_s=statistics.median(rates), rates=rates, refused=len(refused))))


if __name__ == "__main__":
    main()
