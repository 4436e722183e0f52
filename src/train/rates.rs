//! What a run writes of its updates: metrics when they are due, rates since the last ones, and collapse.

use std::time::{Duration, Instant};

use detco_shards::device::Counts;
use detco_shards::stats::Snapshot;

use super::Run;
use super::error::TrainError;
use crate::metrics::{Record, names};
use crate::profile::training;
use crate::source::Source;
use crate::step::StepReport;

/// How far everything that is counted had come.
#[derive(Debug)]
pub(super) struct Mark {
    pub(super) at: Instant,
    /// Updates given to the device.
    pub(super) step: u64,
    /// The loader's counters.
    loader: Snapshot,
    /// Who had decoded how many images.
    pub(super) decoded: Option<Counts>,
    /// Bytes sent to other ranks.
    sent: u64,
}

impl Mark {
    pub(super) fn now(source: &Source, sent: u64, step: u64) -> Mark {
        let (at, loader, decoded) = (Instant::now(), source.stats(), source.counts());
        Mark { at, step, loader, decoded, sent }
    }
}

/// What happened since metrics were last written.
#[derive(Debug)]
pub(super) struct Window {
    pub(super) start: Mark,
    /// How long its updates' batches were waited for.
    pub(super) waited: Duration,
    /// Its end, taken before the next batch is waited for, which belongs to the next window.
    pub(super) end: Option<Mark>,
}

impl Window {
    pub(super) fn from(start: Mark) -> Window {
        Window { start, waited: Duration::ZERO, end: None }
    }
}

impl Run {
    /// Ends the run when a level's embeddings have stayed collapsed.
    pub(super) fn watch(&mut self, report: &StepReport, step: u64) -> Result<(), TrainError> {
        let share = self.config.monitor.collapse_share;
        self.collapsing.resize(report.embedding_std.len(), None);
        for (since, spread) in self.collapsing.iter_mut().zip(&report.embedding_std) {
            if spread.std >= share / (spread.width as f64).sqrt() {
                *since = None;
                continue;
            }
            let since = *since.get_or_insert(step);
            if step - since + 1 >= self.config.monitor.collapse_steps {
                return Err(TrainError::Collapsed {
                    step,
                    since,
                    level: spread.level,
                    scope: spread.scope.clone(),
                    std: spread.std,
                    share,
                    last_good: self.last_good(since),
                });
            }
        }
        Ok(())
    }

    /// Writes metrics when they are due.
    pub(super) fn note(
        &mut self,
        report: &StepReport,
        (step, epoch): (u64, u32),
        learning_rate: f64,
    ) -> Result<(), TrainError> {
        if !self.is_noted(step) || self.lead.is_none() {
            return Ok(());
        }
        let mut record = Record::new(step, epoch);
        record.push(names::LOSS, report.loss);
        record.push(names::LR, learning_rate);
        let end = self.window.end.take().unwrap_or_else(|| self.mark());
        self.push_rates(&mut record, &end);
        self.window = Window::from(end);
        record.push(names::GRADIENT_NORM, report.gradient_norm);
        for term in &report.terms {
            for (reading, value) in &term.readings {
                record.push(names::reading(reading, &term.name), *value);
            }
        }
        for spread in &report.embedding_std {
            let name = names::embedding_std(spread.level, &spread.scope);
            record.push(name, spread.std);
        }
        if let Some(lead) = &mut self.lead {
            lead.metrics.write(&record)?;
            lead.progress.update(&record);
        }
        Ok(())
    }

    /// Whether metrics are written of the update with this number.
    pub(super) fn is_noted(&self, step: u64) -> bool {
        step.is_multiple_of(self.config.monitor.every_steps)
    }

    pub(super) fn mark(&self) -> Mark {
        Mark::now(&self.source, self.world.bytes_sent(), self.step)
    }

    /// What the updates of the window took.
    fn push_rates(&self, record: &mut Record, end: &Mark) {
        let Window { start, waited, .. } = &self.window;
        let steps = end.step.saturating_sub(start.step);
        if steps == 0 {
            return;
        }
        let seconds = (end.at - start.at).as_secs_f64().max(1e-9);
        let images = steps as f64 * self.config.train.batch as f64;
        record.push(names::IMAGES_PER_SECOND, images / seconds);
        // A GPU's clock and the host's differ by the work that is queued.
        record.push(names::WAIT_SHARE, (waited.as_secs_f64() / seconds).min(1.0));
        let workers = self.source.counters().workers();
        training::push(record, &end.loader.since(&start.loader), workers, seconds);
        if let (Some(now), Some(before)) = (&end.decoded, start.decoded) {
            training::push_decoded(record, &now.since(before));
        }
        if self.world.size() > 1 {
            let bytes = end.sent.saturating_sub(start.sent) as f64;
            record.push(names::MEGABYTES_SENT, bytes / 1e6 / steps as f64);
        }
    }
}
