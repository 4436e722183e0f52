"""Res5 as the head of C4 detectors, with a batch normalisation behind it, as in MoCo's detection experiments."""

from mmcv.cnn import build_norm_layer
from mmdet.models.backbones import ResNet
from mmdet.models.roi_heads.shared_heads import ResLayer
from mmdet.registry import MODELS


@MODELS.register_module()
class ResLayerExtraNorm(ResLayer):
    """ResLayer and a norm."""

    def __init__(self, depth, stage=3, **kwargs):
        super().__init__(depth, stage=stage, **kwargs)
        channels = 64 * 2**stage * ResNet.arch_settings[depth][0].expansion
        self.extra_norm = build_norm_layer(self.norm_cfg, channels)[1]

    def forward(self, x):
        return self.extra_norm(super().forward(x))
