"""Tensors over standard input and output, so that none of them needs room on a disk.

A tensor is a line of JSON, `{"name": ..., "dtype": "float32", "shape": [...]}`, and its bytes in native
order; an empty line ends a group of them.
"""

import json
import sys

import torch


def receive():
    """The next group: names to tensors."""
    tensors = {}
    while (line := sys.stdin.buffer.readline()) != b"\n":
        head = json.loads(line)
        dtype = getattr(torch, head["dtype"])
        size = torch.Size(head["shape"]).numel() * dtype.itemsize
        data = bytearray(sys.stdin.buffer.read(size))
        tensors[head["name"]] = torch.frombuffer(data, dtype=dtype).reshape(head["shape"])
    return tensors


def send(tensors):
    """Sends a group; the pipe holds it back until the other side reads."""
    out = sys.stdout.buffer
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        head = {"name": name, "dtype": dtype, "shape": list(tensor.shape)}
        out.write(json.dumps(head).encode() + b"\n")
        out.write(tensor.detach().contiguous().numpy().tobytes())
    out.write(b"\n")
    out.flush()
