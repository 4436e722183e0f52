"""Faster R-CNN on PASCAL VOC whose head is Res5, with a norm behind it. Short sides of 480 to 800 are the base's."""

_base_ = "mmdet::pascal_voc/faster-rcnn_r50-caffe-c4_ms-18k_voc0712.py"
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
train_dataloader = dict(batch_size=2)
val_evaluator = dict(iou_thrs=[0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95], eval_mode="11points")
test_evaluator = val_evaluator
