"""Trains the detector of a config with torchvision and measures COCO's average precision at the end.

    torchrun --nproc_per_node 8 train.py table2-mask-rcnn-r50-fpn-12k.json --data coco --out runs/a
    torchrun --nproc_per_node 8 train.py ... --resume
    torchrun --nproc_per_node 8 train.py ... --weights ''        random weights

`coco` holds train2017, val2017 and annotations. Without torchrun it trains in one process.
"""

import argparse
import bisect
import json
import os
import random

import torch
import torch.distributed as dist
from torch import nn

from check import check
from data import Coco, average_precision, results
from detector import HERE, WEIGHTS, detector, read_config


def optimizer_of(model, config):
    """SGD without weight decay of norms."""
    norms, others = [], []
    for module in model.modules():
        is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        (norms if is_norm else others).extend(module.parameters(recurse=False))
    groups = [{"params": others, "weight_decay": config["weight_decay"]}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, config["lr"], config["momentum"])


def rate(config, step):
    """The learning rate of a step: up in a line at first, then a tenth after each milestone."""
    warm = min(step / config["warmup"], 1.0)
    factor = config["warmup_factor"] * (1 - warm) + warm
    return config["lr"] * factor * 0.1 ** bisect.bisect_right(config["steps"], step)


def indices(count, first):
    """Numbers below `count` without end, a shuffled epoch after another, from the place `first` on."""
    epoch, at = divmod(first, count)
    while True:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch)).tolist()
        yield from order[at:]
        epoch, at = epoch + 1, 0


def shares(every, batch, rank, world):
    """This process' share of each batch."""
    while True:
        numbers = [next(every) for _ in range(batch)]
        yield numbers[rank::world]


def collate(samples):
    return tuple(zip(*samples))


def to_device(images, targets, device):
    images = [image.to(device) for image in images]
    return images, [{key: value.to(device) for key, value in target.items()} for target in targets]


def precise_norms(model, loader, count, device):
    """Running statistics anew, as the average over `count` batches with the weights as they are."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        for _, (images, targets) in zip(range(count), loader):
            model(*to_device(images, targets, device))


def evaluate(model, data, config, rank, world, device):
    """COCO's numbers; each process takes its share of the images."""
    categories = {label: category for category, label in data.labels.items()}
    found = []
    model.eval()
    with torch.no_grad():
        for index in range(rank, len(data), world):
            image, image_id = data[index]
            [output] = model([image.to(device)])
            found += results(image_id, output, categories)
    of_all = [found]
    if world > 1:
        of_all = [None] * world
        dist.all_gather_object(of_all, found)
    return average_precision(data.coco, sum(of_all, []), config["detector"]) if rank == 0 else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--data", required=True, help="folder of COCO")
    parser.add_argument("--out", required=True, help="folder for checkpoints and results")
    parser.add_argument("--weights", default=WEIGHTS, help="another file of torchvision's names; '' for random weights")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="another value of the config")
    args = parser.parse_args()
    config = read_config(args.config)
    for key, value in (one.split("=", 1) for one in args.set):
        if key not in config:
            raise SystemExit(f"--set {key}: the config has no such key")
        config[key] = json.loads(value)
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if config["batch"] % world:
        raise SystemExit(f"a batch of {config['batch']} cannot be shared by {world} processes")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    random.seed(rank)
    torch.manual_seed(0)

    # On CPUs there is no synchronised norm: each process then has the statistics of its own images.
    norm = nn.SyncBatchNorm if world > 1 and device.type == "cuda" else nn.BatchNorm2d
    model = detector(config, args.weights, norm).to(device)
    optimizer = optimizer_of(model, config)
    checkpoint, first = os.path.join(args.out, "checkpoint.pth"), 0
    os.makedirs(args.out, exist_ok=True)
    if args.resume:
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    elif args.weights == WEIGHTS:
        check(model)
    if rank == 0:
        images = config["batch"] if norm is nn.SyncBatchNorm else config["batch"] // world
        print(f"batch normalisation sees {images} images a step; the tables have 16")

    def open_set(name):
        at = config[name]
        annotations = os.path.join(args.data, at["annotations"])
        if "subset" in at:
            annotations = os.path.join(HERE, at["subset"])
        return Coco(annotations, os.path.join(args.data, at["images"]), config["detector"], name == "train")

    train = open_set("train")
    numbers = shares(indices(len(train), first * config["batch"]), config["batch"], rank, world)
    workers = config["workers"]
    loader = torch.utils.data.DataLoader(train, batch_sampler=numbers, num_workers=workers, collate_fn=collate)
    model.train()
    trained = model
    if world > 1:
        trained = nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    for step, (images, targets) in zip(range(first, config["iterations"]), loader):
        for group in optimizer.param_groups:
            group["lr"] = rate(config, step)
        losses = trained(*to_device(images, targets, device))
        loss = sum(losses.values())
        if not torch.isfinite(loss):
            raise SystemExit(f"step {step}: the loss is {loss.item()}: {losses}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and (step % 20 == 0 or step + 1 == config["iterations"]):
            print(f"step {step + 1} of {config['iterations']}: loss {loss.item():.4f}", flush=True)
        if rank == 0 and ((step + 1) % 5000 == 0 or step + 1 == config["iterations"]):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, checkpoint + ".part")
            os.replace(checkpoint + ".part", checkpoint)
    precise_norms(model, loader, config["precise_bn"], device)
    answer = evaluate(model, open_set("test"), config, rank, world, device)
    if rank == 0:
        with open(os.path.join(args.out, "ap.json"), "w") as file:
            json.dump(answer, file)
        print(answer)


if __name__ == "__main__":
    main()
