//! Counters of the data path: where the time of each worker and of the consumer goes.
//!
//! Each worker writes to a cache line of its own, so counting costs no contention; reading adds the
//! lines up.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What a worker's time goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Waiting for the next sample: upstream, or the end of free slabs, is slow.
    Get,
    /// Finding the sample in its shard, page faults of the first touch included.
    Read,
    /// JPEG to RGB.
    Decode,
    /// Drawing and rendering the views.
    Views,
    /// Handing a finished batch on: downstream is slow.
    Put,
}

/// All stages, in the order of a sample's way.
pub const STAGES: [Stage; 5] = [Stage::Get, Stage::Read, Stage::Decode, Stage::Views, Stage::Put];

/// One worker's counters, alone on their cache lines (128 bytes: adjacent lines are prefetched in
/// pairs).
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct WorkerStats {
    nanos: [AtomicU64; STAGES.len()],
    samples: AtomicU64,
    bytes: AtomicU64,
}

impl WorkerStats {
    /// Adds time to a stage.
    pub fn time(&self, stage: Stage, spent: Duration) {
        self.nanos[stage as usize].fetch_add(spent.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Counts a finished sample of `bytes` compressed bytes.
    pub fn sample(&self, bytes: usize) {
        self.samples.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// Counters of a loader.
#[derive(Debug)]
pub struct Stats {
    workers: Box<[WorkerStats]>,
    consumer: AtomicU64,
    dispatcher: AtomicU64,
}

/// The counters at one moment, added up over the workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Nanoseconds by stage, in the order of [`STAGES`].
    pub nanos: [u64; STAGES.len()],
    /// Samples finished.
    pub samples: u64,
    /// Compressed bytes of those.
    pub bytes: u64,
    /// Nanoseconds that the consumer waited for a batch.
    pub consumer_nanos: u64,
    /// Nanoseconds that the dispatcher waited for a free slab: the consumer is slower.
    pub dispatcher_nanos: u64,
}

impl Stats {
    /// Counters for this many workers.
    pub fn new(workers: usize) -> Stats {
        let workers = (0..workers).map(|_| WorkerStats::default()).collect();
        Stats { workers, consumer: AtomicU64::new(0), dispatcher: AtomicU64::new(0) }
    }

    /// The counters of one worker.
    pub fn worker(&self, worker: usize) -> &WorkerStats {
        &self.workers[worker]
    }

    /// Adds time that the consumer waited for a batch.
    pub fn consumer_waited(&self, spent: Duration) {
        self.consumer.fetch_add(spent.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Adds time that the dispatcher waited for a free slab.
    pub fn dispatcher_waited(&self, spent: Duration) {
        self.dispatcher.fetch_add(spent.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Adds the workers up.
    pub fn snapshot(&self) -> Snapshot {
        let mut sum = Snapshot {
            consumer_nanos: self.consumer.load(Ordering::Relaxed),
            dispatcher_nanos: self.dispatcher.load(Ordering::Relaxed),
            ..Snapshot::default()
        };
        for worker in &self.workers {
            for (total, part) in sum.nanos.iter_mut().zip(&worker.nanos) {
                *total += part.load(Ordering::Relaxed);
            }
            sum.samples += worker.samples.load(Ordering::Relaxed);
            sum.bytes += worker.bytes.load(Ordering::Relaxed);
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_add_up() {
        let stats = Stats::new(2);
        stats.worker(0).time(Stage::Decode, Duration::from_nanos(5));
        stats.worker(1).time(Stage::Decode, Duration::from_nanos(7));
        stats.worker(1).sample(100);
        stats.consumer_waited(Duration::from_nanos(3));
        let sum = stats.snapshot();
        assert_eq!(sum.nanos[Stage::Decode as usize], 12);
        assert_eq!((sum.samples, sum.bytes, sum.consumer_nanos), (1, 100, 3));
    }

    #[test]
    fn stages_index_their_own_counter() {
        for (i, stage) in STAGES.iter().enumerate() {
            assert_eq!(*stage as usize, i);
        }
    }
}
