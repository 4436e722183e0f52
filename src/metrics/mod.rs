//! What a run says about itself: JSON lines, TensorBoard, and a line for the person watching.
//!
//! Takes [`Record`]s and knows nothing of tensors, models or where numbers come from. After a
//! resume both files read as one run: what lies past the checkpoint is cut.

mod events;
mod progress;

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};
use thiserror::Error;

use events::Events;
pub use progress::{Plan, Progress};

/// File of JSON lines in a run's folder.
pub const FILE: &str = "metrics.jsonl";

/// Names of the metrics, the same in JSON, TensorBoard and code. `/` groups plots in TensorBoard.
pub mod names {
    /// The loss that is minimised: level weights times terms.
    pub const LOSS: &str = "loss";
    /// Learning rate of the step.
    pub const LR: &str = "lr";
    /// Images a second over all ranks, since the last record.
    pub const IMAGES_PER_SECOND: &str = "images_per_second";
    /// Share of the time since the last record that was spent waiting for data, 0 to 1: the host's time, or on a
    /// GPU the time that the GPU was idle for it.
    pub const WAIT_SHARE: &str = "wait_share";
    /// Euclidean length of all gradients together.
    pub const GRADIENT_NORM: &str = "gradient_norm";
    /// Megabytes a step that a rank sends to others, by the cost of ring algorithms; several ranks.
    pub const MEGABYTES_SENT: &str = "dist/megabytes_sent";
    /// Seconds that the loader's counters of this record cover.
    pub const LOADER_SECONDS: &str = "loader/seconds";
    /// Images that the loader finished in them.
    pub const LOADER_IMAGES: &str = "loader/images";
    /// Their compressed size in megabytes.
    pub const LOADER_MEGABYTES: &str = "loader/megabytes";
    /// The loader's workers.
    pub const LOADER_WORKERS: &str = "loader/workers";
    /// Cores that the process may use.
    pub const LOADER_CORES: &str = "loader/cores";
    /// Share of its time that the dispatcher worked, 0 to 1.
    pub const LOADER_DISPATCHER_BUSY: &str = "loader/dispatcher_busy";
    /// Share of its time that the dispatcher waited for shards from URLs, 0 to 1.
    pub const LOADER_SHARD_WAIT: &str = "loader/shard_wait";
    /// Where a device decodes: images decoded by its batch decoder.
    pub const DECODED_BATCHED: &str = "loader/decoded/batched";
    /// Images decoded one by one on the device.
    pub const DECODED_SINGLE: &str = "loader/decoded/single";
    /// Images decoded by the CPU in place of the device.
    pub const DECODED_CPU: &str = "loader/decoded/cpu";
    /// Batches refused by the batch decoder; their images are counted by their actual decoder.
    pub const DECODED_REFUSED: &str = "loader/decoded/refused";
    /// Share of suitable images that goes to the batch decoder, 0 to 1, once it is known.
    pub const DECODED_SHARE: &str = "loader/decoded/share";
    /// Milliseconds of a worker per image in a stage: `loader/wall_ms/views`.
    pub fn loader_wall_ms(stage: &str) -> String {
        format!("loader/wall_ms/{stage}")
    }

    /// CPU milliseconds of a worker per image in a stage: `loader/cpu_ms/views`.
    pub fn loader_cpu_ms(stage: &str) -> String {
        format!("loader/cpu_ms/{stage}")
    }

    /// RankMe of the test images' features, in dimensions.
    pub const RANKME: &str = "features/rankme";

    /// kNN in percent of the samples, `top` `1` or `5`: `knn/top1` on Res5, `knn/res4/top1` on another stage's map.
    pub fn knn(level: u8, top: u8) -> String {
        match level {
            5 => format!("knn/top{top}"),
            _ => format!("knn/res{level}/top{top}"),
        }
    }

    /// Top-1 of a linear classifier in percent: `linear/top1`, `linear/res4/top1`.
    pub fn linear(level: u8) -> String {
        match level {
            5 => "linear/top1".to_owned(),
            _ => format!("linear/res{level}/top1"),
        }
    }

    /// What was read of one of the loss's terms, without its weight: `loss/res5/gg`; mean logits of positives
    /// and negatives, divided by the temperature: `positive/res5/gg`, `negative/res5/gg`; the share of samples
    /// whose positive is above every negative: `accuracy/res5/gg`.
    pub fn reading(reading: &str, term: &str) -> String {
        format!("{reading}/{term}")
    }

    /// Standard deviation of the query embeddings, averaged over dimensions; 1/√d is even spread,
    /// 0 is collapse: `embedding_std/res5/global`.
    pub fn embedding_std(level: u8, scope: &str) -> String {
        format!("embedding_std/res{level}/{scope}")
    }
}

/// Why metrics could not be written.
#[derive(Debug, Error)]
#[error("cannot {what} {path}: {source}")]
pub struct MetricsError {
    /// What was tried.
    pub what: &'static str,
    /// The file.
    pub path: PathBuf,
    /// What the system said.
    pub source: io::Error,
}

fn fault(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> MetricsError {
    move |source| MetricsError { what, path: path.to_path_buf(), source }
}

/// A record: named values at one step of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Record {
    /// Updates done since the start of the run.
    pub step: u64,
    /// Passes over the data finished before the update, or before what was evaluated.
    pub epoch: u32,
    /// Names (see [`names`]) and values, in the order to write them.
    pub values: Vec<(String, f64)>,
}

impl Record {
    /// A record without values.
    pub fn new(step: u64, epoch: u32) -> Record {
        Record { step, epoch, values: Vec::new() }
    }

    /// Adds a value.
    pub fn push(&mut self, name: impl Into<String>, value: f64) {
        self.values.push((name.into(), value));
    }

    /// The value of this name.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.values.iter().find(|(known, _)| known == name).map(|(_, value)| *value)
    }
}

/// Whether the files are new or continued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// A new run: files from an earlier one in this folder are replaced or superseded.
    New,
    /// A resumed run: records of later updates are cut.
    Resume {
        /// Updates done when the checkpoint was written.
        step: u64,
    },
}

/// Writes records to `metrics.jsonl` and to a TensorBoard event file in the run's folder.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    lines: File,
    events: Events,
    /// Names of the values recorded for the step that the run resumes from.
    had: BTreeSet<String>,
}

impl Metrics {
    /// Opens the files of a run, whose folder must exist. Of `metrics.jsonl` a resumed run keeps
    /// the lines up to the checkpoint; TensorBoard is told to drop later ones.
    ///
    /// # Errors
    /// [`MetricsError`] with the file and what the system said.
    pub fn open(run: &Path, start: Start) -> Result<Metrics, MetricsError> {
        let path = run.join(FILE);
        let (lines, had) = match start {
            Start::New => (File::create(&path).map_err(fault("create", &path))?, BTreeSet::new()),
            Start::Resume { step } => cut(&path, step)?,
        };
        let purge = match start {
            Start::New => 0,
            Start::Resume { step } => step + 1,
        };
        Ok(Metrics { path, lines, events: Events::create(run, now(), purge)?, had })
    }

    /// Whether a value of this name was recorded for the step that the run resumes from.
    pub fn had(&self, name: &str) -> bool {
        self.had.contains(name)
    }

    /// Writes a record to both files. A kill loses no record for which this has returned.
    ///
    /// # Errors
    /// [`MetricsError`], such as for a full disk.
    pub fn write(&mut self, record: &Record) -> Result<(), MetricsError> {
        let time = now();
        // One write a line: a kill tears at most the last one, and a resume cuts that.
        self.lines.write_all(json(record, time).as_bytes()).map_err(fault("write", &self.path))?;
        self.events.write(time, record)
    }

    /// Flushes both files to the disk; called before a checkpoint, so that a resumed run finds its lines even
    /// after a power failure.
    ///
    /// # Errors
    /// [`MetricsError`] with the file and what the system said.
    pub fn sync(&mut self) -> Result<(), MetricsError> {
        self.lines.sync_data().map_err(fault("flush", &self.path))?;
        self.events.sync()
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    // A clock before 1970 is no reason to end a run.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// One line: step, epoch, time, then the values. JSON has no NaN and no infinity: those are `null`.
fn json(record: &Record, time: f64) -> String {
    use std::fmt::Write as _;
    let number = |value: f64| Value::from(value).to_string();
    let mut line = format!(
        "{{\"step\":{},\"epoch\":{},\"time\":{}",
        record.step,
        record.epoch,
        number((time * 1e3).round() / 1e3)
    );
    for (name, value) in &record.values {
        // Writing to a String cannot fail.
        let _ = write!(line, ",{}:{}", Value::from(name.as_str()), number(*value));
    }
    line.push_str("}\n");
    line
}

/// Opens the file for appending after the last line of a step up to `step`. Steps ascend in the file, so one
/// truncation cuts it, which a kill cannot leave half done. Also returns the names of the values of that very
/// step.
fn cut(path: &Path, step: u64) -> Result<(File, BTreeSet<String>), MetricsError> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(fault("open", path))?;
    let mut reader = BufReader::new(&file);
    let (mut keep, mut line, mut had) = (0, Vec::new(), BTreeSet::new());
    loop {
        line.clear();
        let read = reader.read_until(b'\n', &mut line).map_err(fault("read", path))?;
        if read == 0 || line.last() != Some(&b'\n') {
            break; // the end, or a line that a kill tore
        }
        let parsed: Option<Map<String, Value>> = serde_json::from_slice(&line).ok();
        let Some(fields) = parsed else { break }; // not ours
        match fields.get("step").and_then(Value::as_u64) {
            Some(at) if at <= step => keep += read as u64,
            _ => break, // past the checkpoint, or not ours
        }
        if fields.get("step").and_then(Value::as_u64) == Some(step) {
            had.extend(fields.into_iter().map(|(name, _)| name));
        }
    }
    drop(reader);
    file.set_len(keep).map_err(fault("cut", path))?;
    file.seek(SeekFrom::Start(keep)).map_err(fault("seek in", path))?;
    Ok((file, had))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: u64) -> Record {
        Record { step, epoch: 0, values: vec![(names::LOSS.into(), step as f64 / 8.0)] }
    }

    fn steps(run: &Path) -> Vec<u64> {
        let text = std::fs::read_to_string(run.join(FILE)).unwrap();
        text.lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["step"].as_u64().unwrap())
            .collect()
    }

    #[test]
    fn a_resumed_run_reads_as_one() {
        let run = tempfile::tempdir().unwrap();
        let mut metrics = Metrics::open(run.path(), Start::New).unwrap();
        for step in [10, 20, 30, 40] {
            metrics.write(&record(step)).unwrap();
        }
        drop(metrics);
        // What a kill in the middle of a line leaves.
        let mut file = OpenOptions::new().append(true).open(run.path().join(FILE)).unwrap();
        file.write_all(b"{\"step\":50,\"epo").unwrap();
        let mut metrics = Metrics::open(run.path(), Start::Resume { step: 25 }).unwrap();
        metrics.write(&record(30)).unwrap();
        metrics.sync().unwrap();
        assert_eq!(steps(run.path()), [10, 20, 30]);
        drop(metrics);
        let metrics = Metrics::open(run.path(), Start::Resume { step: 30 }).unwrap();
        drop(metrics);
        assert_eq!(steps(run.path()), [10, 20, 30]);
        // The values of that step are known, so that none is made twice.
        let of = |step| Metrics::open(run.path(), Start::Resume { step }).unwrap();
        assert!(
            of(30).had(names::LOSS) && !of(30).had(&names::knn(5, 1)) && !of(25).had(names::LOSS)
        );
        let mut metrics = of(25);
        metrics.write(&record(30)).unwrap();
        // A run whose metrics were deleted goes on as well.
        std::fs::remove_file(run.path().join(FILE)).unwrap();
        let mut metrics = Metrics::open(run.path(), Start::Resume { step: 30 }).unwrap();
        metrics.write(&record(40)).unwrap();
        assert_eq!(steps(run.path()), [40]);
    }

    #[test]
    fn lines_are_json_whatever_the_numbers() {
        let mut one = record(3);
        one.push("odd \"name\"", f64::NAN);
        one.push("small", 1e-300);
        one.push("exact", 0.1);
        let parsed: Value = serde_json::from_str(&json(&one, 1.5)).unwrap();
        assert_eq!(parsed["loss"], 0.375);
        assert_eq!(parsed["odd \"name\""], Value::Null);
        assert_eq!(parsed["exact"].as_f64(), Some(0.1));
        assert_eq!(one.get("small"), Some(1e-300));
    }
}
