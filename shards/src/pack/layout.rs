//! The layout of a data set: which images each shard holds.

use std::ops::Range;

use super::shuffle::Shuffle;
use super::source::Source;
use super::{Options, ShardSize};
use crate::format::manifest::Part;

/// Which images each shard holds.
pub(super) struct Layout {
    shuffle: Option<Shuffle>,
    images: u64,
    /// Samples a shard, or where each shard starts.
    cut: Cut,
}

enum Cut {
    Every(u64),
    At(Vec<u64>),
}

impl Layout {
    pub(super) fn new(source: &Source, options: &Options) -> Layout {
        let images = source.entries.len() as u64;
        let shuffle = options.shuffle.map(|seed| Shuffle::new(images, seed));
        let mut layout = Layout { shuffle, images, cut: Cut::Every(images) };
        layout.cut = match options.shard_size {
            ShardSize::Samples(samples) => Cut::Every(samples),
            ShardSize::Bytes(most) => {
                let mut starts = vec![0];
                let mut bytes = 0u64;
                for position in 0..images {
                    if bytes >= most {
                        starts.push(position);
                        bytes = 0;
                    }
                    bytes = bytes.saturating_add(source.entries[layout.entry(position)].size);
                }
                Cut::At(starts)
            }
        };
        layout
    }

    fn shards(&self) -> u64 {
        match &self.cut {
            Cut::Every(samples) => self.images.div_ceil(*samples),
            Cut::At(starts) => starts.len() as u64,
        }
    }

    /// The shards of a part: neighbours, so that each machine's names are a range.
    pub(super) fn part(&self, part: Part) -> Range<u64> {
        let edge = |number: u32| {
            // At most `shards`, so it fits.
            (u128::from(self.shards()) * u128::from(number) / u128::from(part.of)) as u64
        };
        edge(part.number - 1)..edge(part.number)
    }

    /// Positions of a shard's images in the order.
    pub(super) fn shard(&self, shard: u64) -> Range<u64> {
        match &self.cut {
            Cut::Every(samples) => {
                shard * samples..(shard + 1).saturating_mul(*samples).min(self.images)
            }
            Cut::At(starts) => {
                let at = shard as usize;
                starts[at]..starts.get(at + 1).copied().unwrap_or(self.images)
            }
        }
    }

    /// The image at a position of the order.
    pub(super) fn entry(&self, position: u64) -> usize {
        self.shuffle.map_or(position, |shuffle| shuffle.at(position)) as usize
    }
}
