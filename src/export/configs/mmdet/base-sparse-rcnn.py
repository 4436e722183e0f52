"""Sparse R-CNN with 300 proposals; its augmentation is mmdetection's own config of that name."""

_base_ = "mmdet::sparse_rcnn/sparse-rcnn_r50_fpn_300-proposals_crop-ms-480-800-3x_coco.py"
norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    backbone=dict(
        depth=@DEPTH@,
        frozen_stages=-1,
        norm_cfg=norm_cfg,
        norm_eval=False,
        init_cfg=dict(type="Pretrained", checkpoint="backbone.pth"),
    ),
    neck=dict(in_channels=@CHANNELS@),
)
train_dataloader = dict(batch_size=2, sampler=dict(type="InfiniteSampler", shuffle=True))
randomness = dict(seed=40244023)
