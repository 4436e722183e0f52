//! The kNN monitor: rank 0 classifies labelled samples between epochs, on the map that the method declares; the
//! others wait.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use detco_shards::stream::ShardSet;
use indicatif::HumanCount;
use tch::Tensor;

use super::Run;
use super::error::TrainError;
use super::rates::Window;
use crate::config::Config;
use crate::data;
use crate::dist::Move;
use crate::eval::features::Look;
use crate::eval::knn::{self, KnnError, KnnOptions};
use crate::metrics::{Record, names};

/// The kNN monitor's sets.
pub(crate) struct Monitor {
    pub(super) train: Arc<ShardSet>,
    pub(super) test: Arc<ShardSet>,
    /// The stage whose map it reads.
    level: u8,
}

/// Where a figure was read, for messages: ` on Res4`, nothing for Res5.
fn place(level: u8) -> String {
    if level == 5 { String::new() } else { format!(" on Res{level}") }
}

impl fmt::Display for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [train, test] = [&self.train, &self.test].map(|set| HumanCount(set.len()));
        write!(f, "{test} samples against {train}{}", place(self.level))
    }
}

impl Monitor {
    /// Opens the sets that the config names; none where it asks for no monitor.
    pub(crate) fn open(config: &Config) -> Result<Option<Monitor>, TrainError> {
        let monitor = &config.monitor;
        if monitor.knn_every_epochs > 0 && monitor.knn_test.is_empty() {
            note!("warning: monitor.knn_test names no labelled shards: no kNN is measured");
        }
        if monitor.knn_every_epochs == 0 || monitor.knn_test.is_empty() {
            return Ok(None);
        }
        let train = match monitor.knn_train.as_slice() {
            [] => &config.data.shards,
            shards => shards,
        };
        let train = Arc::new(data::open(train, &config.data)?);
        let test = Arc::new(data::open(&monitor.knn_test, &config.data)?);
        train.one_numbering()?;
        test.one_numbering()?;
        for note in knn::compare(&train, &test)?.notes() {
            note!("kNN monitor: {note}");
        }
        Ok(Some(Monitor { train, test, level: config.design().monitor_level }))
    }
}

impl Run {
    /// Whether the kNN monitor is to be run after this epoch: before the first, and every
    /// `monitor.knn_every_epochs`.
    fn is_monitored(&self) -> bool {
        let every = self.config.monitor.knn_every_epochs;
        let last = self.cursor.epoch >= self.config.train.epochs;
        let wanted = every > 0 && !self.config.monitor.knn_test.is_empty();
        wanted && (self.cursor.epoch.is_multiple_of(every) || last)
    }

    /// Runs kNN if this epoch is due.
    pub(super) fn monitor_knn(&mut self, stop: &AtomicBool) -> Result<(), TrainError> {
        if !self.is_monitored() {
            return Ok(());
        }
        self.world.at(self.step, Move::Monitor);
        self.run_knn(stop)?;
        self.end_knn()
    }

    /// Waits until rank 0 has run kNN, or a signal has broken it off there; then all ranks know.
    fn end_knn(&mut self) -> Result<(), TrainError> {
        self.world.after_first()?;
        let owed = Tensor::from(i64::from(self.monitor_owed)).to_device(self.found.device);
        self.world.broadcast(&mut [owed.shallow_clone()])?;
        self.monitor_owed = owed.int64_value(&[]) != 0;
        Ok(())
    }

    /// Where a run begins or goes on between two epochs: runs kNN unless its result is written down already.
    /// The checkpoint's statistics are averages.
    pub(super) fn monitor_again(&mut self, stop: &AtomicBool) -> Result<(), TrainError> {
        if !self.is_monitored() {
            return Ok(());
        }
        self.world.at(self.step, Move::Monitor);
        let top1 = names::knn(self.config.design().monitor_level, 1);
        if self.lead.as_ref().is_some_and(|lead| !lead.metrics.had(&top1)) {
            self.run_knn(stop)?;
        }
        self.end_knn()
    }

    /// On rank 0; the others have nothing to do. A signal breaks it off; then the run owes it.
    fn run_knn(&mut self, stop: &AtomicBool) -> Result<(), TrainError> {
        let Some(lead) = &mut self.lead else { return Ok(()) };
        let Some(monitor) = &lead.monitor else { return Ok(()) };
        let level = monitor.level;
        let look = Look {
            size: self.config.crop_size(),
            workers: self.config.data.workers,
            on_bad_sample: self.config.data.on_bad_sample,
            bad_share_max: self.config.data.bad_share_max,
            bad_run_max: self.config.data.bad_run_max,
            ..Look::default()
        };
        let samples_max = self.config.monitor.knn_samples_max;
        let linear = self.config.monitor.linear;
        let options = KnnOptions { level, linear, look, samples_max, ..KnnOptions::default() };
        let started = Instant::now();
        let (train, test) = (&monitor.train, &monitor.test);
        let mut go_on = |_, _| match stop.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        };
        let report = knn::evaluate_watched(&self.model.query, train, test, &options, &mut go_on);
        self.monitor_owed = matches!(report, Err(KnnError::Stopped { .. }));
        if self.monitor_owed {
            return Ok(());
        }
        let report = report?;
        let mut record = Record::new(self.step, self.cursor.epoch);
        record.push(names::knn(level, 1), report.top1);
        if let Some(top5) = report.top5 {
            record.push(names::knn(level, 5), top5);
        }
        if let Some(rankme) = report.rankme {
            record.push(names::RANKME, rankme);
        }
        if let Some(linear) = report.linear {
            record.push(names::linear(level), linear);
        }
        lead.metrics.write(&record)?;
        let seconds = started.elapsed().as_secs_f64();
        let (epoch, top1) = (self.cursor.epoch, report.top1);
        let on = place(level);
        let linear = report.linear.map(|linear| format!(", linear {linear:.2} %"));
        let linear = linear.unwrap_or_default();
        lead.progress
            .note(&format!("epoch {epoch}: kNN top-1 {top1:.2} %{linear}{on} ({seconds:.1} s)"));
        self.window = Window::from(self.mark());
        Ok(())
    }
}
