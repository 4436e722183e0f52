"""Holds folders of `detco export --configs` against the tables, and runs those for torchvision.

    export_configs.py files ENGINE DEPTH DIR     every file parses; values are those of the tables
    export_configs.py tree DIR                   a COCO of a few images: boxes, polygons, key points, and two subsets
    export_configs.py torchvision DIR COCO       check.py on all configs and against damage; a step of each detector
    export_configs.py detectron2 DIR SETS [SPARSE_RCNN]    the same with detectron2, which PYTHONPATH must find, on
                                                 a CPU; SETS is made, SPARSE_RCNN is a checkout of Sparse R-CNN.
                                                 By hand: no wheel of detectron2 exists for today's PyTorch
"""

import ast
import glob
import json
import os
import random
import subprocess
import sys

import numpy
import yaml
from PIL import Image, ImageDraw

# The paper's tables: detector, iterations, milestones, rate for 16 images. Written from the authors' configs, apart
# from the table in src.
C4, FPN = {50, 101}, {18, 34, 50, 101}
ROWS = {
    "table2-mask-rcnn-r{}-c4-12k": ("mask c4", 12000, [9000, 11000], 0.02, C4),
    "table2-mask-rcnn-r{}-fpn-12k": ("mask fpn", 12000, [9000, 11000], 0.02, FPN),
    "table3-mask-rcnn-r{}-c4-90k": ("mask c4", 90000, [60000, 80000], 0.02, C4),
    "table3-mask-rcnn-r{}-fpn-90k": ("mask fpn", 90000, [60000, 80000], 0.02, FPN),
    "table4-sparse-rcnn-r{}-fpn-270k": ("sparse", 270000, [210000, 250000], 2.5e-5, FPN),
    "table7-retinanet-r{}-fpn-12k": ("retinanet", 12000, [9000, 11000], 0.01, FPN),
    "table7-retinanet-r{}-fpn-90k": ("retinanet", 90000, [60000, 80000], 0.01, FPN),
    "table7-retinanet-r{}-fpn-180k": ("retinanet", 180000, [120000, 160000], 0.01, FPN),
    "table7-keypoint-rcnn-r{}-fpn-180k": ("keypoint", 180000, [120000, 160000], 0.02, FPN),
    "table8-retinanet-r{}-fpn-1pct": ("retinanet", 12000, [9000, 11000], 0.01, FPN),
    "table8-retinanet-r{}-fpn-2pct": ("retinanet", 12000, [9000, 11000], 0.01, FPN),
    "table8-retinanet-r{}-fpn-5pct": ("retinanet", 12000, [9000, 11000], 0.01, FPN),
    "table8-retinanet-r{}-fpn-10pct": ("retinanet", 12000, [9000, 11000], 0.01, FPN),
    "table9-faster-rcnn-r{}-c4-voc-24k": ("voc", 24000, [18000, 22000], 0.02, C4),
}
LACKING = {"torchvision": {"mask c4", "voc", "sparse"}, "mmdet": {"keypoint"}, "detectron2": set()}
ENDING = {"torchvision": "json", "mmdet": "py", "detectron2": "yaml"}
SIDES = [640, 672, 704, 736, 768, 800]
WIDE_SIDES = [480, 512, 544, 576, 608] + SIDES


def same(found, expected, where):
    assert found == expected, f"{where}: {found}, expected {expected}"


def percent_of(stem):
    return stem.rsplit("-", 1)[1][:-3] if stem.endswith("pct") else None


def files(engine, depth, folder):
    depth = int(depth)
    rows = {
        stem.format(depth): row
        for stem, row in ROWS.items()
        if depth in row[4] and row[0] not in LACKING[engine]
    }
    paths = glob.glob(os.path.join(folder, "table*"))
    found = {os.path.basename(path).rsplit(".", 1)[0]: path for path in paths}
    same(sorted(found), sorted(rows), folder)
    for path in glob.glob(os.path.join(folder, "*.py")):
        with open(path) as file:
            ast.parse(file.read(), path, feature_version=(3, 8))
    with open(os.path.join(folder, "README.md")) as file:
        readme = file.read()
    assert "@" not in readme.replace("`@", ""), "a place of README.md was not filled"
    for stem, path in found.items():
        assert path.endswith("." + ENDING[engine]), path
        assert f"`{stem}.{ENDING[engine]}`" in readme, f"{stem} is not in README.md"
        {"detectron2": of_detectron2, "torchvision": of_torchvision, "mmdet": of_mmdet}[engine](
            path, stem, depth, *rows[stem][:4]
        )
    reference = numpy.load(os.path.join(folder, "reference.npz"))
    same(sorted(reference), ["image", "res2", "res3", "res4", "res5"], "reference.npz")
    image, channels = reference["image"], 256 if depth >= 50 else 64
    same((image.shape, image.dtype), ((96, 128, 3), numpy.dtype("uint8")), "image")
    assert image.std((0, 1)).min() > 30 and abs(image[..., 0].astype(int) - image[..., 2]).mean() > 20
    for i in range(4):
        shape = (1, channels << i, 24 >> i, 32 >> i)
        same(reference[f"res{i + 2}"].shape, shape, f"res{i + 2}")
        same(reference[f"res{i + 2}"].dtype, numpy.dtype("float32"), f"res{i + 2}")
    print(len(found))


def merged(path):
    """A config of detectron2 with its bases."""
    with open(path) as file:
        own = yaml.safe_load(file)
    base = own.pop("_BASE_", None)

    def put(into, tree):
        for key, value in tree.items():
            if isinstance(value, dict):
                put(into.setdefault(key, {}), value)
            else:
                into[key] = value
        return into

    return put(merged(os.path.join(os.path.dirname(path), base)) if base else {}, own)


def of_detectron2(path, stem, depth, detector, iterations, steps, rate):
    config = merged(path)

    def at(key):
        value = config
        for part in key.split("."):
            value = value[part]
        return value

    expected = {
        "SOLVER.MAX_ITER": iterations,
        "SOLVER.STEPS": steps,
        "SOLVER.BASE_LR": rate,
        "SOLVER.IMS_PER_BATCH": 16,
        "SOLVER.WARMUP_ITERS": 100 if detector == "voc" else 1000,
        "SOLVER.WARMUP_FACTOR": 0.01 if detector == "sparse" else 0.001,
        "SOLVER.WEIGHT_DECAY": 1e-4,
        "SOLVER.WEIGHT_DECAY_NORM": 0.0,
        "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 256 if depth >= 50 else 64,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.RESNETS.NORM": "SyncBN",
        "INPUT.FORMAT": "RGB",
        "INPUT.MIN_SIZE_TRAIN": WIDE_SIDES if detector in ("voc", "sparse") else SIDES,
        "INPUT.MAX_SIZE_TRAIN": 1200 if detector == "mask c4" else 1333,
        "INPUT.MIN_SIZE_TEST": 800,
        "TEST.PRECISE_BN.ENABLED": True,
        "TEST.PRECISE_BN.NUM_ITER": 200,
    }
    if detector in ("mask fpn", "keypoint", "retinanet"):
        expected["MODEL.FPN.NORM"] = "SyncBN"
    if detector in ("mask c4", "voc"):
        expected["MODEL.ROI_HEADS.NAME"] = "Res5ROIHeadsExtraNorm"
        expected["MODEL.RPN.PRE_NMS_TOPK_TEST"] = 6000
        expected["MODEL.RPN.POST_NMS_TOPK_TEST"] = 1000
    if detector == "voc":
        expected["MODEL.ROI_HEADS.NUM_CLASSES"] = 20
        expected["DATASETS.TRAIN"] = ["voc_2007_trainval", "voc_2012_trainval"]
        expected["DATASETS.TEST"] = ["voc_2007_test"]
    if detector == "keypoint":
        expected["MODEL.ROI_HEADS.NUM_CLASSES"] = 1
        expected["MODEL.RPN.POST_NMS_TOPK_TRAIN"] = 1500
        expected["MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA"] = 0.5
        expected["DATASETS.TRAIN"] = ["keypoints_coco_2017_train"]
    if detector == "retinanet":
        expected["MODEL.RETINANET.IOU_THRESHOLDS"] = [0.4, 0.5]
        expected["MODEL.RETINANET.SMOOTH_L1_LOSS_BETA"] = 0.0
        sizes = [[side * 2 ** (i / 3) for i in range(3)] for side in (32, 64, 128, 256, 512)]
        assert numpy.allclose(at("MODEL.ANCHOR_GENERATOR.SIZES"), sizes, atol=1e-6), sizes
        percent = percent_of(stem)
        name = f"coco_2017_train.{percent}pct.seed0" if percent else "coco_2017_train"
        expected["DATASETS.TRAIN"] = [name]
    if detector == "sparse":
        expected["SOLVER.OPTIMIZER"] = "ADAMW"
        expected["SOLVER.CLIP_GRADIENTS.CLIP_TYPE"] = "full_model"
        expected["SOLVER.CLIP_GRADIENTS.CLIP_VALUE"] = 1.0
        expected["MODEL.SparseRCNN.NUM_PROPOSALS"] = 300
        expected["INPUT.CROP.TYPE"] = "absolute_range"
        expected["INPUT.CROP.SIZE"] = [384, 600]
        expected["SEED"] = 40244023
    for key, value in expected.items():
        same(at(key), value, f"{stem}: {key}")


def of_torchvision(path, stem, depth, detector, iterations, steps, rate):
    with open(path) as file:
        config = json.load(file)
    names = {"mask fpn": "mask_rcnn", "keypoint": "keypoint_rcnn", "retinanet": "retinanet"}
    expected = {
        "detector": names[detector],
        "backbone": f"resnet{depth}",
        "classes": 1 if detector == "keypoint" else 80,
        "iterations": iterations,
        "steps": steps,
        "lr": rate,
        "batch": 16,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "warmup": 1000,
        "warmup_factor": 0.001,
        "short_sides": SIDES,
        "long_side": 1333,
        "test_short_side": 800,
        "precise_bn": 200,
    }
    if detector != "retinanet":
        expected["proposals"] = 1500 if detector == "keypoint" else 1000
    for key, value in expected.items():
        same(config[key], value, f"{stem}: {key}")
    percent = percent_of(stem)
    subset = f"subsets/instances_train2017.{percent}pct.seed0.json" if percent else None
    same(config["train"].get("subset"), subset, stem)


def literal(node):
    """The value of an expression of literals, lists, and dict(...)."""
    if isinstance(node, ast.Call):
        return {one.arg: literal(one.value) for one in node.keywords}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [literal(one) for one in node.elts]
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def assigned(path):
    with open(path) as file:
        body = ast.parse(file.read(), path).body
    return {one.targets[0].id: literal(one.value) for one in body if isinstance(one, ast.Assign)}


def of_mmdet(path, stem, depth, detector, iterations, steps, rate):
    config = assigned(path)
    base = assigned(os.path.join(os.path.dirname(path), config["_base_"]))
    same(config["train_cfg"]["max_iters"], iterations, stem)
    warm_up, milestones = config["param_scheduler"]
    same(milestones["milestones"], steps, stem)
    same(warm_up["end"], 100 if detector == "voc" else 1000, stem)
    same(warm_up["start_factor"], 0.01 if detector == "sparse" else 0.001, stem)
    if detector != "sparse":
        same(config["optim_wrapper"]["optimizer"]["lr"], rate, stem)
        same(config["optim_wrapper"]["paramwise_cfg"]["norm_decay_mult"], 0.0, stem)
    backbone = base["model"]["backbone"]
    same(base["norm_cfg"]["type"], "SyncBN", stem)
    same((backbone["depth"], backbone["frozen_stages"]), (depth, -1), stem)
    same((backbone["norm_eval"], backbone["norm_cfg"]), (False, "norm_cfg"), stem)
    same(base["train_dataloader"]["batch_size"], 2, stem)
    if detector in ("mask c4", "voc"):
        head = base["model"]["roi_head"]["shared_head"]
        same((head["type"], head["depth"]), ("ResLayerExtraNorm", depth), stem)
        same(base["weights"]["checkpoint"], "backbone.pth", stem)
        same((backbone["init_cfg"], head["init_cfg"]), ("weights", "weights"), stem)
    else:
        same(backbone["init_cfg"]["checkpoint"], "backbone.pth", stem)
        first = 256 if depth >= 50 else 64
        same(base["model"]["neck"]["in_channels"], [first << i for i in range(4)], stem)
    percent = percent_of(stem)
    if percent:
        annotations = config["train_dataloader"]["dataset"]["ann_file"]
        same(annotations, f"subsets/instances_train2017.{percent}pct.seed0.json", stem)


def person(number, image, left, top, width, height):
    """An annotation as COCO's: a box, its corners as polygon, and seventeen points in it."""
    right, below = left + width, top + height
    points = []
    for i in range(17):
        points += [left + width * (i % 5) / 5, top + height * (i // 5) / 4, 2 if i % 6 else 0]
    return {
        "id": number,
        "image_id": image,
        "category_id": 1,
        "bbox": [left, top, width, height],
        "area": width * height,
        "iscrowd": 0,
        "segmentation": [[left, top, right, top, right, below, left, below]],
        "keypoints": points,
        "num_keypoints": 14,
    }


def tree(folder, names=None):
    """COCO's layout with six images of two rectangles. Categories have gaps, as COCO's."""
    draw = random.Random(3)
    os.makedirs(os.path.join(folder, "annotations"), exist_ok=True)
    names = names or {i: f"c{i}" for i in range(1, 92) if i % 8 != 4}
    categories = [{"id": i, "name": name} for i, name in names.items()]
    categories[0].update(name="person", keypoints=[f"p{i}" for i in range(17)], skeleton=[])
    assert len(categories) == 80
    for name, count in (("train2017", 4), ("val2017", 2)):
        images, annotations = [], []
        os.makedirs(os.path.join(folder, name), exist_ok=True)
        for image in range(1, count + 1):
            picture = Image.new("RGB", (128, 96), tuple(draw.randrange(256) for _ in range(3)))
            for _ in range(2):
                one = person(len(annotations) + 1, image, draw.randrange(60), draw.randrange(40), 50, 45)
                x, y, w, h = one["bbox"]
                colour = tuple(draw.randrange(256) for _ in range(3))
                ImageDraw.Draw(picture).rectangle([x, y, x + w, y + h], fill=colour)
                annotations.append(one)
            file = f"{image:012}.png"
            picture.save(os.path.join(folder, name, file))
            images.append({"id": image, "file_name": file, "width": 128, "height": 96})
        whole = {"images": images, "annotations": annotations, "categories": categories}
        people = {**whole, "categories": categories[:1]}
        for kind, content in (("instances", whole), ("person_keypoints", people)):
            with open(os.path.join(folder, "annotations", f"{kind}_{name}.json"), "w") as file:
                json.dump(content, file)


OBJECT = """<annotation>
<filename>{0}.jpg</filename>
<size><width>128</width><height>96</height><depth>3</depth></size>
<object>
<name>person</name><pose>Left</pose><truncated>0</truncated><difficult>0</difficult>
<bndbox><xmin>20</xmin><ymin>20</ymin><xmax>70</xmax><ymax>65</ymax></bndbox>
</object>
</annotation>
"""


def voc(folder, sets):
    """A VOCdevkit's year with two images in each list."""
    for name in ("ImageSets/Main", "Annotations", "JPEGImages"):
        os.makedirs(os.path.join(folder, name), exist_ok=True)
    for name in sets:
        images = [f"{name}{i}" for i in range(2)]
        with open(os.path.join(folder, "ImageSets/Main", f"{name}.txt"), "w") as file:
            file.write("\n".join(images) + "\n")
        for image in images:
            with open(os.path.join(folder, "Annotations", f"{image}.xml"), "w") as file:
                file.write(OBJECT.format(image))
            picture = Image.new("RGB", (128, 96), (90, 120, 60))
            ImageDraw.Draw(picture).rectangle([20, 20, 70, 65], fill=(200, 40, 90))
            picture.save(os.path.join(folder, "JPEGImages", f"{image}.jpg"))


def subsets(folder, coco):
    """Subsets of the size that table 8 asks for: the same four images under other ids."""
    with open(os.path.join(coco, "annotations/instances_train2017.json")) as file:
        whole = json.load(file)
    os.makedirs(os.path.join(folder, "subsets"), exist_ok=True)
    for percent, count in ((1, 1182), (2, 2365), (5, 5914), (10, 11828)):
        images = [{**whole["images"][i % 4], "id": i + 1} for i in range(count)]
        boxes = [person(i + 1, i + 1, 20, 20, 50, 45) for i in range(count)]
        content = {**whole, "images": images, "annotations": boxes}
        name = f"instances_train2017.{percent}pct.seed0.json"
        with open(os.path.join(folder, "subsets", name), "w") as file:
            json.dump(content, file)


def python(folder, *arguments):
    """Runs a script of the folder; its exit code and what it says."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    ended = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    return ended.returncode, ended.stdout + ended.stderr


def torchvision(folder, coco):
    subsets(folder, coco)
    code, said = python(folder, "check.py")
    assert code == 0, said
    configs = sorted(glob.glob(os.path.join(folder, "table*.json")))
    same(said.count("res5: differs by"), len(configs), said)
    damaged(folder, os.path.basename(configs[0]))
    small = ["short_sides=[64]", "test_short_side=64", "long_side=96", "batch=2", "precise_bn=1"]
    sets = [word for one in [*small, "workers=0"] for word in ("--set", one)]
    runs = os.path.join(folder, "runs")
    # One of each detector, and one with a subset of the labels: others differ in their numbers alone.
    trained = {name.split("-")[1]: name for name in map(os.path.basename, configs) if "pct" not in name}
    trained = [*trained.values(), next(name for name in map(os.path.basename, configs) if "pct" in name)]
    same(len(trained), 4, trained)
    # One process for all, which need not import PyTorch each time.
    program = "import json, sys, train\nfor sys.argv in json.loads(sys.argv[1]): train.main()"
    steps = [
        ["train.py", name, "--data", coco, "--out", os.path.join(runs, name), *sets, "--set", "iterations=1"]
        for name in trained
    ]
    code, said = python(folder, "-c", program, json.dumps(steps))
    assert code == 0, said
    same(said.count("res5: differs by"), len(trained), said)
    same(said.count("step 1 of 1: loss"), len(trained), said)
    for name in trained:
        with open(os.path.join(runs, name, "ap.json")) as file:
            kinds = set(json.load(file))
        expected = {"mask": {"bbox", "segm"}, "keypoint": {"bbox", "keypoints"}}
        same(kinds, expected.get(name.split("-")[1], {"bbox"}), name)
    print("\n".join(line for line in said.split("\n") if "loss" in line))
    out = os.path.join(runs, name)
    # Goes on where it stopped: one more update.
    again = [*sets, "--set", "iterations=2", "--resume"]
    code, said = python(folder, "train.py", name, "--data", coco, "--out", out, *again)
    assert code == 0 and "step 2 of 2" in said and "res5" not in said, said
    code, said = python(folder, "train.py", name, "--data", coco, "--out", out, "--set", "bach=2")
    assert code == 1 and "no such key" in said, said


def detectron2(folder, sets, sparse=None):
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    names = {one["id"]: one["name"] for one in COCO_CATEGORIES if one["isthing"]}
    tree(os.path.join(sets, "coco"), names)
    voc(os.path.join(sets, "VOC2007"), ["trainval", "test"])
    voc(os.path.join(sets, "VOC2012"), ["trainval"])
    subsets(folder, os.path.join(sets, "coco"))
    os.environ["DETECTRON2_DATASETS"] = os.path.abspath(sets)
    if sparse:
        project = os.path.abspath(os.path.join(sparse, "projects/SparseRCNN"))
        os.environ["PYTHONPATH"] = os.pathsep.join([os.environ.get("PYTHONPATH", ""), project])
    # detectron2 divides by zero where it is done before its clock starts, after three steps.
    small = ["MODEL.DEVICE cpu", "SOLVER.MAX_ITER 5", "SOLVER.IMS_PER_BATCH 2", "TEST.PRECISE_BN.NUM_ITER 1"]
    small += ["INPUT.MIN_SIZE_TRAIN (64,)", "INPUT.MAX_SIZE_TRAIN 96", "INPUT.MIN_SIZE_TEST 64"]
    small += ["INPUT.MAX_SIZE_TEST 96", "DATALOADER.NUM_WORKERS 0", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16"]
    small += ["MODEL.RPN.POST_NMS_TOPK_TEST 8", "INPUT.CROP.SIZE (48,64)", "TEST.EVAL_PERIOD 0"]
    # Sparse R-CNN reads the first three characters of torchvision's version: 0.26 is 0.2 to it, and below 0.7.
    version = "import sys, runpy, torchvision; torchvision.__version__ = '0.9.0'; sys.argv.pop(0); "
    version += "sys.path.insert(0, ''); runpy.run_path(sys.argv[0], run_name='__main__')"
    for config in sorted(glob.glob(os.path.join(folder, "table*.yaml"))):
        name = os.path.basename(config)
        is_sparse = "sparse" in name
        if is_sparse and not sparse:
            print(name, "not run")
            continue
        code, said = python(folder, "-c", version, "check.py", name)
        assert code == 0, f"{name}: {said[-3000:]}"
        found = [line for line in said.split("\n") if "differs by" in line or "tensors are" in line]
        same(len(found), 5, said)
        print(name, found[0].split(" ")[0], "tensors equal; worst of", found[-1])
        script = os.path.join(project, "train_net.py") if is_sparse else "train.py"
        options = [word for one in small for word in one.split(" ")]
        out = ["OUTPUT_DIR", os.path.join(os.path.abspath(folder), "runs", name)]
        code, said = python(folder, "-c", version, script, "--config-file", name, *options, *out)
        assert code == 0, f"{name}: {said[-3000:]}"
        loss = [word for word in said.split("total_loss: ")[1:]]
        assert loss and float(loss[-1].split()[0]) > 0, said[-3000:]
        assert is_sparse or "res5: differs by" in said, said[-3000:]
        assert "copypaste: " in said, said[-3000:]
        print(name, "five steps, total loss", loss[-1].split()[0], flush=True)


def damaged(folder, config):
    """check.py finds a backbone that computes something else."""
    changes = (
        ("model.transform.image_mean.reverse()", "res2 is not what detco computes"),
        ("model.backbone.body.maxpool.stride = 1", "res2 has the shape (1, 64, 48, 64), expected (1, 64, 24, 32)"),
        ("model.backbone.body.layer4[1].bn1.eps = 1.0", "res5 is not what detco computes"),
        ("model.backbone.body.layer2[0].conv1.weight.data += 1", "layer2.0.conv1.weight of backbone.pth"),
        ("model.backbone.body.conv1.requires_grad_(False)", "conv1.weight and 0 more are frozen"),
    )
    program = (
        "import json, sys\nfrom check import check, detector, read_config\n"
        "for change in json.loads(sys.argv[1]):\n"
        f"    model = detector(read_config({config!r}))\n    exec(change)\n"
        "    try:\n        check(model)\n        print('found nothing:', change)\n"
        "    except SystemExit as ended:\n        print('ended:', ended)\n"
    )
    code, said = python(folder, "-c", program, json.dumps([change for change, _ in changes]))
    ends = [line for line in said.split("\n") if line.startswith("ended: ")]
    same((code, len(ends)), (0, len(changes)), said)
    for end, (change, complaint) in zip(ends, changes):
        assert complaint in end, f"{change}: {end}"


if __name__ == "__main__":
    commands = {"files": files, "tree": tree, "torchvision": torchvision, "detectron2": detectron2}
    commands[sys.argv[1]](*sys.argv[2:])
