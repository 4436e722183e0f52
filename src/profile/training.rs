//! The profile of a training run: the trainer writes the loader's counters with its metrics, and this module
//! reads them back into the same tables and verdict.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};

use detco_shards::device::Counts;
use detco_shards::stats::{STAGES, Snapshot};
use detco_shards::stream::remote::shown;
use serde_json::{Map, Value};
use thiserror::Error;

use super::verdict::{Consumer, Evidence};
use super::{Data, Report, Run, Settings, Slabs, per_image};
use crate::config::{Config, ConfigError};
use crate::metrics::{self, Record, names};

/// Number of parts of the run, for each of which images/s are given.
const WINDOWS: usize = 5;
/// Points of the plot over time.
const POINTS: usize = 200;

/// Why a run cannot be profiled.
#[derive(Debug, Error)]
pub enum TrainingError {
    /// A file of the run cannot be read.
    #[error(
        "cannot read {path}: {source}\nhint: --run takes the folder of a run, as `detco train --out` names it"
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The run's configuration is missing or invalid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No record holds the loader's counters.
    #[error(
        "{path} holds no counters of the loader yet: they come with the metrics, every {every} \
         steps (monitor.every_steps); a run of an older version has none"
    )]
    NoCounters {
        /// The file.
        path: PathBuf,
        /// Steps between records.
        every: u64,
    },
}

/// Adds what the loader counted over `seconds` to a record of the trainer.
pub fn push(record: &mut Record, counted: &Snapshot, workers: usize, seconds: f64) {
    let (wall, cpu) = per_image(counted, workers, seconds);
    let busy = 1.0 - (counted.dispatcher_nanos() as f64 / 1e9 / seconds.max(1e-9)).min(1.0);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    record.push(names::LOADER_SECONDS, seconds);
    record.push(names::LOADER_IMAGES, counted.samples as f64);
    record.push(names::LOADER_MEGABYTES, counted.bytes as f64 / 1e6);
    record.push(names::LOADER_WORKERS, workers as f64);
    record.push(names::LOADER_CORES, cores as f64);
    record.push(names::LOADER_DISPATCHER_BUSY, busy);
    let shards = (counted.shard_nanos as f64 / 1e9 / seconds.max(1e-9)).min(1.0);
    record.push(names::LOADER_SHARD_WAIT, shards);
    for (at, stage) in STAGES.into_iter().enumerate() {
        record.push(names::loader_wall_ms(stage.name()), wall[at]);
        record.push(names::loader_cpu_ms(stage.name()), cpu[at]);
    }
}

/// Adds the images by decoder, where a device decodes.
pub fn push_decoded(record: &mut Record, counted: &Counts) {
    let Counts { batched, single, cpu, refused, share } = *counted;
    record.push(names::DECODED_BATCHED, batched as f64);
    record.push(names::DECODED_SINGLE, single as f64);
    record.push(names::DECODED_CPU, cpu as f64);
    record.push(names::DECODED_REFUSED, refused as f64);
    if let Some(share) = share {
        record.push(names::DECODED_SHARE, share);
    }
}

/// The loader's counters of one record.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Line {
    step: u64,
    time: f64,
    wait_share: f64,
    seconds: f64,
    images: f64,
    megabytes: f64,
    workers: usize,
    cores: usize,
    dispatcher_busy: f64,
    shard_wait: f64,
    wall_ms: [f64; STAGES.len()],
    cpu_ms: [f64; STAGES.len()],
    /// `None` if the CPU decoded all images.
    decoded: Option<Counts>,
}

impl Line {
    /// `None` for a record without counters (of a kNN result), or one that a kill tore.
    fn parse(line: &[u8]) -> Option<Line> {
        let fields: Map<String, Value> = serde_json::from_slice(line).ok()?;
        let get = |name: &str| fields.get(name).and_then(Value::as_f64);
        let each = |name: &dyn Fn(&str) -> String| -> Option<[f64; STAGES.len()]> {
            let mut values = [0.0; STAGES.len()];
            for (value, stage) in values.iter_mut().zip(STAGES) {
                *value = get(&name(stage.name()))?;
            }
            Some(values)
        };
        let decoded = || {
            let count = |name: &str| Some(get(name)? as u64);
            Some(Counts {
                batched: count(names::DECODED_BATCHED)?,
                single: count(names::DECODED_SINGLE)?,
                cpu: count(names::DECODED_CPU)?,
                refused: count(names::DECODED_REFUSED)?,
                share: get(names::DECODED_SHARE),
            })
        };
        Some(Line {
            step: fields.get("step")?.as_u64()?,
            time: get("time")?,
            wait_share: get(names::WAIT_SHARE)?,
            seconds: get(names::LOADER_SECONDS)?,
            images: get(names::LOADER_IMAGES)?,
            megabytes: get(names::LOADER_MEGABYTES)?,
            workers: get(names::LOADER_WORKERS)? as usize,
            cores: get(names::LOADER_CORES)? as usize,
            dispatcher_busy: get(names::LOADER_DISPATCHER_BUSY)?,
            // Runs of older versions read nothing from URLs.
            shard_wait: get(names::LOADER_SHARD_WAIT).unwrap_or(0.0),
            wall_ms: each(&names::loader_wall_ms)?,
            cpu_ms: each(&names::loader_cpu_ms)?,
            decoded: decoded(),
        })
    }
}

/// Profiles a run from its folder; it may still be training.
///
/// # Errors
/// No run there, or one that has written no counters yet.
pub fn report(run: &Path) -> Result<Report, TrainingError> {
    let (config, path) = (Config::of_run(run)?, run.join(metrics::FILE));
    let mut lines = Vec::new();
    for line in BufReader::new(File::open(&path).map_err(fault(&path))?).split(b'\n') {
        lines.extend(Line::parse(&line.map_err(fault(&path))?));
    }
    let every = config.monitor.every_steps;
    let nothing = || TrainingError::NoCounters { path: path.clone(), every };
    // A resume may have changed the workers: the newest number counts.
    let workers = lines.last().ok_or_else(nothing)?.workers;
    lines.retain(|line| line.workers == workers && line.seconds > 0.0);
    if lines.len() > 1 {
        lines.remove(0); // threads, slabs and libtorch warm up in it
    }
    let found = summary(&lines, &config).ok_or_else(nothing)?;
    let spec = config.data.shards.iter().map(|word| shown(word)).collect();
    let data = Data { spec, run: Some(run.to_path_buf()), size: None };
    let settings = Settings {
        mode: found.mode.clone(),
        recipe: config.base.clone().unwrap_or_default(),
        batch: config.train.batch as u64,
        ..Settings::default()
    };
    Report::new(data, None, settings, vec![found]).ok_or_else(nothing)
}

fn fault(path: &Path) -> impl FnOnce(io::Error) -> TrainingError {
    move |source| TrainingError::Read { path: path.to_path_buf(), source }
}

/// The lines as one measurement. `None` without lines.
fn summary(lines: &[Line], config: &Config) -> Option<Run> {
    let (first, last) = (lines.first()?, lines.last()?);
    let sum = |of: &dyn Fn(&Line) -> f64| lines.iter().map(of).sum::<f64>();
    let (seconds, images) = (sum(&|line| line.seconds), sum(&|line| line.images));
    let by_time = |of: &dyn Fn(&Line) -> f64| sum(&|line| of(line) * line.seconds) / seconds;
    let by_image =
        |of: &dyn Fn(&Line) -> f64| sum(&|line| of(line) * line.images) / images.max(1.0);
    let evidence = Evidence {
        workers: last.workers,
        cores: last.cores,
        images_per_s: images / seconds,
        megabytes_per_s: sum(&|line| line.megabytes) / seconds,
        wall_ms: std::array::from_fn(|stage| by_image(&|line| line.wall_ms[stage])),
        cpu_ms: std::array::from_fn(|stage| by_image(&|line| line.cpu_ms[stage])),
        dispatcher_busy: by_time(&|line| line.dispatcher_busy),
        shard_wait: by_time(&|line| line.shard_wait),
        from_disk: None,
        consumer: Consumer::Training,
        consumer_wait: by_time(&|line| line.wait_share),
    };
    let mut run = Run::of("train", seconds, images as u64, &evidence);
    run.consumer.batches = last.step - first.step + config.monitor.every_steps;
    run.decoded = lines.iter().filter_map(|line| line.decoded).reduce(|all, line| Counts {
        batched: all.batched + line.batched,
        single: all.single + line.single,
        cpu: all.cpu + line.cpu,
        refused: all.refused + line.refused,
        share: line.share,
    });
    run.slabs = Slabs { count: config.data.batches_ahead + 1, ..Slabs::default() };
    let rate = |lines: &[Line]| {
        let seconds: f64 = lines.iter().map(|line| line.seconds).sum();
        lines.iter().map(|line| line.images).sum::<f64>() / seconds
    };
    let parts = |most: usize| lines.chunks(lines.len().div_ceil(most));
    run.windows = parts(WINDOWS).map(rate).collect();
    let start = first.time - first.seconds;
    let end = |lines: &[Line]| lines.last().map_or(0.0, |line| line.time - start);
    run.series = parts(POINTS).map(|lines| [end(lines), rate(lines)]).collect();
    Some(run)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{Metrics, Start};
    use detco_shards::stats::{Stage, Stats};
    use std::fs;

    /// What the loader counts when `views` milliseconds of each of 400 images go to the views.
    fn counted(views: u64) -> Snapshot {
        let mut counted = Stats::new(2).snapshot();
        (counted.samples, counted.bytes) = (400, 44_000_000);
        counted.nanos[Stage::Decode as usize] = 400 * 1_000_000;
        counted.nanos[Stage::Views as usize] = 400 * views * 1_000_000;
        counted.cpu_nanos = counted.nanos;
        counted
    }

    fn run(folder: &Path, views: u64, wait_share: f64) {
        fs::write(folder.join("config.toml"), Config::default().to_toml()).unwrap();
        let mut metrics = Metrics::open(folder, Start::New).unwrap();
        for step in [10, 20, 30, 40] {
            let mut record = Record::new(step, 0);
            record.push(names::WAIT_SHARE, wait_share);
            push(&mut record, &counted(views), 2, 2.0);
            metrics.write(&record).unwrap();
            let mut knn = Record::new(step, 0);
            knn.push(names::knn(5, 1), 12.0);
            metrics.write(&knn).unwrap();
        }
    }

    #[test]
    fn a_run_that_waits_for_its_views_hears_of_it() {
        let folder = tempfile::tempdir().unwrap();
        run(folder.path(), 8, 0.8);
        let report = report(folder.path()).unwrap();
        let found = &report.runs[0];
        assert_eq!((found.mode.as_str(), found.workers, found.images), ("train", 2, 1200));
        assert_eq!((found.images_per_s, found.windows.len()), (200.0, 3));
        assert!((found.stages["views"].wall_ms_per_image - 8.0).abs() < 1e-9);
        assert!((found.stages["get"].wall_ms_per_image - 1.0).abs() < 1e-9, "what is left");
        assert_eq!(found.consumer.batches, 30);
        assert!((found.consumer.wait_share - 0.8).abs() < 1e-9);
        assert_eq!(report.verdict.bottleneck, "views");
        assert_eq!(report.verdict.target_images_per_s.map(f64::round), Some(1000.0));
    }

    #[test]
    fn a_run_that_never_waits_hears_that_too() {
        let folder = tempfile::tempdir().unwrap();
        run(folder.path(), 1, 0.01);
        let report = report(folder.path()).unwrap();
        assert_eq!(report.verdict.bottleneck, "consumer");
        assert!(report.verdict.text.contains("training step"), "{}", report.verdict.text);
    }

    #[test]
    fn a_folder_without_counters_says_what_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let error = |folder: &Path| report(folder).unwrap_err().to_string();
        assert!(error(folder.path()).contains("config.toml"));
        fs::write(folder.path().join("config.toml"), Config::default().to_toml()).unwrap();
        assert!(error(folder.path()).contains("metrics.jsonl"));
        fs::write(folder.path().join(metrics::FILE), "{\"step\":10,\"ep").unwrap();
        assert!(error(folder.path()).contains("every 10 steps"), "{}", error(folder.path()));
    }
}
