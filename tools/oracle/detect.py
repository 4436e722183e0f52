"""The detection probe by PyTorch, torchvision and Pillow.

    python detect.py scenes FOLDER           layouts.json, photos.bin, objects.bin -> scenes.bin
    python detect.py head FILE FILE          tensors of a head and maps -> logits, distances
    python detect.py losses FILE FILE        logits, distances, classes, targets -> losses and gradients
    python detect.py adamw FILE FILE         parameter, gradients -> the parameter after each step
    python detect.py nms FILE FILE           boxes, scores, classes of several cases -> of each the kept positions

FILEs are safetensors: what comes in, what goes out.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from resizing import resize
from safetensors.torch import load_file, save_file


def scene(rules, layout, photos, objects):
    """A layout to pixels [size, size, 3], written from the description alone."""
    size = rules["size"]

    def cut(of, edge):
        photo = photos[of["photo"]]
        part = photo[of["top"] : of["top"] + of["side"], of["left"] : of["left"] + of["side"]]
        return resize(Image.fromarray(np.ascontiguousarray(part)), edge, edge)

    ground = resize(cut(layout["background"], layout["reduced"]), size, size)
    canvas = np.asarray(ground).astype(np.float32)
    for paste in layout["pastes"]:
        (kind, what), = paste["what"].items()
        if kind == "object":
            picture = Image.fromarray(objects[what])
        elif kind == "shuffled":
            number, order = what
            blocks = objects[number].reshape(4, 8, 4, 8, 3).transpose(0, 2, 1, 3, 4).reshape(16, 8, 8, 3)
            blocks = blocks[order].reshape(4, 4, 8, 8, 3).transpose(0, 2, 1, 3, 4)
            picture = Image.fromarray(np.ascontiguousarray(blocks.reshape(32, 32, 3)))
        else:
            picture = cut(what, 32)
        if paste["flip"]:
            picture = picture.transpose(Image.FLIP_LEFT_RIGHT)
        left, top, right, bottom = paste["corners"]
        width, height = right - left, bottom - top
        pixels = np.asarray(resize(picture, width, height)).astype(np.float32)

        def share(length):
            at = np.arange(length)
            inside = (np.minimum(at, length - 1 - at) + 0.5).astype(np.float32)
            seam = paste["seam"]
            return np.clip(inside / np.float32(seam), 0, 1) if seam else np.ones(length, np.float32)

        alpha = (share(height)[:, None] * share(width)[None])[..., None].astype(np.float32)
        part = canvas[top:bottom, left:right]
        canvas[top:bottom, left:right] = part * (1 - alpha) + pixels * alpha
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def scenes(folder):
    folder = Path(folder)
    said = json.loads((folder / "layouts.json").read_text())
    edge = said["rules"]["size"] * 7 // 4
    photos = np.fromfile(folder / "photos.bin", np.uint8).reshape(-1, edge, edge, 3)
    objects = np.fromfile(folder / "objects.bin", np.uint8).reshape(-1, 32, 32, 3)
    made = [scene(said["rules"], layout, photos, objects) for layout in said["layouts"]]
    np.stack(made).tofile(folder / "scenes.bin")


def head(tensors):
    def conv(x, name, padding=0):
        return F.conv2d(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"], padding=padding)

    grid = int(tensors["grid"])
    total = 0
    for level in (2, 3, 4, 5):
        if f"map{level}" in tensors:
            z = conv(tensors[f"map{level}"], f"res{level}")
            total = total + F.interpolate(z, size=(grid, grid), mode="bilinear", align_corners=False)
    x = F.relu(F.group_norm(total, 8, tensors["norm.weight"], tensors["norm.bias"]))
    x = F.relu(conv(x, "conv", 1))
    return {"logits": conv(x, "classes"), "distances": conv(x, "distances").clamp(max=6).exp()}


def losses(tensors):
    from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

    logits, distances = (tensors[name].requires_grad_() for name in ("logits", "distances"))
    classes, targets = tensors["classes"], tensors["targets"]
    positive = classes >= 0
    hot = torch.zeros_like(logits)
    n, h, w = torch.nonzero(positive, as_tuple=True)
    hot[n, classes[positive], h, w] = 1
    count = max(1, int(positive.sum()))
    focal = sigmoid_focal_loss(logits, hot, alpha=0.25, gamma=2, reduction="sum")

    def corners(of):
        of = of.permute(0, 2, 3, 1)[positive]
        return torch.stack([-of[:, 0], -of[:, 1], of[:, 2], of[:, 3]], 1)

    apart = generalized_box_iou_loss(corners(distances), corners(targets), reduction="sum", eps=0)
    ((focal + apart) / count).backward()
    return {
        "focal": focal, "giou": apart, "logits": logits.grad, "distances": distances.grad,
    }


def adamw(tensors):
    parameter = tensors["parameter"].requires_grad_()
    optimizer = torch.optim.AdamW([parameter], weight_decay=0.01)
    after = []
    for lr, gradient in zip(tensors["rates"], tensors["gradients"]):
        optimizer.param_groups[0]["lr"] = float(lr)
        parameter.grad = gradient.clone()
        optimizer.step()
        after.append(parameter.detach().clone())
    return {"after": torch.stack(after)}


def nms(tensors):
    from torchvision.ops import nms

    # Class by class, so that no offset rounds a box.
    cases = zip(*(tensors[name] for name in ("boxes", "scores", "classes")))
    found = {}
    for case, (boxes, scores, classes) in enumerate(cases):
        kept = []
        for number in classes.unique():
            at = torch.nonzero(classes == number)[:, 0]
            kept.append(at[nms(boxes[at], scores[at], float(tensors["overlap"]))])
        found[f"kept{case}"] = torch.cat(kept)
    return found


def main(what, *paths):
    torch.set_num_threads(1)
    if what == "scenes":
        return scenes(*paths)
    found = {"head": head, "losses": losses, "adamw": adamw, "nms": nms}[what](load_file(paths[0]))
    save_file({name: t.detach().contiguous() for name, t in found.items()}, paths[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
