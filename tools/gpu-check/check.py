"""What only a GPU can show: runs the GPU tests, then measures, and prints one table.

    python3 check.py BUNDLE RESULTS [--only NAME,...] [--budget SECONDS]

BUNDLE is the folder that `cargo xtask gpu-check BUNDLE --images IMAGES` made on the machine that builds
(binaries, tests, benches, libnvjpeg, shards), or a tar of it. This machine needs a GPU with its driver and a Python with torch 2.11, whose
libtorch the binaries use; no Rust. RESULTS gets `results.json`, `table.md` and a log of every command.

Every figure is the median of at least five windows or steps, with the page cache warm. What fails is
named in the table with the end of its log, and the exit code is 1.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

RECIPES = ("detco-r50", "moco-v2-r50")
BATCH = 256
WORKERS = (4, 8, 16)


class Check:
    def __init__(self, bundle, results, budget):
        self.bundle, self.folder = bundle, results
        self.results, self.failures = {}, []
        self.deadline = time.monotonic() + budget
        self.work = Path(tempfile.mkdtemp(prefix="detco-gpu-check-"))
        if bundle.is_file():
            with tarfile.open(bundle) as archive:
                archive.extractall(self.work / "bundle", filter="tar")
            self.bundle = self.work / "bundle"
        self.environment = environment(self.bundle, self.images())

    def run(self, name, command, limit=120):
        """Runs a command, keeps its log, returns its output; None if it failed or has no time left."""
        left = self.deadline - time.monotonic()
        if left < 5:
            self.fail(name, "no time left")
            return None
        log = self.folder / f"{name}.log"
        start = time.monotonic()
        try:
            done = subprocess.run(
                [str(part) for part in command],
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                timeout=min(limit, left),
            )
            out, err, code = done.stdout, done.stderr, done.returncode
        except subprocess.TimeoutExpired as expired:
            text = lambda part: (part or b"").decode(errors="replace")  # noqa: E731
            out, err, code = text(expired.stdout), text(expired.stderr), "timeout"
        log.write_text(f"$ {' '.join(map(str, command))}\n{out}\n--- stderr\n{err}\n--- exit {code}\n")
        print(f"{time.monotonic() - start:6.1f} s  {name}: exit {code}", flush=True)
        if code != 0:
            self.fail(name, (err or out).strip()[-400:])
            return None
        return out

    def fail(self, name, why):
        self.failures.append((name, why))

    def figures(self, name, command, limit=120):
        """A command whose last line of output is JSON."""
        out = self.run(name, command, limit)
        if out is None:
            return None
        try:
            self.results[name] = json.loads(out.strip().splitlines()[-1])
        except (ValueError, IndexError):
            self.fail(name, f"no JSON in its last line: {out[-200:]!r}")
            return None
        return self.results[name]

    def shards(self):
        return sorted((self.bundle / "shards").glob("*.tar"))

    def images(self):
        """The shards' images as files, for tests."""
        folder = self.work / "images"
        folder.mkdir()
        for shard in self.shards():
            with tarfile.open(shard) as archive:
                for member in archive:
                    if member.name.endswith(".jpg"):
                        file = folder / Path(member.name).name
                        file.write_bytes(archive.extractfile(member).read())
        return folder

    # The parts, in the order in which they run.

    def tests(self):
        """The tests that use a GPU where there is one."""
        counts = {}
        for test in sorted((self.bundle / "tests").iterdir()):
            out = self.run(f"test-{test.name}", [test, "--test-threads", "2"], 180)
            text = out or (self.folder / f"test-{test.name}.log").read_text()
            found = re.search(r"(\d+) passed; (\d+) failed", text)
            counts[test.name] = [int(n) for n in found.groups()] if found else None
        self.results["tests"] = counts

    def decode(self):
        """Decoding alone: nvJPEG, the CPU, and torchvision's way to nvJPEG."""
        self.results["decode"] = self.profile("decode", [max(WORKERS)])
        here = Path(__file__).parent
        self.figures("decode-torchvision", [sys.executable, here / "pytorch_decode.py", *self.shards()])

    def views(self):
        """The kernels alone; the bench prints its table."""
        out = self.run("views", [self.bundle / "bench" / "device_views", "--bench"])
        self.results["views"] = (out or "").strip().splitlines()

    def loader(self):
        """From page cache to tensors that the network reads."""
        self.results["loader"] = self.profile("detco", WORKERS)

    def profile(self, mode, workers):
        """Images a second of `detco profile`, by decoder and workers."""
        detco, rates = self.bundle / "bin" / "detco", {}
        for decode in ("nvjpeg", "cpu"):
            for count in workers:
                name = f"{mode}-{decode}-{count}"
                report = self.folder / f"{name}.json"
                command = [detco, "profile", self.bundle / "shards", "--mode", mode, "--decode", decode]
                command += ["--workers", count, "--seconds", 6, "--json", report]
                if self.run(name, command, 60) is not None:
                    rates[f"{decode}-{count}"] = json.loads(report.read_text())["runs"][0]["images_per_s"]
        return rates

    def step(self):
        """PyTorch's update from batches in memory; ours, from shards, is in `train`."""
        here = Path(__file__).parent
        for recipe in RECIPES:
            for splits in (8, 1):
                for mode in ("eager", "compile"):
                    reference = [sys.executable, here / "pytorch_step.py", self.bundle / "reference"]
                    reference += ["--recipe", recipe, "--batch", BATCH, "--bn-splits", splits]
                    self.figures(f"pytorch-{mode}-{recipe}-{splits}", [*reference, "--mode", mode], 240)

    def train(self):
        """Updates from shards: what share of the time waits for data."""
        for recipe in RECIPES:
            run = self.work / f"run-{recipe}"
            command = [self.bundle / "bin" / "detco", "train", recipe, "--out", run]
            command += ["--data", self.bundle / "shards"]
            for setting in ("train.steps_max=60", "train.epochs=1000", "monitor.every_steps=10"):
                command += ["--set", setting]
            command += ["--set", f"train.batch={BATCH}", "--set", "checkpoint.every_epochs=0"]
            if self.run(f"train-{recipe}", command, 120) is None:
                continue
            lines = (run / "metrics.jsonl").read_text().splitlines()
            records = [json.loads(line) for line in lines][2:]  # cuDNN still tries kernels before
            if records:
                self.results[f"train-{recipe}"] = {
                    "images_per_s": statistics.median(r["images_per_second"] for r in records),
                    "wait_share": statistics.median(r["wait_share"] for r in records),
                    "loss": records[-1]["loss"],
                }

    # What it comes to.

    def table(self):
        results = self.results
        rows = [("device", results.get("device", "?")), ("torch", results.get("torch", "?"))]
        for name, count in (results.get("tests") or {}).items():
            rows.append((f"test {name}", "no result" if count is None else "{} passed, {} failed".format(*count)))
        for name in ("decode", "loader"):
            for key, rate in (results.get(name) or {}).items():
                rows.append((f"{name} {key} workers", f"{rate:,.0f} images/s"))
        torchvision = results.get("decode-torchvision")
        if torchvision:
            rows.append(("decode torchvision on the GPU", f"{torchvision['median_per_s']:,.0f} images/s"))
        rows += [("views", line) for line in results.get("views") or [] if line]
        for recipe in RECIPES:
            trained = results.get(f"train-{recipe}")
            for splits in (8, 1):
                for mode in ("eager", "compile"):
                    theirs = results.get(f"pytorch-{mode}-{recipe}-{splits}")
                    if theirs:
                        rows.append((f"PyTorch {mode} {recipe}, {splits} BN groups", step_row(theirs)))
            if trained:
                rows.append(
                    (
                        f"train {recipe} from shards",
                        f"{trained['images_per_s']:,.0f} images/s, waiting {trained['wait_share']:.1%}",
                    )
                )
        lines = ["| what | result |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]
        lines += ["", *(f"FAILED {name}: {why}" for name, why in self.failures)]
        return "\n".join(lines) + "\n"


def step_row(figures):
    peak = figures.get("peak_bytes")
    memory = f", {peak / 2**30:.1f} GiB" if peak else ""
    return f"{figures['median_ms']:.1f} ms{memory}"


def environment(bundle, images):
    """Where the binaries find libtorch (that of this Python), CUDA's libraries and nvJPEG."""
    import torch

    lib = Path(torch.__file__).parent / "lib"
    folders = [bundle / "lib", lib, *sorted(lib.parent.parent.glob("nvidia/*/lib"))]
    paths = ":".join(map(str, folders))
    inherited = os.environ.get("LD_LIBRARY_PATH")
    return os.environ | {
        "LD_LIBRARY_PATH": f"{paths}:{inherited}" if inherited else paths,
        "LIBTORCH": str(lib.parent),
        "DETCO_TEST_IMAGES": str(images),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("results", type=Path)
    parts = ("tests", "decode", "views", "loader", "train", "step")
    parser.add_argument("--only", default=",".join(parts), help=f"of {', '.join(parts)}")
    parser.add_argument("--budget", type=float, default=460, help="seconds for everything")
    args = parser.parse_args()
    wanted = args.only.split(",")
    unknown = [name for name in wanted if name not in parts]
    if unknown:
        parser.error(f"--only {unknown[0]}: there are {', '.join(parts)}")
    args.results.mkdir(parents=True, exist_ok=True)

    check = Check(args.bundle.resolve(), args.results.resolve(), args.budget)
    import torch

    check.results["torch"] = torch.__version__
    if not torch.cuda.is_available():
        sys.exit("torch finds no GPU here: there is nothing to check")
    device = torch.cuda.get_device_properties(0)
    check.results["device"] = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {os.cpu_count()} cores"
    for name in parts:
        if name in wanted:
            try:
                getattr(check, name)()
            except Exception as error:  # one part that fails leaves the others their turn
                check.fail(name, repr(error))
            results = check.results | {"failures": check.failures}
            (check.folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    table = check.table()
    (check.folder / "table.md").write_text(table)
    print(table)
    sys.exit(1 if check.failures else 0)


if __name__ == "__main__":
    main()
