//! Counters of the data path: where the time of each worker, of the dispatcher and of the consumer
//! goes, and how long they wait at each channel.
//!
//! Each thread writes to cache lines of its own with relaxed atomics, so counting takes no lock and
//! meets no contention; reading adds the lines up. The costliest part is the system call that asks
//! for a thread's CPU time, four times a sample.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// What a worker's time goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Waiting for the next sample: the dispatcher is slow, or slabs come back too slowly.
    Get,
    /// Finding the sample in its shard and touching its pages, which waits for the disk.
    Read,
    /// JPEG to RGB.
    Decode,
    /// Drawing and rendering the views.
    Views,
    /// Handing on a finished batch, which waits for a slow consumer.
    Put,
}

/// All stages, in the order of a sample's way.
pub const STAGES: [Stage; 5] = [Stage::Get, Stage::Read, Stage::Decode, Stage::Views, Stage::Put];

impl Stage {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Get => "get",
            Stage::Read => "read",
            Stage::Decode => "decode",
            Stage::Views => "views",
            Stage::Put => "put",
        }
    }
}

/// The channels between the threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    /// Samples to be made, from the dispatcher to the workers.
    Tasks,
    /// Finished batches, from the workers to the consumer.
    Batches,
    /// Free slabs, from the consumer back to the dispatcher.
    Slabs,
}

/// All channels, in the order of a batch's way.
pub const CHANNELS: [Channel; 3] = [Channel::Tasks, Channel::Batches, Channel::Slabs];

impl Channel {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Channel::Tasks => "tasks",
            Channel::Batches => "batches",
            Channel::Slabs => "slabs",
        }
    }
}

/// A moment in wall time and in the CPU time of the calling thread.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    /// Wall time.
    pub wall: Instant,
    /// Nanoseconds of CPU that this thread has used.
    pub cpu: u64,
}

impl Mark {
    /// Now, on the calling thread.
    pub fn now() -> Mark {
        let cpu = clock_gettime(ClockId::ThreadCPUTime);
        // Neither is negative: the clock starts with the thread.
        let cpu = cpu.tv_sec as u64 * 1_000_000_000 + cpu.tv_nsec as u64;
        Mark { wall: Instant::now(), cpu }
    }
}

/// Buckets of a histogram: four an octave, up to two minutes.
const BUCKETS: usize = 4 * 36;

/// The bucket of a time in nanoseconds: exact below 4, then the two bits after the leading one.
fn bucket(nanos: u64) -> usize {
    if nanos < 4 {
        return nanos as usize;
    }
    let octave = 63 - nanos.leading_zeros() as usize;
    let quarter = (nanos >> (octave - 2)) as usize & 3;
    ((octave - 1) * 4 + quarter).min(BUCKETS - 1)
}

/// The least time that falls into a bucket, in nanoseconds.
fn least(bucket: usize) -> u64 {
    match bucket {
        0..4 => bucket as u64,
        _ => ((4 + bucket % 4) as u64) << (bucket / 4 - 1),
    }
}

/// The waits of one thread at one end of a channel.
#[derive(Debug)]
pub struct WaitCounter {
    buckets: [AtomicU64; BUCKETS],
    nanos: AtomicU64,
    /// Items in the channel at each wait, added up.
    found: AtomicU64,
}

impl Default for WaitCounter {
    fn default() -> WaitCounter {
        let buckets = [const { AtomicU64::new(0) }; BUCKETS];
        WaitCounter { buckets, nanos: AtomicU64::new(0), found: AtomicU64::new(0) }
    }
}

impl WaitCounter {
    /// Counts one wait that began with `found` items in the channel.
    pub fn waited(&self, spent: Duration, found: usize) {
        let nanos = spent.as_nanos() as u64;
        self.buckets[bucket(nanos)].fetch_add(1, Ordering::Relaxed);
        self.nanos.fetch_add(nanos, Ordering::Relaxed);
        self.found.fetch_add(found as u64, Ordering::Relaxed);
    }

    pub(crate) fn add_to(&self, sum: &mut Waits) {
        for (total, part) in sum.buckets.iter_mut().zip(&self.buckets) {
            *total += part.load(Ordering::Relaxed);
        }
        sum.nanos += self.nanos.load(Ordering::Relaxed);
        sum.found += self.found.load(Ordering::Relaxed);
    }
}

/// The waits of all threads at one end of a channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waits {
    buckets: Vec<u64>,
    /// Nanoseconds of all waits together.
    pub nanos: u64,
    /// Items in the channel when a wait began, added up.
    pub found: u64,
}

impl Default for Waits {
    fn default() -> Waits {
        Waits { buckets: vec![0; BUCKETS], nanos: 0, found: 0 }
    }
}

impl Waits {
    /// How many there were.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The time, in nanoseconds, that a share `q` (0 to 1) of the waits did not exceed: the middle
    /// of its bucket, an eighth off at most. 0 without waits.
    pub fn quantile(&self, q: f64) -> u64 {
        let rank = (self.count() as f64 * q).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (at, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return least(at).midpoint(least(at + 1) - 1);
            }
        }
        0
    }

    /// The buckets that hold something: from, to (exclusive, in nanoseconds), and how many.
    pub fn filled(&self) -> impl Iterator<Item = (u64, u64, u64)> {
        let all = self.buckets.iter().enumerate();
        all.filter(|(_, count)| **count > 0).map(|(at, count)| (least(at), least(at + 1), *count))
    }

    pub(crate) fn since(&self, earlier: &Waits) -> Waits {
        let buckets = self.buckets.iter().zip(&earlier.buckets).map(|(a, b)| a - b).collect();
        Waits { buckets, nanos: self.nanos - earlier.nanos, found: self.found - earlier.found }
    }
}

/// One worker's counters, alone on their cache lines (128 bytes: adjacent lines are prefetched in
/// pairs).
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct WorkerStats {
    nanos: [AtomicU64; STAGES.len()],
    cpu_nanos: [AtomicU64; STAGES.len()],
    samples: AtomicU64,
    bytes: AtomicU64,
    get: WaitCounter,
    put: WaitCounter,
}

impl WorkerStats {
    /// Adds the time since a mark to a stage and returns the new mark. Called by the worker itself, since the
    /// mark holds its own CPU time.
    pub fn lap(&self, stage: Stage, since: Mark) -> Mark {
        let now = Mark::now();
        let wall = now.wall.duration_since(since.wall);
        self.nanos[stage as usize].fetch_add(wall.as_nanos() as u64, Ordering::Relaxed);
        self.cpu_nanos[stage as usize]
            .fetch_add(now.cpu.saturating_sub(since.cpu), Ordering::Relaxed);
        now
    }

    /// Its waits for a task.
    pub fn get(&self) -> &WaitCounter {
        &self.get
    }

    /// Its waits for room for a finished batch.
    pub fn put(&self) -> &WaitCounter {
        &self.put
    }

    /// Counts a finished sample of `bytes` compressed bytes.
    pub fn sample(&self, bytes: usize) {
        self.samples.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// The waits of the dispatcher or the consumer at the two channels between which it stands.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct EndStats {
    /// Its waits for an item.
    pub get: WaitCounter,
    /// Its waits for room.
    pub put: WaitCounter,
}

/// Counters of a loader.
#[derive(Debug)]
pub struct Stats {
    workers: Box<[WorkerStats]>,
    dispatcher: EndStats,
    consumer: EndStats,
    /// Nanoseconds that the dispatcher waited for remote shards.
    shard_nanos: AtomicU64,
}

/// Both ends of a channel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChannelWaits {
    /// Waits for room. `found` is not counted.
    pub put: Waits,
    /// Waits for an item.
    pub get: Waits,
}

impl ChannelWaits {
    /// Items in the channel as a get found it, on average.
    pub fn occupancy(&self) -> f64 {
        self.get.found as f64 / self.get.count().max(1) as f64
    }
}

/// The counters at one moment, added up over the workers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Nanoseconds by stage, in the order of [`STAGES`].
    pub nanos: [u64; STAGES.len()],
    /// CPU nanoseconds by stage.
    pub cpu_nanos: [u64; STAGES.len()],
    /// Finished samples.
    pub samples: u64,
    /// Compressed bytes of those.
    pub bytes: u64,
    /// Waits at each channel, in the order of [`CHANNELS`].
    pub channels: [ChannelWaits; CHANNELS.len()],
    /// Nanoseconds that the dispatcher waited for remote shards.
    pub shard_nanos: u64,
}

impl Snapshot {
    /// What was counted since an earlier snapshot of the same loader.
    pub fn since(&self, earlier: &Snapshot) -> Snapshot {
        let less = |a: &[u64; 5], b: &[u64; 5]| std::array::from_fn(|i| a[i] - b[i]);
        Snapshot {
            nanos: less(&self.nanos, &earlier.nanos),
            cpu_nanos: less(&self.cpu_nanos, &earlier.cpu_nanos),
            samples: self.samples - earlier.samples,
            bytes: self.bytes - earlier.bytes,
            shard_nanos: self.shard_nanos - earlier.shard_nanos,
            channels: std::array::from_fn(|i| {
                let (now, then) = (&self.channels[i], &earlier.channels[i]);
                ChannelWaits { put: now.put.since(&then.put), get: now.get.since(&then.get) }
            }),
        }
    }

    /// The waits at one channel.
    pub fn channel(&self, channel: Channel) -> &ChannelWaits {
        &self.channels[channel as usize]
    }

    /// Nanoseconds that the consumer waited for a batch.
    pub fn consumer_nanos(&self) -> u64 {
        self.channel(Channel::Batches).get.nanos
    }

    /// Nanoseconds that the dispatcher waited: for a free slab, for room among the tasks, or for a
    /// remote shard.
    pub fn dispatcher_nanos(&self) -> u64 {
        let channels =
            self.channel(Channel::Slabs).get.nanos + self.channel(Channel::Tasks).put.nanos;
        channels + self.shard_nanos
    }
}

impl Stats {
    /// Counters for this many workers.
    pub fn new(workers: usize) -> Stats {
        let workers = (0..workers).map(|_| WorkerStats::default()).collect();
        let (dispatcher, consumer) = (EndStats::default(), EndStats::default());
        Stats { workers, dispatcher, consumer, shard_nanos: AtomicU64::new(0) }
    }

    /// The number of workers.
    pub fn workers(&self) -> usize {
        self.workers.len()
    }

    /// The counters of one worker.
    pub fn worker(&self, worker: usize) -> &WorkerStats {
        &self.workers[worker]
    }

    /// The dispatcher's waits: for a free slab, and for room among the tasks.
    pub fn dispatcher(&self) -> &EndStats {
        &self.dispatcher
    }

    /// The consumer's waits: for a batch, and for room to give its slab back.
    pub fn consumer(&self) -> &EndStats {
        &self.consumer
    }

    /// Samples finished so far.
    pub fn samples(&self) -> u64 {
        self.workers.iter().map(|worker| worker.samples.load(Ordering::Relaxed)).sum()
    }

    /// Counts a wait of the dispatcher for a shard that is being fetched.
    pub fn shard_waited(&self, spent: Duration) {
        self.shard_nanos.fetch_add(spent.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Adds the workers up.
    pub fn snapshot(&self) -> Snapshot {
        let mut sum = Snapshot::default();
        let [tasks, batches, slabs] = &mut sum.channels;
        for worker in &self.workers {
            let add = |total: &mut [u64; 5], parts: &[AtomicU64; 5]| {
                for (total, part) in total.iter_mut().zip(parts) {
                    *total += part.load(Ordering::Relaxed);
                }
            };
            add(&mut sum.nanos, &worker.nanos);
            add(&mut sum.cpu_nanos, &worker.cpu_nanos);
            sum.samples += worker.samples.load(Ordering::Relaxed);
            sum.bytes += worker.bytes.load(Ordering::Relaxed);
            worker.get.add_to(&mut tasks.get);
            worker.put.add_to(&mut batches.put);
        }
        self.dispatcher.get.add_to(&mut slabs.get);
        self.dispatcher.put.add_to(&mut tasks.put);
        self.consumer.get.add_to(&mut batches.get);
        self.consumer.put.add_to(&mut slabs.put);
        sum.shard_nanos = self.shard_nanos.load(Ordering::Relaxed);
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_add_up() {
        let stats = Stats::new(2);
        for worker in 0..2 {
            let since = Mark::now();
            std::thread::sleep(Duration::from_millis(3));
            stats.worker(worker).lap(Stage::Decode, since);
        }
        stats.worker(1).sample(100);
        stats.worker(0).get().waited(Duration::from_nanos(40), 3);
        stats.worker(1).get().waited(Duration::from_nanos(60), 4);
        let before = stats.snapshot();
        stats.consumer().get.waited(Duration::from_nanos(3), 0);
        let sum = stats.snapshot();
        assert!(sum.nanos[Stage::Decode as usize] >= 6_000_000);
        assert!(sum.cpu_nanos[Stage::Decode as usize] < 6_000_000, "sleeping takes no CPU");
        assert_eq!((sum.samples, sum.bytes, sum.consumer_nanos()), (1, 100, 3));
        let tasks = sum.channel(Channel::Tasks);
        assert_eq!((tasks.get.count(), tasks.get.nanos), (2, 100));
        assert_eq!(tasks.occupancy(), 3.5);
        let since = sum.since(&before);
        assert_eq!((since.samples, since.consumer_nanos()), (0, 3));
        assert_eq!(since.channel(Channel::Batches).get.count(), 1);
    }

    #[test]
    fn a_working_thread_has_cpu_time() {
        let since = Mark::now();
        let start = Instant::now();
        // However little of a core a shared machine gives a thread.
        while Mark::now().cpu - since.cpu < 2_000_000 {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "a minute of spinning, not 2 ms of CPU"
            );
            std::hint::spin_loop();
        }
        assert!(Mark::now().wall - since.wall >= Duration::from_millis(1));
    }

    #[test]
    fn stages_and_channels_index_their_own_counter() {
        for (i, stage) in STAGES.iter().enumerate() {
            assert_eq!(*stage as usize, i);
        }
        for (i, channel) in CHANNELS.iter().enumerate() {
            assert_eq!(*channel as usize, i);
        }
    }

    #[test]
    fn buckets_tile_all_times() {
        for at in 0..BUCKETS - 1 {
            assert!(least(at) < least(at + 1));
            assert_eq!((bucket(least(at)), bucket(least(at + 1) - 1)), (at, at));
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
        // A bucket is a quarter of an octave, so its middle is an eighth off at most.
        for at in 4..BUCKETS - 1 {
            let (from, to) = (least(at) as f64, least(at + 1) as f64);
            assert!(to / from <= 1.25, "{from} to {to}");
        }
    }

    #[test]
    fn quantiles_are_an_eighth_off_at_most() {
        let counter = WaitCounter::default();
        for micros in 1..=1000 {
            counter.waited(Duration::from_micros(micros), 0);
        }
        let mut waits = Waits::default();
        counter.add_to(&mut waits);
        for (q, exact) in [(0.5, 500e3), (0.9, 900e3), (0.99, 990e3), (0.0, 1e3)] {
            let found = waits.quantile(q) as f64;
            assert!((found / exact - 1.0).abs() <= 0.125, "{q}: {found} for {exact}");
        }
        assert_eq!(Waits::default().quantile(0.5), 0);
        assert_eq!(waits.filled().map(|(_, _, count)| count).sum::<u64>(), 1000);
    }
}
