//! The status line while the data path is measured.

use std::fmt::Write as _;
use std::io::IsTerminal as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use detco_shards::stats::STAGES;
use detco_shards::stream::ShardSet;
use indicatif::{HumanBytes, ProgressBar};

use crate::console::plural;
use crate::profile::cache;
use crate::profile::measure::{Plan, Progress};
use crate::profile::verdict::{count, percent};

/// The status line; none if standard error is not a terminal.
pub(super) struct Live {
    pub(super) bar: Option<ProgressBar>,
}

impl Live {
    pub(super) fn new() -> Live {
        Live { bar: std::io::stderr().is_terminal().then(ProgressBar::new_spinner) }
    }

    pub(super) fn say(&self, text: String) {
        if let Some(bar) = &self.bar {
            bar.set_message(text);
            bar.tick();
        }
    }

    pub(super) fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    /// Fills the page cache.
    pub(super) fn fill(&self, set: &ShardSet) -> anyhow::Result<()> {
        let (read, over) = (AtomicU64::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let painter = std::thread::Builder::new().spawn_scoped(scope, || {
                while !over.load(Ordering::Relaxed) {
                    let read = HumanBytes(read.load(Ordering::Relaxed));
                    self.say(format!("filling the page cache: {read}"));
                    std::thread::park_timeout(Duration::from_millis(100));
                }
            });
            let filled = cache::fill(set, &read);
            over.store(true, Ordering::Relaxed);
            // Where no thread could be started nothing is painted.
            if let Ok(painter) = painter {
                painter.thread().unpark();
            }
            Ok(filled?)
        })
    }

    pub(super) fn show(&self, plan: &Plan, now: &Progress) {
        let mut line = format!("{}, {}: ", plan.mode.name(), plural(plan.workers as u64, "worker"));
        // Writing to a String cannot fail.
        let _ = match now.measuring {
            true => write!(line, "{:.0} of {:.0} s", now.seconds.min(plan.seconds), plan.seconds),
            false => write!(line, "warming up"),
        };
        let _ = write!(line, "  {} images/s ", count(now.images_per_s));
        let total = now.counted.nanos.iter().sum::<u64>().max(1);
        for stage in STAGES {
            let share = now.counted.nanos[stage as usize] as f64 / total as f64;
            if share >= 0.01 {
                let _ = write!(line, " {} {}", stage.name(), percent(share));
            }
        }
        self.say(line);
    }
}
