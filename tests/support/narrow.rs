//! Settings of a narrow DetCo for steps that are compared number by number.

/// For `Config::load`.
pub(crate) const NARROW: [&str; 8] = [
    "model.backbone=resnet18",
    "model.width=16",
    "method.dim=32",
    "model.bn_splits=4",
    "train.batch=16",
    "optim.lr_batch=16",
    "method.queue=64",
    "method.ema=0.9",
];
