"""Trains the detector of a config with detectron2 and evaluates it at the end.

    python train.py --config-file table2-mask-rcnn-r50-fpn-12k.yaml --num-gpus 8
    python train.py --config-file CONFIG.yaml --num-gpus 8 --resume
    python train.py --config-file CONFIG.yaml --num-gpus 8 MODEL.WEIGHTS "''"        random weights

Beside detectron2's own train_net.py it has the extra norm of C4 heads, works in one process, finds the subsets of
table 8, and checks the backbone before the first step.
"""

import json
import os
import re

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.utils import comm

from check import check
from detector import HERE, WEIGHTS, read_config

IMAGES = 118287  # of COCO's train2017


class Trainer(DefaultTrainer):
    """detectron2's loop, with the evaluator that belongs to the data."""

    @classmethod
    def build_evaluator(cls, cfg, name, output_folder=None):
        if MetadataCatalog.get(name).evaluator_type == "pascal_voc":
            return PascalVOCDetectionEvaluator(name)
        return COCOEvaluator(name, output_dir=output_folder or os.path.join(cfg.OUTPUT_DIR, "inference"))


def register_subset(name):
    """coco_2017_train.1pct.seed0 is subsets/instances_train2017.1pct.seed0.json in this folder."""
    rest = name[len("coco_2017_train.") :]
    path = os.path.join(HERE, "subsets", f"instances_train2017.{rest}.json")
    if not os.path.exists(path):
        raise SystemExit(f"{path} is missing: detco data subset instances_train2017.json -o {HERE}/subsets")
    with open(path) as file:
        count = len(json.load(file)["images"])
    percent = float(re.match(r"([\d.]+)pct", rest)[1])
    if abs(count / IMAGES * 100 - percent) > percent / 20:
        raise SystemExit(f"{path} holds {count} images, which is not {percent:g} % of {IMAGES}")
    images = os.path.join(os.environ.get("DETECTRON2_DATASETS", "datasets"), "coco/train2017")
    register_coco_instances(name, {}, path, images)


def main(args):
    if "sparse-rcnn" in os.path.basename(args.config_file):
        raise SystemExit("table 4 is trained by projects/SparseRCNN/train_net.py of Sparse R-CNN: see README.md")
    cfg = read_config(args.config_file, args.opts)
    default_setup(cfg, args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        return Trainer.test(cfg, model)
    for name in cfg.DATASETS.TRAIN:
        if name.startswith("coco_2017_train."):
            register_subset(name)
    images = cfg.SOLVER.IMS_PER_BATCH
    print(f"batch normalisation sees {images} images a step; the tables have 16")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    if trainer.start_iter == 0 and cfg.MODEL.WEIGHTS == WEIGHTS:
        model = trainer.model
        check(model.module if comm.get_world_size() > 1 else model, cfg)
    return trainer.train()


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))
