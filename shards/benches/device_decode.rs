//! Images a second that nvJPEG decodes in our pipeline, by its hardware engine, by its hybrid back end, by
//! both in the measured share; prints one line of JSON:
//!
//! ```text
//! cargo bench -p detco-shards --features nvjpeg --bench device_decode -- --data SHARDS
//!     [--device cuda|cpu] [--workers 16] [--batch 64] [--seconds 5]
//! ```
//!
//! `--device cpu` runs the same wiring on its twin in host memory. The rate is the median of five windows;
//! for the hardware engine, of those images that it decoded.
//! Run as a test it takes a few images that it makes.

#[path = "../tests/support/images.rs"]
mod images;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use detco_shards::cuda::Stream;
use detco_shards::device::{
    Counts, Cuda, DeviceBatch, DeviceLoader, DeviceOptions, Engine, Host, Number, Setup, Share,
};
use detco_shards::format::writer::ShardWriter;
use detco_shards::order::Order;
use detco_shards::pipeline::{LoaderOptions, OnBadSample, Views};
use detco_shards::stream::ShardSet;
use detco_shards::views::Recipe;
use serde_json::{Value, json};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Windows whose median is the rate.
const WINDOWS: usize = 5;

/// Part of the images that the hardware engine gets.
const SHARES: [(&str, Share); 3] =
    [("hardware", Share::Fixed(1.0)), ("hybrid", Share::Fixed(0.0)), ("both", Share::Measure)];

struct Options {
    data: Option<String>,
    on_gpu: bool,
    workers: usize,
    batch: u64,
    seconds: f64,
}

impl Options {
    fn parse() -> Options {
        let measured =
            std::env::args().any(|argument| argument == "--bench" || argument == "--data");
        let seconds = if measured { 5.0 } else { 0.1 };
        let mut options = Options { data: None, on_gpu: measured, workers: 2, batch: 16, seconds };
        let mut rest = std::env::args().skip(1).filter(|argument| argument != "--bench");
        while let Some(name) = rest.next() {
            // Cargo's own arguments have no values and mean nothing here.
            let Some(value) = rest.next() else { break };
            let number = || value.parse().unwrap_or_else(|_| panic!("{name} {value}: no number"));
            match (name.as_str(), value.as_str()) {
                ("--data", _) => options.data = Some(value),
                ("--device", device) => options.on_gpu = device == "cuda",
                ("--workers", _) => options.workers = number() as usize,
                ("--batch", _) => options.batch = number() as u64,
                ("--seconds", _) => options.seconds = number(),
                _ => panic!("{name} {value} means nothing here"),
            }
        }
        options
    }
}

fn main() -> Result<()> {
    let options = Options::parse();
    let made = tempfile::tempdir()?;
    let data = match &options.data {
        Some(data) => data.clone(),
        None => make(made.path())?,
    };
    let set = Arc::new(ShardSet::open(&[data])?);
    // The page cache is warm afterwards.
    for sample in 0..set.len() {
        std::hint::black_box(
            set.sample(sample)?.jpeg().iter().map(|byte| u64::from(*byte)).sum::<u64>(),
        );
    }
    let mut figures = json!({ "images": set.len(), "workers": options.workers });
    for (name, share) in SHARES {
        let found = match options.on_gpu {
            true => on_gpu(&set, &options, share),
            false => rate(&set, Host::new(true), &options, share, |_| Ok(())),
        };
        // A GPU without an engine has the other two figures.
        figures[name] = found.unwrap_or_else(|error| json!({ "error": error.to_string() }));
    }
    println!("{figures}");
    Ok(())
}

fn on_gpu(set: &Arc<ShardSet>, options: &Options, share: Share) -> Result<Value> {
    let libtorch = std::env::var_os("LIBTORCH").map(PathBuf::from);
    let cache = std::env::temp_dir().join("detco-bench-kernels");
    let cuda = Cuda::open(&Setup::new(libtorch.as_deref(), cache, Number::Bf16))?;
    if let (Share::Fixed(1.0), Err(error)) = (share, cuda.hardware()) {
        return Err(error.to_string().into());
    }
    let stream = Stream::new(cuda.device())?;
    rate(set, cuda, options, share, |batch| {
        batch.wait_on(&stream)?;
        Ok(batch.release_on(&stream)?)
    })
}

/// Images a second; `read` is what the consumer does with a batch.
fn rate<E: Engine>(
    set: &Arc<ShardSet>,
    engine: E,
    options: &Options,
    share: Share,
    read: impl Fn(&DeviceBatch<E>) -> Result<()>,
) -> Result<Value> {
    let order = Order::shuffled(set.len(), options.batch, 1)?;
    let loader = LoaderOptions {
        views: Views::Decode,
        workers: options.workers,
        on_bad_sample: OnBadSample::Skip,
        ..LoaderOptions::train(Recipe::detco(), order, 1, u32::MAX)
    };
    let mut loader = DeviceLoader::start(Arc::clone(set), engine, DeviceOptions { loader, share })?;
    let mut take = |seconds: f64| -> Result<f64> {
        let (start, mut images) = (Instant::now(), 0);
        while start.elapsed() < Duration::from_secs_f64(seconds) {
            let batch = loader.next().ok_or("the epochs have ended")??;
            images += batch.len();
            read(&batch)?;
        }
        Ok(images as f64 / start.elapsed().as_secs_f64())
    };
    // Decoders allocate, and the share is measured.
    take(options.seconds / 2.0)?;
    let mut rates = Vec::new();
    for _ in 0..WINDOWS {
        rates.push(take(options.seconds / WINDOWS as f64)?);
    }
    rates.sort_by(f64::total_cmp);
    let counts: Counts = loader.counts();
    if matches!(share, Share::Fixed(1.0)) {
        // Workers decode what it does not take.
        let all = (counts.batched + counts.single + counts.cpu).max(1);
        let part = counts.batched as f64 / all as f64;
        rates.iter_mut().for_each(|rate| *rate *= part);
    }
    Ok(json!({
        "images_per_s": rates[WINDOWS / 2],
        "windows": rates,
        "counts": counts,
        "refusal": loader.refusal(),
    }))
}

/// A shard of a few pictures.
fn make(folder: &Path) -> Result<String> {
    let mut shard = ShardWriter::create(folder, "000000.tar")?;
    for (i, jpeg) in images::jpegs(48).iter().enumerate() {
        shard.append(&format!("s{i:05}.jpg"), jpeg)?;
    }
    shard.finish()?.seal()?;
    Ok(folder.display().to_string())
}
