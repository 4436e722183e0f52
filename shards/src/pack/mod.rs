//! Images, class folders, ImageNet's tar of tars to shards.

/// Folder inside the output that holds what `--resume` needs; its presence says "not finished".
pub const STATE_FOLDER: &str = ".pack";
