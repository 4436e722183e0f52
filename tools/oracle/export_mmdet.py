"""Runs a folder of `detco export --format mmdet --configs` in mmdetection, on a CPU and by hand.

    export_mmdet.py DIR COCO SETS

mmdet 3.3 with mmcv-lite 2.1 must be installed. mmcv's compiled operations exist for no PyTorch of today; torchvision's
NMS and ROIAlign stand in for the two that training here meets. SETS holds coco, VOC2007 and VOC2012, as
`export_configs.py detectron2` makes them. check.py is run on all configs, then three steps of each.
"""

import glob
import importlib.machinery
import os
import runpy
import sys
import types


class Operations(types.ModuleType):
    """mmcv's compiled module: what is missing says so when it is called."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*arguments, **named):
            raise RuntimeError(f"mmcv's {name} is not here")

        return missing


def stand_in():
    import torchvision

    operations = Operations("mmcv._ext")
    operations.__spec__ = importlib.machinery.ModuleSpec("mmcv._ext", None)
    sys.modules["mmcv._ext"] = operations

    def nms(boxes, scores, iou_threshold, offset):
        return torchvision.ops.nms(boxes, scores, iou_threshold)

    operations.nms = nms
    import mmcv.ops

    def roi_align(features, rois, size, scale=1.0, samples=0, mode="avg", aligned=True):
        return torchvision.ops.roi_align(features, rois, size, scale, samples, aligned)

    # mmcv.ops.roi_align is the function, which hides the module of that name.
    sys.modules["mmcv.ops.roi_align"].roi_align = roi_align
    mmcv.ops.roi_align = roi_align


def train(path, folder):
    from mmengine.config import Config
    from mmengine.runner import Runner

    config = Config.fromfile(path)
    config.work_dir = os.path.join(folder, "runs", os.path.basename(path))
    config.train_cfg.update(max_iters=3, val_interval=100)
    config.default_hooks.logger.interval = 1
    loaders = [config.train_dataloader, config.val_dataloader, config.test_dataloader]
    for loader in loaders:
        loader.update(num_workers=0, persistent_workers=False)

    def shrink(node):
        """Images of 64 pixels, few proposals."""
        if isinstance(node, dict):
            if node.get("type") == "RandomChoiceResize":
                node["scales"] = [(96, 64)]
            if node.get("type") == "RandomCrop":
                node["crop_size"] = (48, 64)
            if node.get("type") == "RandomSampler":
                node["num"] = 16
            if "max_per_img" in node:
                node["max_per_img"] = 8
            if "scale" in node and node.get("type") == "Resize":
                node["scale"] = (96, 64)
            for value in node.values():
                shrink(value)
        if isinstance(node, (list, tuple)):
            for value in node:
                shrink(value)

    for node in (config.train_dataloader, config.val_dataloader, config.model):
        shrink(node)
    if "VOC" in str(config.train_dataloader.dataset):
        config.default_hooks.pop("visualization", None)
    runner = Runner.from_cfg(config)
    runner.train()
    print(os.path.basename(path), "three steps, loss", runner.message_hub.get_scalar("train/loss").current())


def main(folder, coco, sets):
    os.chdir(folder)
    folder = os.getcwd()
    sys.path.insert(0, folder)
    os.makedirs("data/VOCdevkit", exist_ok=True)
    for link, target in (
        ("data/coco", coco),
        ("data/VOCdevkit/VOC2007", os.path.join(sets, "VOC2007")),
        ("data/VOCdevkit/VOC2012", os.path.join(sets, "VOC2012")),
    ):
        if not os.path.exists(link):
            os.symlink(target, link)
    stand_in()
    sys.argv = ["check.py"]
    runpy.run_path("check.py", run_name="__main__")
    for path in sorted(glob.glob(os.path.join(folder, "table*.py"))):
        train(path, folder)


if __name__ == "__main__":
    main(sys.argv[1], *(os.path.abspath(path) for path in sys.argv[2:]))
