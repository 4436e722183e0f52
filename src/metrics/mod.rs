//! What a run says about itself: JSON lines, TensorBoard, and a line for the person watching.
//!
//! Takes [`Record`]s and knows nothing of tensors, models or where numbers come from. After a
//! resume both files read as one run: what lies past the checkpoint is cut.

mod events;
mod progress;

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};
use thiserror::Error;

use events::Events;
use progress::Progress;

/// File of JSON lines in a run's folder.
pub const FILE: &str = "metrics.jsonl";

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

/// Named numbers of one moment of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Record {
    /// Updates done since the start of the run.
    pub step: u64,
    /// Passes over the data, with the share of the one that is not finished.
    pub epoch: f64,
    /// Names and values, in the order to write them; `/` groups plots in TensorBoard.
    pub values: Vec<(String, f64)>,
}

/// How fast a run goes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pace {
    /// Passes over the data, with the share of the one that is not finished.
    pub epoch: f64,
    /// Images a second over all ranks.
    pub images_per_second: f64,
    /// Share of the time that was spent waiting for data, 0 to 1.
    pub waiting_share: f64,
}

/// Writes records to `metrics.jsonl` and to a TensorBoard event file in the run's folder, and shows
/// progress on standard error.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    lines: File,
    events: Events,
    progress: Progress,
}

impl Metrics {
    /// Opens the files of a run of `steps` updates, of which `step` are done; its folder must
    /// exist. What the files hold of later updates is cut: of `metrics.jsonl` by truncation, in
    /// TensorBoard by the mark of a restart. A run at step 0 starts anew.
    ///
    /// # Errors
    /// [`MetricsError`] with the file and what the system said.
    pub fn open(run: &Path, step: u64, steps: u64) -> Result<Metrics, MetricsError> {
        let path = run.join(FILE);
        let (lines, purge) = match step {
            0 => (File::create(&path).map_err(fault("create", &path))?, 0),
            done => (cut(&path, done)?, done + 1),
        };
        let events = Events::create(run, now(), purge)?;
        Ok(Metrics { path, lines, events, progress: Progress::new(step, steps) })
    }

    /// Writes a record to both files; a killed process loses none that this returned for.
    ///
    /// # Errors
    /// [`MetricsError`], such as for a full disk.
    pub fn record(&mut self, record: &Record) -> Result<(), MetricsError> {
        let rate = record.values.iter().find(|(name, _)| name == "learning_rate");
        if let Some((_, rate)) = rate {
            self.progress.learning_rate(*rate);
        }
        let time = now();
        // One write a line: a kill tears at most the last one, and a resume cuts that.
        self.lines.write_all(json(record, time).as_bytes()).map_err(fault("write", &self.path))?;
        self.events.write(time, record)
    }

    /// Shows where the run is; call it after each update.
    pub fn progress(&mut self, step: u64, loss: f64, pace: &Pace) {
        self.progress.update(step, loss, pace);
    }

    /// Prints a line of its own (a checkpoint, a kNN result), above the bar where there is one.
    /// The time since the last update does not count towards the time left.
    pub fn message(&mut self, text: &str) {
        self.progress.message(text);
    }

    /// Waits until both files are on the disk; before a checkpoint, so that a resumed run finds the
    /// lines it builds upon even after a power failure.
    ///
    /// # Errors
    /// [`MetricsError`] with the file and what the system said.
    pub fn flush(&mut self) -> Result<(), MetricsError> {
        self.lines.sync_data().map_err(fault("flush", &self.path))?;
        self.events.sync()
    }

    /// Flushes, and leaves the last state of the bar standing.
    ///
    /// # Errors
    /// As [`Metrics::flush`].
    pub fn finish(&mut self) -> Result<(), MetricsError> {
        self.progress.finish();
        self.flush()
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
        number(record.epoch),
        number((time * 1e3).round() / 1e3)
    );
    for (name, value) in &record.values {
        // Writing to a String cannot fail.
        let _ = write!(line, ",{}:{}", Value::from(name.as_str()), number(*value));
    }
    line.push_str("}\n");
    line
}

/// Opens the lines for appending after the last one of a step up to `step`. Steps ascend in the
/// file, so the cut is one truncation, which a kill cannot leave half done.
fn cut(path: &Path, step: u64) -> Result<File, MetricsError> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(fault("open", path))?;
    let mut reader = BufReader::new(&file);
    let (mut keep, mut line) = (0, Vec::new());
    loop {
        line.clear();
        let read = reader.read_until(b'\n', &mut line).map_err(fault("read", path))?;
        if read == 0 || line.last() != Some(&b'\n') {
            break; // the end, or a line that a kill tore
        }
        let parsed: Option<Map<String, Value>> = serde_json::from_slice(&line).ok();
        match parsed.as_ref().and_then(|fields| fields.get("step")).and_then(Value::as_u64) {
            Some(at) if at <= step => keep += read as u64,
            _ => break, // past the checkpoint, or not ours
        }
    }
    drop(reader);
    file.set_len(keep).map_err(fault("cut", path))?;
    file.seek(SeekFrom::Start(keep)).map_err(fault("seek in", path))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: u64) -> Record {
        Record { step, epoch: 0.5, values: vec![("loss".into(), step as f64 / 8.0)] }
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
        let mut metrics = Metrics::open(run.path(), 0, 100).unwrap();
        for step in [10, 20, 30, 40] {
            metrics.record(&record(step)).unwrap();
        }
        drop(metrics);
        // What a kill in the middle of a line leaves.
        let mut file = OpenOptions::new().append(true).open(run.path().join(FILE)).unwrap();
        file.write_all(b"{\"step\":50,\"epo").unwrap();
        let mut metrics = Metrics::open(run.path(), 25, 100).unwrap();
        metrics.record(&record(30)).unwrap();
        metrics.flush().unwrap();
        assert_eq!(steps(run.path()), [10, 20, 30]);
        drop(metrics);
        let metrics = Metrics::open(run.path(), 30, 100).unwrap();
        drop(metrics);
        assert_eq!(steps(run.path()), [10, 20, 30]);
        // A run whose metrics were deleted goes on as well.
        std::fs::remove_file(run.path().join(FILE)).unwrap();
        let mut metrics = Metrics::open(run.path(), 30, 100).unwrap();
        metrics.record(&record(40)).unwrap();
        assert_eq!(steps(run.path()), [40]);
    }

    #[test]
    fn lines_are_json_whatever_the_numbers() {
        let mut one = record(3);
        one.values.push(("odd \"name\"".into(), f64::NAN));
        one.values.push(("exact".into(), 0.1));
        let parsed: Value = serde_json::from_str(&json(&one, 1.5)).unwrap();
        assert_eq!(parsed["loss"], 0.375);
        assert_eq!(parsed["odd \"name\""], Value::Null);
        assert_eq!(parsed["exact"].as_f64(), Some(0.1));
        assert_eq!(parsed["epoch"], 0.5);
    }
}
