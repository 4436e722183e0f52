"""Reads a config of this folder and makes its detector. check.py and train.py share it."""

import os

from detectron2.config import get_cfg
from detectron2.layers import get_norm
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
from detectron2.utils import comm

HERE = os.path.dirname(os.path.abspath(__file__))
WEIGHTS = os.path.join(HERE, "backbone.pkl")


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """The C4 head with a batch normalisation behind Res5, as in MoCo's detection experiments."""

    def __init__(self, cfg, input_shape):
        super().__init__(cfg, input_shape)
        channels = 8 * cfg.MODEL.RESNETS.RES2_OUT_CHANNELS
        self.res5.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))


def read_config(path, options=()):
    """The config at `path` with `options` (KEY VALUE KEY VALUE) in place of its own values."""
    cfg = get_cfg()
    if "sparse-rcnn" in os.path.basename(path):
        try:
            from sparsercnn import add_sparsercnn_config
        except ImportError as error:
            raise SystemExit(f"{path} needs Sparse R-CNN's projects/SparseRCNN on PYTHONPATH: {error}")
        add_sparsercnn_config(cfg)
    cfg.merge_from_file(path)
    cfg.merge_from_list(list(options))
    if cfg.MODEL.WEIGHTS == os.path.basename(WEIGHTS):
        cfg.MODEL.WEIGHTS = WEIGHTS
    if comm.get_world_size() == 1:
        # Old releases of PyTorch ask for a process group. Of one process BN is the same.
        for node in (cfg.MODEL.RESNETS, cfg.MODEL.FPN):
            if node.NORM == "SyncBN":
                node.NORM = "BN"
    cfg.freeze()
    return cfg
