"""What only a GPU can show: runs the GPU tests, then measures, and prints one table.

    python3 check.py BUNDLE RESULTS [--only PART,...] [--budget SECONDS] [--earlier results.json]
    python3 check.py BUNDLE RESULTS --only cifar --cifar SHARDS --runs RUNS [--recipe moco-v2-cifar]

BUNDLE is the folder that `cargo xtask gpu-check BUNDLE --images IMAGES` made on the machine that builds
(binaries, tests, benches, libnvjpeg, shards), or a tar of it. This machine needs a GPU with its driver and
a Python with torch 2.11 and torchvision, whose libtorch the binaries use; no Rust, no network. RESULTS gets
`results.json` and `table.md`, renewed after each part, and `log.txt` with what every command said.

A call measures what matters most first: each part's first figure, then their second ones, and so on until its
seconds are over. What it had no time for is named; a call with the `results.json` before as `--earlier` goes on
with that, so that the table holds one part's figures against another's. Parts, in their order:

  tests       the tests that use a GPU
  decode      nvJPEG in the loader (hardware, hybrid, both), called alone, under torchvision; the CPU
  views       the view kernels beside a copy
  loader      page cache to batch with 4, 8 and 16 cores
  step        our updates from memory
  train       our updates from shards: the share of the time that waits for data
  eager       the same model and loss in PyTorch, channels-last, bf16
  compile     under torch.compile
  sanitize    not among the default: the tests of the kernels under CUDA's compute-sanitizer
  cifar       not among the default: trains a CIFAR-10 recipe for --seconds, from where the run in RUNS
              stands; SHARDS has the folders train and test. Call it again for the next piece.

Figures are medians of at least five windows or steps, with the page cache warm. What fails is named in the
table with the end of its log, and the exit code is 1. `--device cpu --smoke` runs all parts on small sizes
without a GPU: it shows that the script works, and its figures mean nothing.
"""

import argparse
import ctypes
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

RECIPES = ("detco-r50", "moco-v2-r50")
ONE_GROUP = "detco-r50-one-group"  # the first without groups in batch normalisation: as users of PyTorch have it
DEFAULT = ("tests", "decode", "views", "loader", "step", "train", "eager", "compile")
PARTS = (*DEFAULT, "sanitize", "cifar")
# Of each binary of tests those that use a GPU: names, or parts of them. The others run where it was built.
TESTS = {
    "detco_shards": ["cuda", "gpu", "--skip", "each_generation", "--skip", "on_the_host"],
    "nvjpeg": ["a_gpu", "a_trainer"],
    "norm": ["a_gpu"],
    "gpu": [],
}
# Those that compute-sanitizer watches: what they launch is ours. It knows accesses beyond the end and of other
# alignment, and threads that race for a block's memory.
WATCHED = {"detco_shards": ["views::cuda::tests::a_device", "views::cuda::tests::frames"], "norm": ["a_gpu"]}
CORES = (4, 8, 16)
NVCUVID = "libnvcuvid.so.1"  # of the driver: nvJPEG's hardware engine is reached through it
COPIES = 8  # of the bundle's images, so that an epoch has several batches of 256


class Sizes:
    """How much of everything: for a GPU, or to see that nothing is broken."""

    def __init__(self, smoke):
        self.cores = CORES if not smoke else (1, 2)
        self.copies = COPIES if not smoke else 1
        self.batch = 256 if not smoke else 8
        self.seconds = 4 if not smoke else 1
        self.steps = 40 if not smoke else 6
        self.every = 5 if not smoke else 1
        self.decode_batch = 64 if not smoke else 16
        self.patience = 1 if not smoke else 4  # of limits: a machine without a GPU is slow
        self.bench = [] if not smoke else ["--warm-up", 1, "--windows", 1, "--steps", 2]
        small = ["model.backbone=resnet18", "method.queue=64", "views.crops.size=32", "views.patches.grid.patch=16"]
        small += ["model.width=8", "model.bn_splits=2"]
        self.sets = [word for one in small for word in ("--set", one)] if smoke else []
        self.torch = []
        if smoke:
            self.torch = "--backbone resnet18 --queue 64 --size 32 --patch 16 --warm-up 1 --steps 1".split()
            self.torch += "--windows 1 --backend eager --bn-splits 2 --precision f32".split()
        self.cifar = []
        if smoke:
            self.cifar = ["train.batch=16", "optim.lr_batch=16", "method.queue=64", "train.epochs=2"]
            self.cifar += ["model.width=8", "monitor.every_steps=2"]


class Check:
    def __init__(self, args):
        self.args, self.sizes, self.device = args, Sizes(args.smoke), args.device
        self.bundle, self.folder = args.bundle.resolve(), args.results.resolve()
        self.results, self.failures, self.left_out = {}, [], []
        if args.earlier:
            self.results = json.loads(args.earlier.read_text())
            for old in ("failures", "left_out"):
                self.results.pop(old, None)
        self.log = self.folder / "log.txt"
        self.log.write_text("")
        self.deadline = time.monotonic() + args.budget
        self.work = Path(tempfile.mkdtemp(prefix="detco-gpu-check-"))
        if self.bundle.is_file():
            with tarfile.open(self.bundle) as archive:
                archive.extractall(self.work / "bundle", filter="tar")
            self.bundle = self.work / "bundle"
        self.images = self.unpack()
        self.environment = environment(self.bundle, self.images)
        if args.smoke:
            self.environment["OMP_NUM_THREADS"] = "1"
        self.packed = None

    def run(self, name, command, limit=120, cores=None, codes=(0,)):
        """Runs a command, logs what it says, returns its output; None if it failed or has no time left."""
        self.said = ""
        left = self.deadline - time.monotonic()
        if left < 5:
            self.left_out.append(name)
            return None
        start = time.monotonic()
        command = [str(part) for part in command]
        with subprocess.Popen(
            command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores else None,
            start_new_session=True,
        ) as process:
            try:
                out, err = process.communicate(timeout=min(limit * self.sizes.patience, left))
                code = process.returncode
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # `detco train` is two processes
                try:
                    out, err = process.communicate(timeout=10)
                except subprocess.TimeoutExpired:
                    out, err = "", "the driver does not let it die"
                    process.stdout.close()
                    process.stderr.close()
                code = "timeout"
        self.said = f"{out}\n--- stderr\n{err}"
        with self.log.open("a") as log:
            log.write(f"\n===== {name}\n$ {' '.join(command)}\n{self.said}\n--- exit {code}\n")
        print(f"{time.monotonic() - start:6.1f} s  {name}: exit {code}", flush=True)
        if code == "timeout" and left <= limit * self.sizes.patience:
            self.left_out.append(name)
            return None
        if code not in codes:
            self.fail(name, f"exit {code}: " + (err or out).strip()[-400:])
            return None
        return out

    def fail(self, name, why):
        self.failures.append((name, why))

    def figures(self, name, command, limit=120, cores=None):
        """A command whose last line of output is JSON; not again what an earlier call has measured."""
        if name in self.results:
            return self.results[name]
        out = self.run(name, command, limit, cores)
        if out is None:
            return None
        try:
            self.results[name] = json.loads(out.strip().splitlines()[-1])
        except (ValueError, IndexError):
            self.fail(name, f"no JSON in its last line: {out[-200:]!r}")
            return None
        return self.results[name]

    def unpack(self):
        """The shards' images as files: for tests, and to pack more of them."""
        folder = self.work / "images"
        folder.mkdir()
        for shard in self.shards():
            with tarfile.open(shard) as archive:
                for member in archive:
                    if member.name.endswith(".jpg"):
                        file = folder / Path(member.name).name
                        file.write_bytes(archive.extractfile(member).read())
        return folder

    def shards(self):
        return sorted((self.bundle / "shards").glob("*.tar"))

    def data(self):
        """Shards with the bundle's images several times over; packed when they are first asked for."""
        if self.packed is None:
            links = Path(tempfile.mkdtemp(prefix="links-", dir=self.work))
            for copy in range(self.sizes.copies):
                for image in self.images.iterdir():
                    os.link(image, links / f"{copy}-{image.name}")
            packed = links.with_name(links.name.replace("links", "data"))
            if self.run("pack", [self.bundle / "bin" / "detco", "pack", links, packed]) is None:
                raise RuntimeError("nothing to measure with")
            self.packed = packed
        return self.packed

    def labelled(self):
        """The bundle's images as two classes that mean nothing, packed in the place of CIFAR-10."""
        folder = self.work / "classes"
        for number, image in enumerate(sorted(self.images.iterdir())):
            place = folder / "ab"[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            os.link(image, place / image.name)
        for name in ("train", "test"):
            self.run(f"pack-{name}", [self.bundle / "bin" / "detco", "pack", folder, self.work / "cifar" / name])
        return self.work / "cifar"

    def cores(self, count):
        """So many of this machine's cores; None where it has fewer."""
        all_cores = sorted(os.sched_getaffinity(0))
        return set(all_cores[:count]) if len(all_cores) >= count else None

    # The parts, in the order in which they run. Each goes on after a `yield` when all have had their turn.

    def tests(self):
        """The tests that use a GPU where there is one."""
        counts = self.results.setdefault("tests", {})
        # cuBLAS reads it at its first product, which an earlier test of the same process may make.
        self.environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        for name, which in TESTS.items():
            if counts.get(name) and counts[name][1] == 0:
                continue  # an earlier call's; what failed there is tried again
            self.run(f"test-{name}", [self.bundle / "tests" / name, *which, "--include-ignored", "--test-threads", 1, "--nocapture"], 100)
            found = re.findall(r"(\d+) passed; (\d+) failed", self.said)
            counts[name] = [int(n) for n in found[-1]] if found else None
            if found and counts[name] == [0, 0]:
                self.fail(f"test-{name}", "no test of that name")
            # nvJPEG's pixels beside the CPU's, on the bundle's images among others.
            difference = re.findall(r"share [\d.]+, engines .*?: mean [\d.]+, largest \d+", self.said)
            if difference:
                self.results["difference"] = difference
        del self.environment["CUBLAS_WORKSPACE_CONFIG"]
        yield

    def decode(self):
        """Decoding alone: nvJPEG in the loader and by itself, torchvision's way to it, the CPU."""
        most, seconds = max(self.sizes.cores), self.sizes.seconds
        bench = [self.bundle / "bench" / "device_decode", "--data", self.data(), "--device", self.device]
        self.figures("decode", [*bench, "--workers", most, "--batch", self.sizes.decode_batch, "--seconds", seconds])
        alone = [sys.executable, self.bundle / "nvjpeg_alone.py", *self.shards(), "--threads", most]
        found = self.figures("decode-alone", [*alone, "--seconds", seconds])
        yield
        other = libnvjpeg_of_torchvision()
        if found and "error" in found["hardware"] and self.results[NVCUVID] == "found" and other:
            # The engine's library may want an older nvJPEG than ours.
            self.figures("decode-alone-other", [*alone, "--seconds", seconds, "--library", other])
        torchvision = [sys.executable, self.bundle / "pytorch_decode.py", *self.shards(), "--device", self.device]
        self.figures("decode-torchvision", torchvision)
        self.profile("decode-cpu", "decode", "cpu", most)
        yield

    def views(self):
        """The kernels alone; the bench prints its table."""
        if not self.results.get("views"):
            out = self.run("views", [self.bundle / "bench" / "device_views", "--bench"])
            self.results["views"] = (out or "").strip().splitlines()
        yield

    def loader(self):
        """From page cache to tensors that the network reads."""
        decoders = ["nvjpeg"] if self.device == "cuda" else []
        for count in sorted(self.sizes.cores, reverse=True):
            for decode in [*decoders, "cpu"]:
                self.profile(f"loader-{decode}-{count}", "detco", decode, count)
            yield

    def profile(self, name, mode, decode, cores):
        """Images a second of `detco profile` on so many cores, with a worker each."""
        if name in self.results:
            return
        allowed = self.cores(cores)
        if allowed is None:
            self.fail(name, f"this machine has fewer than {cores} cores")
            return
        report = self.work / f"{name}.json"
        command = [self.bundle / "bin" / "detco", "profile", self.data(), "--mode", mode, "--decode", decode]
        command += ["--workers", cores, "--seconds", self.sizes.seconds, "--warm-up", 2, "--json", report]
        if self.run(name, command, 60, allowed) is not None:
            self.results[name] = json.loads(report.read_text())["runs"][0]["images_per_s"]

    def step(self):
        """Our updates from memory, and what our kernels for batch normalisation are worth."""
        detco, moco = RECIPES
        self.step_of(f"step-{detco}-kernels", detco, "kernels")
        yield
        self.step_of(f"step-{ONE_GROUP}", detco, "kernels", ["--set", "model.bn_splits=1"])
        yield
        self.step_of(f"step-{moco}-kernels", moco, "kernels")
        yield
        self.step_of(f"step-{detco}-libtorch", detco, "libtorch")
        yield

    def step_of(self, name, recipe, norms, settings=()):
        command = [self.bundle / "bench" / "step", "--recipe", recipe, "--device", self.device]
        command += ["--norms", norms, "--set", f"train.batch={self.sizes.batch}"]
        self.figures(name, [*command, *self.sizes.sets, *self.sizes.bench, *settings], 120)

    def train(self):
        """Updates from shards: what share of the time waits for data."""
        for recipe in RECIPES:
            if f"train-{recipe}" in self.results:
                continue
            run = self.work / f"run-{recipe}"
            command = [self.bundle / "bin" / "detco", "train", recipe, "--out", run, "--data", self.data()]
            settings = [f"train.steps_max={self.sizes.steps}", "train.epochs=1000", f"train.device={self.device}"]
            settings += [f"monitor.every_steps={self.sizes.every}", f"train.batch={self.sizes.batch}"]
            settings += ["checkpoint.every_epochs=0"]
            command += [word for setting in settings for word in ("--set", setting)]
            if self.run(f"train-{recipe}", [*command, *self.sizes.sets], 120) is None:
                yield
                continue
            lines = (run / "metrics.jsonl").read_text().splitlines()
            records = [json.loads(line) for line in lines]
            records = [record for record in records if "images_per_second" in record]
            records = records[min(2, len(records) // 3) :]  # cuDNN still tries kernels before
            middle = lambda name: statistics.median(record[name] for record in records)  # noqa: E731
            self.results[f"train-{recipe}"] = {
                "images_per_s": middle("images_per_second"),
                "wait_share": middle("wait_share"),
                "windows": len(records),
                "loss": records[-1]["loss"],
            }
            yield

    def eager(self):
        detco, moco = RECIPES
        self.pytorch(f"eager-{detco}", detco, "eager", 100)
        yield
        self.pytorch(f"eager-{ONE_GROUP}", detco, "eager", 100, ["--bn-splits", 1])
        yield
        self.pytorch(f"eager-{moco}", moco, "eager", 100)
        yield

    def compile(self):
        """What takes longest, so after everybody's first; groups in batch normalisation make large graphs."""
        detco, moco = RECIPES
        yield
        self.pytorch(f"compile-{ONE_GROUP}", detco, "compile", 300, ["--bn-splits", 1])
        yield
        self.pytorch(f"compile-{moco}", moco, "compile", 200)
        yield
        self.pytorch(f"compile-{detco}", detco, "compile", 300)
        yield

    def sanitize(self):
        """Tests of our kernels under CUDA's own watch; errors are its exit code."""
        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer is None:
            raise RuntimeError("compute-sanitizer is not on the PATH")
        for tool in ("memcheck", "racecheck"):
            for name, which in WATCHED.items():
                command = [sanitizer, "--tool", tool, "--error-exitcode", 9, self.bundle / "tests" / name]
                self.run(f"sanitize-{tool}-{name}", [*command, *which, "--include-ignored", "--test-threads", 1], 150)
                said = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", self.said)
                self.results[f"sanitize-{tool}-{name}"] = said[-1] if said else "no summary"
            yield

    def pytorch(self, name, recipe, mode, limit, settings=()):
        command = [sys.executable, self.bundle / "pytorch_step.py", self.bundle / "reference", "--recipe", recipe]
        command += ["--batch", self.sizes.batch, "--mode", mode, "--device", self.device]
        self.figures(name, [*command, *self.sizes.torch, *settings], limit)

    def cifar(self):
        """A piece of a CIFAR-10 recipe, from where the run stands; the curve of all pieces."""
        data, runs = self.args.cifar, self.args.runs
        if self.args.smoke:
            data, runs = data or self.labelled(), runs or self.work / "runs"
        if data is None or runs is None:
            raise RuntimeError("--cifar and --runs are needed")
        recipe, data = self.args.recipe, data.resolve()
        run = runs.resolve() / recipe
        command = [self.bundle / "bin" / "detco", "train", recipe, "--out", run, "--or-resume"]
        command += ["--data", data / "train"]
        settings = [f"train.device={self.device}", "monitor.knn_every_epochs=10", "checkpoint.every_epochs=5"]
        settings += [f"monitor.knn_test={json.dumps([str(data / 'test')])}", *self.sizes.cifar]
        for setting in settings + self.args.set:
            command += ["--set", setting]
        # timeout asks with SIGTERM: a checkpoint is written, and the exit code is 75.
        ask = ["timeout", "--preserve-status", "--kill-after=60", f"{self.args.seconds}", *command]
        if self.run(f"cifar-{recipe}", ask, self.args.seconds + 90, codes=(0, 75)) is None:
            yield
            return
        lines = (run / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        curve = [[r["epoch"], r["knn/top1"]] for r in records if "knn/top1" in r]
        rates = [r["images_per_second"] for r in records if "images_per_second" in r]
        self.results[f"cifar-{recipe}"] = {
            "knn_top1": curve,
            "steps": records[-1]["step"],
            "epoch": records[-1]["epoch"],
            "images_per_s": statistics.median(rates[len(rates) // 2 :]) if rates else None,
        }
        (self.folder / f"cifar-{recipe}-metrics.jsonl").write_text("\n".join(lines) + "\n")
        yield

    # What it comes to.

    def write(self):
        results = self.results | {"failures": self.failures, "left_out": self.left_out}
        (self.folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        try:
            text = self.table()
        except Exception as error:  # the figures are in results.json all the same
            text = f"no table: {error!r}\n"
        (self.folder / "table.md").write_text(text)
        return text

    def table(self):
        results = self.results
        rows = [(name, results.get(name, "?")) for name in ("device", "torch", NVCUVID)]
        for name, count in (results.get("tests") or {}).items():
            rows.append((f"test {name}", "no result" if count is None else "{} passed, {} failed".format(*count)))
        rows += [("nvJPEG beside the CPU", line) for line in results.get("difference") or []]
        rows += self.decode_rows() + [("views", line) for line in results.get("views") or []]
        loaders = sorted(name for name in results if name.startswith("loader-"))
        rows += [(f"{name.replace('-', ', ')} cores", per_second(results[name])) for name in loaders]
        rows += self.step_rows() + self.aims()
        for name, found in results.items():
            if name.startswith("cifar-"):
                curve = ", ".join(f"{epoch}: {top1:.2f} %" for epoch, top1 in found["knn_top1"])
                rows.append((name, f"epoch {found['epoch']}, {per_second(found['images_per_s'])}; kNN {curve}"))
        rows += [(name, found) for name, found in results.items() if name.startswith("sanitize-")]
        rows += [(f"FAILED {name}", why.replace("\n", " ")[-300:]) for name, why in self.failures]
        if self.left_out:
            rows.append(("not measured, for want of time", ", ".join(self.left_out)))
        rows = [(left, str(right).replace("|", "/")) for left, right in rows]
        width = max(len(left) for left, _ in rows)
        lines = [f"| {'what':<{width}} | found |", f"|{'-' * (width + 2)}|---|"]
        return "\n".join(lines + [f"| {left:<{width}} | {right} |" for left, right in rows]) + "\n"

    def decode_rows(self):
        results, rows = self.results, []
        parts = {"decode": "nvJPEG in the loader", "decode-alone": "nvJPEG alone"}
        parts["decode-alone-other"] = "torchvision's nvJPEG alone"
        for part, of in parts.items():
            for name in ("hardware", "hybrid", "both", "hardware-pinned", "gpu-batched"):
                found = results.get(part, {}).get(name)
                if found:
                    text = found["error"] if "error" in found else per_second(found["images_per_s"])
                    share = (found.get("counts") or {}).get("share")
                    text += f", share of the hardware engine {share:.2f}" if share is not None else ""
                    text += f"; first refused with: {found['refusal']}" if found.get("refusal") else ""
                    rows.append((f"decode, {of}, {name}", text))
        if "decode-torchvision" in results:
            found = results["decode-torchvision"]
            rows.append(("decode, torchvision", f"{per_second(found['median_per_s'])}, {found['refused']} refused"))
        if "decode-cpu" in results:
            rows.append(("decode, CPU", per_second(results["decode-cpu"])))
        return rows

    def step_rows(self):
        rows = []
        for name, found in self.results.items():
            if name.split("-")[0] in ("step", "eager", "compile") and found:
                rate = per_second(found["batch"] / found["window_ms"] * 1e3)
                text = f"{found['window_ms']:.1f} ms, {rate}; waited for {found['median_ms']:.1f} ms"
                peak = found.get("peak_bytes")
                text += f"; {peak / 2**30:.1f} GiB" if peak else ""
                breaks = found.get("graph_breaks")
                text += f"; {breaks} breaks of the graph" if breaks else ""
                rows.append((f"{name}, BN groups {found['bn_splits']}", text))
            elif name.startswith("train-"):
                rows.append((name, f"{per_second(found['images_per_s'])}; waiting {found['wait_share']:.2%}"))
        return rows

    def aims(self):
        """Each aim with its figure; what was not measured is left out."""
        results, rows, smoke = self.results, [], self.args.smoke

        def aim(what, found, least):
            if found is not None:
                verdict = "met" if found >= least else f"missed by {1 - found / least:.0%}"
                verdict = "means nothing" if smoke else verdict
                rows.append((f"aim: {what}", f"{found:.2f} of at least {least}: {verdict}"))

        def ratio(above, below):
            return above / below if above and below else None

        def of(part, *path):
            found = results.get(part)
            for name in path:
                found = found.get(name) if isinstance(found, dict) else None
            return found

        for recipe in (*RECIPES, ONE_GROUP):
            ours = of(f"step-{recipe}-kernels" if recipe in RECIPES else f"step-{recipe}", "window_ms")
            aim(f"{recipe} over PyTorch eager", ratio(of(f"eager-{recipe}", "window_ms"), ours), 1.15)
            aim(f"{recipe} over torch.compile", ratio(of(f"compile-{recipe}", "window_ms"), ours), 1.0)
            waits = of(f"train-{recipe}", "wait_share")
            if waits is not None:
                verdict = "means nothing" if smoke else "met" if waits < 0.01 else "missed"
                rows.append((f"aim: {recipe} waits below 1 %", f"{waits:.2%}: {verdict}"))
        ours = of("step-detco-r50-kernels", "window_ms")
        most = max(self.sizes.cores)
        loader = of(f"loader-nvjpeg-{most}") or of(f"loader-cpu-{most}")
        step = results["step-detco-r50-kernels"]["batch"] / ours * 1e3 if ours else None
        aim("loader over the step of detco-r50", ratio(loader, step), 2.0)
        for engine in ("hardware", "hybrid"):
            alone = of("decode-alone", engine, "images_per_s")
            aim(f"nvJPEG, {engine}, over the library alone", ratio(of("decode", engine, "images_per_s"), alone), 0.9)
        shares = [re.search(r"^(\S+): .* (\d+) % of a copy's", line) for line in results.get("views") or []]
        for share in filter(None, shares):
            aim(f"views of {share[1]} over copy bandwidth", int(share[2]) / 100, 0.5)
        return rows


def per_second(rate):
    return "no result" if rate is None else f"{rate:,.0f} images/s"


def loads(library):
    """Whether the system's loader finds a library, in words."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return "found"


def libnvjpeg_of_torchvision():
    """The library that torchvision's wheel brings; None if it brings none."""
    import torchvision

    folder = Path(torchvision.__file__).parent.with_name("torchvision.libs")
    return next(iter(sorted(folder.glob("libnvjpeg*.so*"))), None)


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


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--only", default=",".join(DEFAULT), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--budget", type=float, default=470, help="seconds for everything")
    parser.add_argument("--earlier", type=Path, metavar="JSON", help="results of a call before, to go on from")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--smoke", action="store_true", help="small sizes: figures mean nothing")
    parser.add_argument("--cifar", type=Path, metavar="SHARDS", help="CIFAR-10, packed: train and test")
    parser.add_argument("--runs", type=Path, help="folder of the runs of cifar, kept between pieces")
    parser.add_argument("--recipe", default="moco-v2-cifar", help="of cifar: or detco-cifar")
    parser.add_argument("--seconds", type=float, default=400, help="of a piece of cifar")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of cifar")
    args = parser.parse_args()
    args.only = args.only.split(",")
    for name in args.only:
        if name not in PARTS:
            parser.error(f"--only {name}: there are {', '.join(PARTS)}")
    return args


def main():
    args = arguments()
    args.results.mkdir(parents=True, exist_ok=True)
    import torch

    if args.device == "cuda":
        if not torch.cuda.is_available():
            sys.exit("torch finds no GPU here: there is nothing to check")
        device = torch.cuda.get_device_properties(0)
        device = f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
    else:
        device = "the CPU, small sizes: no measurement"
    check = Check(args)
    check.results["device"] = f"{device}, {len(os.sched_getaffinity(0))} cores"
    check.results["torch"] = torch.__version__
    check.results[NVCUVID] = loads(NVCUVID)
    start = time.monotonic()
    parts = [(name, getattr(check, name)()) for name in PARTS if name in args.only]
    while parts:
        for name, part in list(parts):
            try:
                next(part)
            except StopIteration:
                parts.remove((name, part))
            except Exception as error:  # one part that fails leaves the others their turn
                check.fail(name, repr(error))
                parts.remove((name, part))
            check.results["seconds"] = round(time.monotonic() - start, 1)
            check.write()
    print(check.write())
    sys.exit(1 if check.failures else 0)


if __name__ == "__main__":
    main()
