//! The windows of a windowed shuffle.

use std::ops::Range;

use super::{mix, permute};

/// The windows of a windowed shuffle.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Windows {
    /// Number of the first sample of each shard, and of the sample after the last shard.
    pub(super) first: Vec<u64>,
    /// Shards of a window; the last may have fewer.
    pub(super) shards: usize,
}

impl Windows {
    fn samples(&self, shard: u32) -> u64 {
        self.first[shard as usize + 1] - self.first[shard as usize]
    }
}

/// The windows of one epoch.
#[derive(Debug)]
pub(super) struct EpochWindows<'a> {
    windows: &'a Windows,
    key: u64,
    /// The shards in their order, windows one after the other.
    pub(super) shards: Vec<u32>,
    /// The position of the first sample of each window, and the number of all samples.
    pub(super) starts: Vec<u64>,
}

impl<'a> EpochWindows<'a> {
    pub(super) fn new(windows: &'a Windows, key: u64) -> EpochWindows<'a> {
        let shards = (windows.first.len() - 1) as u64;
        let key_of_shards = mix(key ^ 0x5348_4152_4453); // its own stream: "SHARDS"
        let shards: Vec<u32> =
            (0..shards).map(|place| permute(place, shards, key_of_shards) as u32).collect();
        let mut starts = vec![0];
        for window in shards.chunks(windows.shards) {
            let samples: u64 = window.iter().map(|shard| windows.samples(*shard)).sum();
            starts.push(starts[starts.len() - 1] + samples);
        }
        EpochWindows { windows, key, shards, starts }
    }

    /// The window that a position lies in.
    pub(super) fn window_at(&self, position: u64) -> usize {
        // At least 1, since the first starts at 0; a window of empty shards has no position.
        self.starts.partition_point(|start| *start <= position) - 1
    }

    /// Its places in `shards`.
    pub(super) fn range(&self, window: usize) -> Range<usize> {
        let size = self.windows.shards;
        window * size..((window + 1) * size).min(self.shards.len())
    }

    pub(super) fn samples(&self, window: usize) -> u64 {
        self.starts[window + 1] - self.starts[window]
    }

    pub(super) fn key(&self, window: usize) -> u64 {
        mix(self.key ^ mix(window as u64))
    }

    /// The sample with this number inside a window, below [`EpochWindows::samples`].
    pub(super) fn local(&self, window: usize, mut number: u64) -> u64 {
        for shard in &self.shards[self.range(window)] {
            let samples = self.windows.samples(*shard);
            if number < samples {
                return self.windows.first[*shard as usize] + number;
            }
            number -= samples;
        }
        unreachable!("a number beyond the window's samples")
    }
}
