//! The table `data` of a configuration to shards that are open, and to the order they are read in.

use std::fmt;
use std::path::{Path, PathBuf};

use detco_shards::decode::probe;
use detco_shards::format::ShardError;
use detco_shards::order::{Order, OrderError};
use detco_shards::pipeline::OnBadSample;
use detco_shards::stream::ShardSet;
use detco_shards::stream::remote::RemoteOptions;
use indicatif::{HumanBytes, HumanCount};
use thiserror::Error;

use crate::config::{Bytes, Config, Data, Schedule, Window, cache_folder, store_environment};
use crate::schedule::{only_filling, steps_in_all, steps_to_fill};

/// Why data cannot be read as it is configured.
#[derive(Debug, Error)]
pub enum DataError {
    /// The window does not fit the cache.
    #[error(
        "data.window = {window} needs {} in the cache at once, data.cache_size is {}",
        HumanBytes(*needed), HumanBytes(*room)
    )]
    Window {
        /// As configured.
        window: String,
        /// Bytes that it needs.
        needed: u64,
        /// Bytes that there may be.
        room: u64,
    },
    /// No order.
    #[error("{0} (train.batch)")]
    Order(#[from] OrderError),
}

/// How URLs are reached by this configuration.
pub fn remote(data: &Data) -> RemoteOptions {
    let folder = data.cache.clone().unwrap_or_else(cache_folder);
    RemoteOptions { fetches: data.fetches, ..remote_in(&folder, data.cache_size) }
}

/// How URLs are reached with a cache in this folder.
pub fn remote_in(folder: &Path, size: Bytes) -> RemoteOptions {
    RemoteOptions {
        environment: store_environment(),
        notice: Some(|text| note!("{text}")),
        ..RemoteOptions::new(folder, size.0)
    }
}

/// Opens shards by this configuration. Where bad samples end a run (`data.on_bad_sample = "fail"`),
/// those that are known when the shards are opened end it here.
///
/// # Errors
/// As [`ShardSet::open_with`]; the first bad sample.
pub fn open(spec: &[String], data: &Data) -> Result<ShardSet, ShardError> {
    let set = ShardSet::open_with(spec, Some(&remote(data)))?;
    match data.on_bad_sample {
        OnBadSample::Fail => set.first_bad().map_or(Ok(set), Err),
        OnBadSample::Skip => Ok(set),
    }
}

/// Indexes lie in the cache too: a thousandth of their shards, a fiftieth of very small ones.
const INDEXES: u64 = 50;

/// What a window comes to for these shards: never [`Window::Auto`]. Local shards are all here. Of
/// others, a true shuffle reads all at once, so all must fit the cache; a windowed one reads two
/// windows at once where a batch spans them, and one shard more is on its way.
///
/// # Errors
/// The cache has no room for it.
pub fn window(window: Window, set: &ShardSet) -> Result<Window, DataError> {
    let Some(bound) = set.room() else {
        return Ok(if window == Window::Auto { Window::All } else { window });
    };
    let mut sizes: Vec<u64> = set.shards().iter().map(|shard| shard.bytes()).collect();
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    let room = bound - bound / INDEXES;
    let largest = |shards: usize| sizes.iter().take(shards).sum::<u64>();
    let fits = |shards: usize| largest(2 * shards + 1) <= room || largest(sizes.len()) <= room;
    let fail = |window: String, needed| DataError::Window { window, needed, room: bound };
    match window {
        Window::All if largest(sizes.len()) > room => Err(fail("all".into(), largest(sizes.len()))),
        Window::Shards(shards) if !fits(shards as usize) => {
            Err(fail(shards.to_string(), largest(2 * shards as usize + 1)))
        }
        Window::Auto if largest(sizes.len()) <= room => Ok(Window::All),
        Window::Auto => {
            // The largest that fits: `fits` holds up to some number and not beyond.
            let most = (1..=sizes.len()).take_while(|shards| fits(*shards)).last();
            let most = most.ok_or_else(|| fail("auto".into(), largest(3)))?;
            Ok(Window::Shards(most as u32))
        }
        window => Ok(window),
    }
}

/// The order that training reads in, with a window as [`window`] returned it.
///
/// # Errors
/// Too few samples for a batch.
pub fn order(window: Window, set: &ShardSet, batch: u64, seed: u64) -> Result<Order, DataError> {
    let shards: Vec<u64> = set.shards().iter().map(|shard| shard.samples()).collect();
    Ok(match window {
        Window::Shards(window) => Order::windowed(&shards, window as usize, batch, seed)?,
        Window::Auto | Window::All => Order::shuffled(set.len(), batch, seed)?,
    })
}

/// What is legal and probably not meant, each in a sentence.
pub fn oddities(config: &Config, set: &ShardSet, order: &Order) -> Vec<String> {
    let mut all = Vec::new();
    let (samples, queue) = (set.len(), config.design().queue);
    if queue as u64 > samples {
        all.push(format!(
            "method.queue = {queue} keys are more than the {} samples: each sample meets its own earlier keys as \
             negatives",
            HumanCount(samples)
        ));
    }
    let steps = steps_in_all(config, order.steps_per_epoch());
    if steps_to_fill(config) >= steps {
        all.push(format!(
            "{}, no weight changes: lower method.queue, set method.fill_first = false, or train longer",
            only_filling(steps)
        ));
    }
    let (optim, epochs) = (&config.optim, config.train.epochs);
    let late = optim.milestones.iter().filter(|at| **at >= epochs).count();
    if optim.schedule == Schedule::Steps && late > 0 {
        let milestones = &optim.milestones;
        all.push(format!(
            "optim.milestones = {milestones:?}: {late} of them come after the {epochs} epochs of train.epochs"
        ));
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let workers = config.data.workers;
    if workers > 4 * cores {
        all.push(format!("data.workers = {workers} threads decode on {cores} cores"));
    }
    all
}

/// A sample whose image cannot be used, by its header or its place in the shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadHeader {
    /// The shard.
    pub shard: PathBuf,
    /// The sample's id in it.
    pub key: String,
    /// Where its image begins, in bytes.
    pub offset: u64,
    /// What is wrong.
    pub reason: String,
}

impl fmt::Display for BadHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let BadHeader { shard, key, offset, reason } = self;
        write!(f, "{}: sample {key:?} at byte {offset}: {reason}", shard.display())
    }
}

/// The first sample whose header says that it cannot be decoded, among `most` that are spread evenly over local
/// shards. Others are not fetched for this.
pub fn first_bad_header(set: &ShardSet, most: u64) -> Option<BadHeader> {
    let headers = if set.is_remote() { 0 } else { most.min(set.len()) };
    (0..headers).find_map(|number| {
        let id = (u128::from(number) * u128::from(set.len()) / u128::from(headers)) as u64;
        let reason = match set.sample(id) {
            Ok(sample) => probe(sample.jpeg()).err()?.to_string(),
            Err(error) => error.to_string(),
        };
        let (shard, key, offset) = set.place(id)?;
        Some(BadHeader { shard: shard.to_path_buf(), key: key.to_string(), offset, reason })
    })
}
