"""Mask R-CNN whose head is Res5, with a norm behind it. Res5 takes its weights from the file by its own init_cfg."""

_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50-caffe-c4.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "mmdet::_base_/default_runtime.py",
]
custom_imports = dict(imports=["extra_norm"], allow_failed_imports=False)
norm_cfg = dict(type="SyncBN", requires_grad=True)
weights = dict(type="Pretrained", checkpoint="backbone.pth")
model = dict(
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(
        depth=@DEPTH@,
        frozen_stages=-1,
        norm_cfg=norm_cfg,
        norm_eval=False,
        style="pytorch",
        init_cfg=weights,
    ),
    roi_head=dict(
        shared_head=dict(
            type="ResLayerExtraNorm",
            depth=@DEPTH@,
            style="pytorch",
            norm_cfg=norm_cfg,
            norm_eval=False,
            init_cfg=weights,
        )
    ),
    train_cfg=dict(rpn=dict(allowed_border=-1)),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(
        type="RandomChoiceResize",
        scales=[(1200, 640), (1200, 672), (1200, 704), (1200, 736), (1200, 768), (1200, 800)],
        keep_ratio=True,
    ),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(
    batch_size=2,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(pipeline=train_pipeline),
)
