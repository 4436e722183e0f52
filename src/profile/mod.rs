//! Profiling: measures the data path as it runs in training and names the bottleneck.
//!
//! [`measure`] runs the loader itself, with its threads, slabs and channels, before a consumer that
//! takes each batch at once or at the speed of a trainer; [`verdict`] turns the counters into a
//! bottleneck and a number to act on; [`training`] writes the same counters from a training run and
//! reads them back. Needs no libtorch.

pub mod allocations;
pub mod cache;
pub mod flops;
pub mod html;
pub mod machine;
pub mod measure;
pub mod ops;
pub mod timeline;
pub mod training;
pub mod verdict;

use std::collections::BTreeMap;
use std::path::PathBuf;

use detco_shards::device::Counts;
use detco_shards::stats::{CHANNELS, STAGES, Snapshot, Waits};
use serde::Serialize;

use machine::Machine;
use verdict::{Evidence, Verdict};

/// Version of the report's JSON form.
pub const VERSION: u32 = 1;

/// The result of a profile.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// [`VERSION`].
    pub version: u32,
    /// The program's version.
    pub detco: &'static str,
    /// What was profiled.
    pub data: Data,
    /// The machine; `None` for a training run, which may have run elsewhere.
    pub machine: Option<Machine>,
    /// The settings.
    pub settings: Settings,
    /// A measurement for each number of workers.
    pub runs: Vec<Run>,
    /// The verdict on the run with the most images/s.
    pub verdict: Verdict,
    /// Warnings about training with these settings, a sentence each: refusals, bad samples.
    pub warnings: Vec<String>,
}

/// The profiled data.
#[derive(Clone, Debug, Serialize)]
pub struct Data {
    /// As the user named it.
    pub spec: Vec<String>,
    /// The folder of the training run, if it was one.
    pub run: Option<PathBuf>,
    /// How much was read; unknown for a training run.
    pub size: Option<Size>,
}

/// The amount of data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Size {
    /// Shards that were read: all, or as many as fit the page cache.
    pub shards: u64,
    /// Shards that there are.
    pub shards_of: u64,
    /// Samples of those that were read.
    pub samples: u64,
    /// Bytes of those.
    pub bytes: u64,
}

/// The settings of a profile.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Settings {
    /// What is done with each sample: `read`, `decode`, `supervised`, `detco`; `train` for a run.
    pub mode: String,
    /// The recipe's name or file.
    pub recipe: String,
    /// Samples of a batch.
    pub batch: u64,
    /// Whether the page cache was emptied before each run.
    pub cold: bool,
    /// Length of each measurement in seconds.
    pub seconds: f64,
    /// Length of the warm-up in seconds.
    pub warm_up: f64,
    /// Images a second that the simulated consumer could take.
    pub consumer_images_per_s: Option<f64>,
    /// The simulated device's speed in GFLOP/s, and what an image costs it in GFLOP.
    pub consumer_gflops: Option<[f64; 2]>,
}

/// One measurement.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// As in [`Settings::mode`].
    pub mode: String,
    /// Threads that read, decode and render.
    pub workers: usize,
    /// Length of the measured time.
    pub seconds: f64,
    /// Images finished in it.
    pub images: u64,
    /// Images a second: finished by the workers, or taken by a simulated consumer that hardly had
    /// to wait (what was finished goes up and down by whole batches then).
    pub images_per_s: f64,
    /// Compressed megabytes a second.
    pub megabytes_per_s: f64,
    /// Finished images/s in equal parts of the measured time, in order.
    pub windows: Vec<f64>,
    /// Images a second over time, warm-up included: seconds since the measured time began, images a
    /// second since the entry before.
    pub series: Vec<[f64; 2]>,
    /// The workers' time by stage.
    pub stages: BTreeMap<&'static str, StageTime>,
    /// Microseconds an image by operation of the views, measured apart (see [`ops`]).
    pub ops: BTreeMap<String, f64>,
    /// The waits at each channel.
    pub channels: BTreeMap<&'static str, ChannelTimes>,
    /// Page faults of the process.
    pub page_faults: PageFaults,
    /// Bytes read from disks, read-ahead included.
    pub disk_bytes: u64,
    /// Allocations of the process an image; `None` where they are not counted.
    pub allocations_per_image: Option<f64>,
    /// The recycled buffers.
    pub slabs: Slabs,
    /// The consumer's side.
    pub consumer: ConsumerTime,
    /// Share of its time that the dispatcher worked, 0 to 1.
    pub dispatcher_busy: f64,
    /// What was fetched from URLs meanwhile; `None` for local shards.
    pub fetched: Option<Fetched>,
    /// Samples that could not be used and were replaced, warm-up included: each counts once, however often it
    /// was drawn.
    pub bad_samples: u64,
    /// The first of them, with the reason.
    pub bad_first: Option<String>,
    /// The decoder, and what `auto` did not find for a GPU; empty for a training run.
    pub decoding: String,
    /// Images by decoder, and the hardware's share, where a GPU decodes.
    pub decoded: Option<Counts>,
    /// What limits this run.
    pub verdict: Verdict,
}

/// A stage of the workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct StageTime {
    /// Milliseconds on a CPU an image.
    pub cpu_ms_per_image: f64,
    /// Milliseconds an image.
    pub wall_ms_per_image: f64,
    /// Share of the workers' time, 0 to 1.
    pub share: f64,
}

/// Both ends of a channel.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ChannelTimes {
    /// Waits for room.
    pub put: Percentiles,
    /// Waits for an item.
    pub get: Percentiles,
    /// Items in the channel as a get found it, on average.
    pub occupancy: f64,
    /// Items it can hold.
    pub capacity: usize,
}

/// Waits in microseconds; a quantile is an eighth off at most.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Percentiles {
    /// How many there were.
    pub count: u64,
    /// Half were at most this long.
    pub p50: f64,
    /// Nine of ten were.
    pub p90: f64,
    /// 99 of 100 were.
    pub p99: f64,
    /// The histogram: from and to in microseconds, and how many.
    pub histogram: Vec<(f64, f64, u64)>,
}

impl From<&Waits> for Percentiles {
    fn from(waits: &Waits) -> Percentiles {
        let micros = |nanos: u64| nanos as f64 / 1e3;
        let at = |q: f64| micros(waits.quantile(q));
        let histogram = waits.filled().map(|(from, to, n)| (micros(from), micros(to), n)).collect();
        Percentiles { count: waits.count(), p50: at(0.5), p90: at(0.9), p99: at(0.99), histogram }
    }
}

/// Page faults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PageFaults {
    /// Those that waited for a disk.
    pub major: u64,
    /// Those that did not.
    pub minor: u64,
}

/// The recycled buffers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Slabs {
    /// How many circulate.
    pub count: usize,
    /// Bytes of one.
    pub bytes: usize,
    /// Batches in the measured time that went into a slab used before.
    pub reuses: u64,
}

/// What was fetched from URLs.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Fetched {
    /// Megabytes received per second.
    pub megabytes_per_s: f64,
    /// Shards fetched completely.
    pub shards: u64,
    /// Failed attempts, which were repeated.
    pub failures: u64,
    /// Fetches at a time, on average.
    pub at_a_time: f64,
    /// Share of its time that the dispatcher waited for a shard, 0 to 1.
    pub wait_share: f64,
    /// Waits for a shard that was not fetched yet.
    pub waits: Percentiles,
}

/// The consumer's side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct ConsumerTime {
    /// Batches taken.
    pub batches: u64,
    /// Share of its time that it waited for a batch, 0 to 1.
    pub wait_share: f64,
}

/// The workers' time by stage, from milliseconds an image.
fn stages(wall_ms: [f64; 5], cpu_ms: [f64; 5]) -> BTreeMap<&'static str, StageTime> {
    let total = wall_ms.iter().sum::<f64>().max(f64::MIN_POSITIVE);
    let one = |(at, (wall, cpu)): (usize, (f64, f64))| {
        let time =
            StageTime { cpu_ms_per_image: cpu, wall_ms_per_image: wall, share: wall / total };
        (STAGES[at].name(), time)
    };
    wall_ms.into_iter().zip(cpu_ms).enumerate().map(one).collect()
}

/// The waits at each channel; `capacities` in the order of [`CHANNELS`].
fn channels(counted: &Snapshot, capacities: [usize; 3]) -> BTreeMap<&'static str, ChannelTimes> {
    let one = |(channel, capacity): (&detco_shards::stats::Channel, usize)| {
        let waits = counted.channel(*channel);
        let (put, get) = ((&waits.put).into(), (&waits.get).into());
        (channel.name(), ChannelTimes { put, get, occupancy: waits.occupancy(), capacity })
    };
    CHANNELS.iter().zip(capacities).map(one).collect()
}

/// Milliseconds an image by stage over a stretch of time. Waiting for a sample is what the other
/// stages leave of the workers' time: a wait in progress at an edge would be counted wholly or not
/// at all.
fn per_image(counted: &Snapshot, workers: usize, seconds: f64) -> ([f64; 5], [f64; 5]) {
    let images = counted.samples.max(1) as f64;
    let ms = |nanos: [u64; 5]| nanos.map(|nanos| nanos as f64 / 1e6 / images);
    let (mut wall, cpu) = (ms(counted.nanos), ms(counted.cpu_nanos));
    let busy: f64 = wall[1..].iter().sum();
    wall[0] = (workers as f64 * seconds * 1e3 / images - busy).max(0.0);
    (wall, cpu)
}

impl Report {
    /// A report whose verdict is that of its fastest run. `None` without runs.
    pub fn new(
        data: Data,
        machine: Option<Machine>,
        settings: Settings,
        runs: Vec<Run>,
    ) -> Option<Report> {
        let fastest = runs.iter().max_by(|a, b| a.images_per_s.total_cmp(&b.images_per_s))?;
        let mut verdict = fastest.verdict.clone();
        if let [first, .., _] = runs.as_slice()
            && fastest.workers != first.workers
        {
            let times = fastest.images_per_s / first.images_per_s.max(f64::MIN_POSITIVE);
            verdict.text +=
                &format!(" {} workers are {times:.2} times {}.", fastest.workers, first.workers);
        }
        let detco = env!("CARGO_PKG_VERSION");
        let warnings = Vec::new();
        Some(Report { version: VERSION, detco, data, machine, settings, runs, verdict, warnings })
    }
}

impl Run {
    /// Fills what follows from the evidence; the rest stays empty.
    fn of(mode: &str, seconds: f64, images: u64, evidence: &Evidence) -> Run {
        Run {
            mode: mode.to_owned(),
            workers: evidence.workers,
            seconds,
            images,
            images_per_s: evidence.images_per_s,
            megabytes_per_s: evidence.megabytes_per_s,
            windows: Vec::new(),
            series: Vec::new(),
            stages: stages(evidence.wall_ms, evidence.cpu_ms),
            ops: BTreeMap::new(),
            channels: BTreeMap::new(),
            page_faults: PageFaults::default(),
            disk_bytes: 0,
            allocations_per_image: None,
            slabs: Slabs::default(),
            consumer: ConsumerTime { batches: 0, wait_share: evidence.consumer_wait },
            dispatcher_busy: evidence.dispatcher_busy,
            fetched: None,
            bad_samples: 0,
            bad_first: None,
            decoding: String::new(),
            decoded: None,
            verdict: evidence.verdict(),
        }
    }
}
