//! Images, class folders, ImageNet's tar of tars to shards.
