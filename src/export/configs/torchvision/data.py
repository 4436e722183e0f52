"""COCO as torchvision's detectors take it, and its average precision by pycocotools."""

import contextlib
import io
import os
import random

import numpy
import torch
from PIL import Image
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.transforms.functional import hflip, to_tensor

# The points of COCO's skeleton after a flip: left ones are right ones.
FLIPPED = [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]


class Coco(torch.utils.data.Dataset):
    """Images with targets: boxes, labels from 1 without gaps, and masks or keypoints."""

    def __init__(self, annotations, images, kind, training):
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco = COCO(annotations)
        self.images, self.kind, self.training = images, kind, training
        self.labels = {category: 1 + i for i, category in enumerate(sorted(self.coco.getCatIds()))}
        ids = sorted(self.coco.getImgIds())
        self.ids = [i for i in ids if self.objects(i)] if training else ids

    def objects(self, image_id):
        """Annotations that train: no crowds, no empty boxes; of people those with a visible point."""
        found = self.coco.loadAnns(self.coco.getAnnIds(image_id, iscrowd=False))
        found = [one for one in found if one["bbox"][2] > 0 and one["bbox"][3] > 0]
        if self.kind == "keypoint_rcnn":
            found = [one for one in found if one.get("num_keypoints")]
        return found

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        image_id = self.ids[index]
        path = os.path.join(self.images, self.coco.loadImgs(image_id)[0]["file_name"])
        image = to_tensor(Image.open(path).convert("RGB"))
        if not self.training:
            return image, image_id
        objects = self.objects(image_id)
        x, y, w, h = torch.tensor([one["bbox"] for one in objects]).unbind(1)
        target = {"boxes": torch.stack([x, y, x + w, y + h], 1)}
        target["labels"] = torch.tensor([self.labels[one["category_id"]] for one in objects])
        if self.kind == "mask_rcnn":
            target["masks"] = torch.from_numpy(numpy.stack([self.coco.annToMask(one) for one in objects]))
        if self.kind == "keypoint_rcnn":
            points = torch.tensor([one["keypoints"] for one in objects], dtype=torch.float32)
            target["keypoints"] = points.view(-1, 17, 3)
        return flip(image, target) if random.random() < 0.5 else (image, target)


def flip(image, target):
    """The mirror image, with everything in the target."""
    width = image.shape[2]
    left, top, right, below = target["boxes"].unbind(1)
    target["boxes"] = torch.stack([width - right, top, width - left, below], 1)
    if "masks" in target:
        target["masks"] = target["masks"].flip(2)
    if "keypoints" in target:
        points = target["keypoints"][:, FLIPPED]
        points[..., 0] = width - points[..., 0]
        points[points[..., 2] == 0] = 0  # a point that is not labelled has no place
        target["keypoints"] = points
    return hflip(image), target


def results(image_id, output, categories):
    """A detector's output for an image as COCO's results."""
    found = []
    for i, (box, label, score) in enumerate(zip(output["boxes"], output["labels"], output["scores"])):
        if int(label) not in categories:
            continue  # the class 0 of RetinaNet, which nothing trains
        x, y, right, below = box.tolist()
        one = {"image_id": image_id, "category_id": categories[int(label)], "score": float(score)}
        one["bbox"] = [x, y, right - x, below - y]
        if "masks" in output:
            pixels = (output["masks"][i, 0] > 0.5).to(torch.uint8).cpu().numpy()
            one["segmentation"] = masks.encode(numpy.asfortranarray(pixels))
        if "keypoints" in output:
            one["keypoints"] = output["keypoints"][i].flatten().tolist()
        found.append(one)
    return found


def average_precision(coco, found, kind):
    """Prints COCO's numbers and returns AP of each kind of result."""
    of_kind = {"mask_rcnn": ["bbox", "segm"], "keypoint_rcnn": ["bbox", "keypoints"], "retinanet": ["bbox"]}
    if not found:
        return dict.fromkeys(of_kind[kind], 0.0)
    answer = {}
    for what in of_kind[kind]:
        evaluation = COCOeval(coco, coco.loadRes(found), what)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        answer[what] = float(evaluation.stats[0])
    return answer
