//! Options of a packing job: what decides the bytes of the shards.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::convert::Resize;

/// How large a shard is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShardSize {
    /// A number of samples.
    Samples(u64),
    /// Bytes of source images: a shard is closed by the image that reaches them.
    Bytes(u64),
}

/// What to do with a file that cannot be packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnError {
    /// Stop.
    Fail,
    /// Leave it out and say so in `skipped.jsonl`.
    Skip,
}

/// What decides the bytes of the shards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// How large a shard is.
    pub shard_size: ShardSize,
    /// Seed of the order; `None` keeps the sorted order.
    pub shuffle: Option<u64>,
    /// Makes images smaller; `None` keeps their bytes.
    pub resize: Option<Resize>,
    /// What to do with a file that cannot be packed.
    pub on_error: OnError,
    /// Decodes every image, so that what training would refuse is refused here.
    #[serde(default, skip_serializing_if = "is_false")]
    pub check: bool,
    /// Turns images upright by their EXIF orientation, which makes new JPEGs of them.
    #[serde(default, skip_serializing_if = "is_false")]
    pub upright: bool,
    /// Class names in the order of their numbers; `None` takes them from the source. Not written
    /// down with the options: the manifest lists the classes.
    #[serde(skip)]
    pub classes: Option<Vec<String>>,
    /// A text file with the pictures' labels; `None` takes them from the source. Not written down
    /// with the options: the manifest's `source_sha256` depends on it.
    #[serde(skip)]
    pub labels: Option<PathBuf>,
}

/// An option that is off is not written: shards packed without it have the manifest that they had
/// before there was such an option.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_false(option: &bool) -> bool {
    !option
}

impl Default for Options {
    /// 1000 samples a shard, shuffled with seed 0, bytes untouched and not decoded, stop at the first
    /// fault.
    fn default() -> Self {
        Options {
            shard_size: ShardSize::Samples(1000),
            shuffle: Some(0),
            resize: None,
            on_error: OnError::Fail,
            check: false,
            upright: false,
            classes: None,
            labels: None,
        }
    }
}
