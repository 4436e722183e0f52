"""The same model and loss in PyTorch: milliseconds of an update on a GPU, printed as one line of JSON.

    python3 pytorch_step.py REFERENCE --recipe detco-r50 --batch 256 --mode eager|compile [--bn-splits 8]

REFERENCE is the folder of detco_reference.py. The network is the one that the trainer's numerics are
tested against; here it runs as a careful user of PyTorch would run it: bf16 autocast, channels-last,
TF32, cuDNN's benchmark mode, fused SGD, a key encoder that follows with one foreach call, queues that are
not copied. Batches lie in the GPU's memory, as float32 (ours: bfloat16, 0.3 ms less for 256 samples by their
bytes). Logits are products of bfloat16, ours of TF32. With `compile` both encoders and the loss are compiled.

`window_ms` is the median of so many windows of four updates, in milliseconds an update, as a loop runs that
waits for none of them; `median_ms` that of updates that are waited for one by one.
"""

import argparse
import json
import statistics
import sys
import time

import torch
import torch._dynamo.utils

CASES = {
    "detco-r50": dict(levels=[2, 3, 4, 5], level_weights=[0.1, 0.4, 0.7, 1.0], local=True),
    "moco-v2-r50": dict(levels=[5], level_weights=[1.0], local=False),
}
COMMON = dict(
    backbone="resnet50", head="mlp", local_head="9c-c", dim=128, ema=0.999, temperature=0.2, queue=65536
)

WINDOW = 4  # updates


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reference")
    parser.add_argument("--recipe", choices=CASES, default="detco-r50")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--bn-splits", type=int, default=8)
    parser.add_argument("--mode", choices=["eager", "compile"], default="eager")
    parser.add_argument("--steps", type=int, default=5, help="updates that are waited for")
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=8)
    parser.add_argument("--backbone", default=COMMON["backbone"])
    parser.add_argument("--precision", choices=["bf16", "f32"], default="bf16")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--queue", type=int, default=COMMON["queue"])
    return parser.parse_args()


def main():
    args = arguments()
    sys.path.insert(0, args.reference)
    import detco_reference as reference

    if args.bn_splits == 1:
        reference.PerDeviceBatchNorm = torch.nn.BatchNorm2d
    else:
        reference.PerDeviceBatchNorm.devices = args.bn_splits
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    device = torch.device(args.device)

    class Foreach(reference.DetCo):
        def follow(self):
            key, query = list(self.key.parameters()), list(self.query.parameters())
            torch._foreach_lerp_(key, query, 1 - self.case["ema"])

        def negatives(self, name):
            return self.queues[name]  # backward comes before it changes

    case = COMMON | CASES[args.recipe] | dict(batch=args.batch, queue=args.queue, backbone=args.backbone)
    state = {f"query.{k}": v for k, v in reference.Encoder(case).state_dict().items()}
    scopes = ["global", "local"] if case["local"] else ["global"]
    for level in case["levels"]:
        for scope in scopes:
            directions = torch.randn(case["dim"], case["queue"])
            state[f"queue.{scope}.{level}"] = torch.nn.functional.normalize(directions, dim=0)
    detco = Foreach(case, state)
    for encoder in (detco.query, detco.key):
        encoder.to(device, memory_format=torch.channels_last)
    detco.queues = {name: queue.to(device) for name, queue in detco.queues.items()}

    size, patch, n = args.size, args.patch, args.batch
    channels_last = dict(memory_format=torch.channels_last)
    crops = [torch.randn(n, 3, size, size, device=device).to(**channels_last) for _ in range(2)]
    patches = None
    if case["local"]:
        flat = [torch.randn(9 * n, 3, patch, patch, device=device).to(**channels_last) for _ in range(2)]
        patches = [p.unflatten(0, (n, 9)) for p in flat]
    shuffle = torch.randperm(n, device=device)
    fused = device.type == "cuda"
    sgd = torch.optim.SGD(
        detco.query.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4, fused=fused, foreach=not fused
    )
    weights = dict(zip(case["levels"], case["level_weights"]))

    def loss_of(crops, patches, shuffle):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.precision == "bf16"):
            terms, _ = detco.losses(crops, patches, shuffle)
        return sum(weights[int(name[0])] * term.float() for name, term in terms.items())

    if args.mode == "compile":
        for encoder in (detco.query, detco.key):
            encoder.crops = torch.compile(encoder.crops, backend=args.backend)
            encoder.patches = torch.compile(encoder.patches, backend=args.backend)
        contrast = torch.compile(lambda *embeddings: Foreach.contrast(detco, *embeddings)[0], backend=args.backend)
        detco.contrast = lambda *embeddings: (contrast(*embeddings), {})

    def step():
        loss = loss_of(crops, patches, shuffle)
        sgd.zero_grad(set_to_none=True)
        loss.backward()
        sgd.step()
        with torch.no_grad():
            detco.enqueue()
        return loss

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    started = time.perf_counter()
    for _ in range(args.warm_up):
        loss = step()
    wait()
    warm_up = time.perf_counter() - started
    windows, times = [], []
    for _ in range(args.windows):
        start = time.perf_counter()
        for _ in range(WINDOW):
            loss = step()
        wait()
        windows.append((time.perf_counter() - start) * 1e3 / WINDOW)
    for _ in range(args.steps):
        start = time.perf_counter()
        loss = step()
        wait()
        times.append((time.perf_counter() - start) * 1e3)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    print(
        json.dumps(
            dict(
                recipe=args.recipe,
                mode=args.mode,
                batch=n,
                bn_splits=args.bn_splits,
                window_ms=statistics.median(windows),
                windows_ms=windows,
                median_ms=statistics.median(times),
                warm_up_s=warm_up,
                peak_bytes=memory,
                graph_breaks=sum(torch._dynamo.utils.counters["graph_break"].values()),
                loss=loss.item(),
                torch=torch.__version__,
            )
        )
    )


if __name__ == "__main__":
    main()
