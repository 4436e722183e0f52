//! Settings of a network so small that an update takes milliseconds; every part of DetCo is in it.

/// For `--set`.
pub(crate) const TINY: &[&str] = &[
    "model.width=8",
    "model.bn_splits=2",
    "method.dim=16",
    "method.queue=64",
    "train.batch=8",
    "train.device=cpu",
    "train.threads=1",
    "optim.lr=0.2",
    "optim.lr_batch=8",
    "views.crops.size=32",
    "views.patches.size=36",
    "views.patches.grid.patch=8",
    "monitor.every_steps=1",
    // However late a machine ends a long run: it ends for no other reason.
    "monitor.collapse_share=0",
];
