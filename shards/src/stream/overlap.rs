//! What is legal in a data set, and seldom meant: sets that are read as one and hold the same images,
//! samples with several pictures.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::Shard;
use crate::format::manifest::{Manifest, ShardRecord};

/// The checksums of images in manifests, for comparison.
#[derive(Default)]
pub(super) struct Overlap {
    /// Manifests in the order in which they came.
    manifests: Vec<PathBuf>,
    /// By digest: the manifest and the name of a shard.
    shards: HashMap<String, (usize, String)>,
    /// Two names of one shard.
    twice: Option<(PathBuf, PathBuf)>,
    /// By the checksums of neighbouring samples: the manifest that has them.
    images: HashMap<u64, usize>,
    /// Images of a manifest that another has too, by the two of them.
    shared: HashMap<(usize, usize), u64>,
    total: u64,
}

impl Overlap {
    /// Adds a manifest with its shards.
    pub(super) fn add<'a>(&mut self, path: &Path, shards: impl Iterator<Item = &'a ShardRecord>) {
        let number = self.manifests.len();
        self.manifests.push(path.to_path_buf());
        for record in shards {
            let here = path.with_file_name(&record.name);
            match self.shards.get(&record.sha256) {
                Some((other, name)) => {
                    let there = self.manifests[*other].with_file_name(name);
                    self.twice.get_or_insert((there, here));
                }
                None => {
                    self.shards.insert(record.sha256.clone(), (number, record.name.clone()));
                }
            }
            self.images(number, record);
        }
    }

    /// Compares images by the CRC-32C of their files. Between two sets of a million a few hundred agree by
    /// chance, so only a larger share counts.
    fn images(&mut self, number: usize, record: &ShardRecord) {
        let each = record.members.checked_div(record.samples).unwrap_or(0).max(1);
        for sample in 0..record.samples {
            let member = usize::try_from(sample.saturating_mul(each)).unwrap_or(usize::MAX);
            let Some(sum) = Manifest::crc_of(record, member) else { break };
            self.total += 1;
            let first = *self.images.entry(u64::from(sum)).or_insert(number);
            if first != number {
                *self.shared.entry((first, number)).or_default() += 1;
            }
        }
    }
}

/// Share of common images from which on a warning is given.
const SHARE_MIN: f64 = 0.002;

/// The warning, if there is one.
pub(super) fn found(overlap: Overlap) -> Option<String> {
    let Overlap { manifests, twice, shared, total, .. } = overlap;
    if let Some((one, other)) = twice {
        return Some(format!(
            "{} and {} are the same shard: its images count twice",
            one.display(),
            other.display()
        ));
    }
    let ((one, other), count) = shared.into_iter().max_by_key(|(pair, count)| (*count, *pair))?;
    let enough = count as f64 >= (total as f64 * SHARE_MIN).max(1.0);
    enough.then(|| {
        let images = if count == 1 { "image".to_owned() } else { format!("{count} images") };
        format!(
            "{} and {} have the same {images}, by checksums: what both hold counts twice",
            manifests[one].display(),
            manifests[other].display()
        )
    })
}

/// Samples with more pictures than the one that is read, if there are any.
pub(super) fn several(shards: &[Shard]) -> Option<String> {
    let mut found = shards.iter().filter_map(|shard| Some((shard, shard.table.several()?)));
    let (shard, (mut count, key, taken, other)) = found.next()?;
    count += found.map(|(_, (more, ..))| more).sum::<u64>();
    let samples = if count == 1 { "1 sample has".into() } else { format!("{count} samples have") };
    Some(format!(
        "{samples} several pictures, one of which is read: of `{key}` in {} the .{taken}, not the \
         .{other}",
        shard.path().display()
    ))
}
