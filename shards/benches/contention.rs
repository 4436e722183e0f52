//! Whether threads get in each other's way: `cargo bench -p detco-shards --bench contention`.
//!
//! Tiny images, so that a sample is some 10 µs of work and the rest is handing it from thread to
//! thread: a thousand times more often per unit of work than with photographs. 2, 4, 8 and 16
//! workers run in turn, on however many cores there are (`taskset -c 0,1` for two). With nothing
//! shared but the cores, CPU time a sample stays the same and throughput does not fall.
//!
//! What the threads share on the way of a sample, and why none of it is held:
//!
//! - The channel of tasks: a ring whose places are claimed with one compare-and-exchange each
//!   (crossbeam's bounded channel). Its mutex guards the list of sleeping threads, and is touched
//!   only by one that goes to sleep on an empty or full ring, or wakes another.
//! - The slab: bytes are disjoint by construction, and the count of slots that are not done is one
//!   atomic decrement a sample. So is the count of owners of the batch.
//! - The shards: read-only maps and tables, and a mark a shard that only a damaged one ever writes.
//! - The counters: two cache lines a worker of its own.
//! - The list of a batch's bad samples has a mutex, which a good sample does not touch.
//!
//! The channels of finished batches and of free slabs pass once a batch.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use detco_shards::format::writer::ShardWriter;
use detco_shards::order::Order;
use detco_shards::pipeline::{Loader, LoaderOptions};
use detco_shards::stats::Stage;
use detco_shards::stream::ShardSet;
use detco_shards::views::Recipe;

const WORKERS: [usize; 4] = [2, 4, 8, 16];
const SIDE: u32 = 16;
const BATCH: u64 = 256;

/// `/proc/self/stat` counts in these, on every Linux that this runs on.
const TICK: Duration = Duration::from_millis(10);

fn main() {
    let measured = std::env::args().any(|argument| argument == "--bench");
    let (samples, epochs, rounds) = if measured { (25_600, 8, 5) } else { (512, 1, 1) };
    let folder = tempfile::tempdir().expect("a folder");
    write_shards(folder.path(), samples);
    let spec = [folder.path().display().to_string()];
    let set = Arc::new(ShardSet::open(&spec).expect("the shards just written"));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    println!(
        "{samples} images of {SIDE}x{SIDE}, {epochs} epochs, batches of {BATCH}, {cores} cores"
    );
    println!("workers  images/s  CPU us/image  get us/image  put us/image  consumer us/image");
    let mut best: Vec<Option<Run>> = WORKERS.map(|_| None).into();
    // In turn, so that a disturbance does not fall on one of them alone.
    for _ in 0..rounds {
        for (workers, best) in WORKERS.iter().zip(&mut best) {
            let run = run(&set, *workers, epochs);
            if best.as_ref().is_none_or(|best| run.seconds < best.seconds) {
                *best = Some(run);
            }
        }
    }
    for (workers, run) in WORKERS.iter().zip(best.into_iter().flatten()) {
        println!(
            "{workers:7}  {:8.0}  {:12.2}  {:12.2}  {:12.2}  {:17.2}",
            run.images as f64 / run.seconds,
            run.each(run.cpu),
            run.each(run.get),
            run.each(run.put),
            run.each(run.consumer),
        );
    }
}

fn write_shards(folder: &Path, samples: u32) {
    let mut shard = ShardWriter::create(folder, "000000.tar").expect("a shard");
    for number in 0..samples {
        let pixels = vec![number as u8; (SIDE * SIDE) as usize];
        let mut bytes = Vec::new();
        jpeg_encoder::Encoder::new(&mut bytes, 90)
            .encode(&pixels, SIDE as u16, SIDE as u16, jpeg_encoder::ColorType::Luma)
            .expect("encodes");
        shard.append(&format!("{number:06}.jpg"), &bytes).expect("a member");
    }
    shard.finish().expect("a file").seal().expect("a shard");
}

/// Best of the rounds.
struct Run {
    images: u64,
    seconds: f64,
    cpu: Duration,
    get: Duration,
    put: Duration,
    consumer: Duration,
}

impl Run {
    /// Microseconds an image.
    fn each(&self, spent: Duration) -> f64 {
        spent.as_secs_f64() * 1e6 / self.images as f64
    }
}

fn run(set: &Arc<ShardSet>, workers: usize, epochs: u32) -> Run {
    let order = Order::shuffled(set.len(), BATCH, 7).expect("a batch or more");
    let options = LoaderOptions {
        workers,
        ..LoaderOptions::train(Recipe::center(SIDE, 1.0), order, 7, epochs)
    };
    let (before, start) = (cpu(), Instant::now());
    let mut loader = Loader::start(Arc::clone(set), options).expect("threads");
    let mut images = 0;
    for filled in loader.by_ref() {
        images += filled.expect("good images").len() as u64;
    }
    let (seconds, stats) = (start.elapsed().as_secs_f64(), loader.stats());
    drop(loader);
    assert_eq!(stats.samples, images);
    let stage = |stage: Stage| Duration::from_nanos(stats.nanos[stage as usize]);
    Run {
        images,
        seconds,
        cpu: cpu() - before,
        get: stage(Stage::Get),
        put: stage(Stage::Put),
        consumer: Duration::from_nanos(stats.consumer_nanos()),
    }
}

/// CPU time of the process so far.
fn cpu() -> Duration {
    let stat =
        std::fs::read_to_string("/proc/self/stat").expect("this program needs Linux's /proc");
    // The second field is a name in brackets and may hold blanks; utime is the 14th, stime the
    // 15th.
    let after = stat.rsplit_once(')').expect("a name in brackets").1;
    let ticks = after.split_whitespace().skip(11).take(2);
    TICK * ticks.map(|word| word.parse::<u32>().expect("a number")).sum::<u32>()
}
