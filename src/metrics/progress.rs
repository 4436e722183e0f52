//! The progress display: a bar on a terminal, or a line every half minute elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{Record, names};

/// Seconds between lines in a log file.
const LINE_EVERY: Duration = Duration::from_secs(30);

/// Weight of the newest images/s in the estimate of the time left, which smooths over some ten records.
const NEWEST: f64 = 0.1;

/// The length of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Epochs of the whole run.
    pub epochs: u32,
    /// Updates of the whole run.
    pub steps: u64,
    /// Samples of one update over all ranks.
    pub batch: u64,
}

/// Shows records as they come, on standard error.
#[derive(Debug)]
pub struct Progress {
    plan: Plan,
    /// Smoothed images/s.
    rate: Option<f64>,
    output: Output,
}

#[derive(Debug)]
enum Output {
    Bar(ProgressBar),
    Lines { last: Option<Instant> },
}

impl Progress {
    /// A bar where standard error is a terminal, else a line every half minute.
    pub fn new(plan: Plan) -> Progress {
        let output = if std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(Some(plan.steps), ProgressDrawTarget::stderr());
            // The template is a constant that the tests parse; without it the bar is merely plainer.
            if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
                bar.set_style(style.progress_chars("━╸ "));
            }
            Output::Bar(bar)
        } else {
            Output::Lines { last: None }
        };
        Progress { plan, rate: None, output }
    }

    /// Shows a record of a training step.
    pub fn update(&mut self, record: &Record) {
        if let Some(now) = record.get(names::IMAGES_PER_SECOND).filter(|rate| *rate > 0.0) {
            self.rate = Some(self.rate.map_or(now, |rate| rate + NEWEST * (now - rate)));
        }
        let line = line(&self.plan, record, self.rate);
        match &mut self.output {
            Output::Bar(bar) => {
                bar.set_position(record.step);
                bar.set_message(line);
            }
            Output::Lines { last } => {
                let due = last.is_none_or(|last| last.elapsed() >= LINE_EVERY);
                if due || record.step >= self.plan.steps {
                    note!("{line}");
                    *last = Some(Instant::now());
                }
            }
        }
    }

    /// Prints a separate line (a checkpoint, a kNN result), above the bar if there is one.
    pub fn note(&self, text: &str) {
        match &self.output {
            Output::Bar(bar) => bar.suspend(|| note!("{text}")),
            Output::Lines { .. } => note!("{text}"),
        }
    }

    /// Ends the display and leaves the bar's last state.
    pub fn finish(&self) {
        if let Output::Bar(bar) = &self.output {
            bar.abandon();
        }
    }
}

const TEMPLATE: &str = "{bar:24} {msg}";

/// `epoch 3/200  step 1200/1000  loss 9.812  lr 0.03  1342 images/s  waiting 2 %  left 2 d 5 h`;
/// what a record does not have is left out.
fn line(plan: &Plan, record: &Record, rate: Option<f64>) -> String {
    let epoch = (u64::from(record.epoch) + 1).min(u64::from(plan.epochs));
    let mut parts = vec![
        format!("epoch {epoch}/{}", plan.epochs),
        format!("step {}/{}", record.step, plan.steps),
    ];
    let mut value = |name: &str, show: &dyn Fn(f64) -> String| {
        parts.extend(record.get(name).map(show));
    };
    value(names::LOSS, &|loss| format!("loss {loss:.3}"));
    value(names::LR, &|lr| format!("lr {}", short(lr)));
    value(names::IMAGES_PER_SECOND, &|rate| format!("{rate:.0} images/s"));
    value(names::WAIT_SHARE, &|share| format!("waiting {:.0} %", share * 100.0));
    if let Some(rate) = rate {
        let images = plan.steps.saturating_sub(record.step) as f64 * plan.batch as f64;
        parts.push(format!("left {}", duration(images / rate)));
    }
    parts.join("  ")
}

/// Three significant digits without trailing zeros.
fn short(value: f64) -> String {
    let text = format!("{value:.2e}");
    text.parse::<f64>().map_or(text, |rounded| rounded.to_string())
}

/// The two largest units of a time in seconds.
fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64; // saturates; a negative or NaN time is 0
    let (days, hours) = (seconds / 86_400, seconds / 3600 % 24);
    let (minutes, rest) = (seconds / 60 % 60, seconds % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{rest} s"),
        (0, 0, _) => format!("{minutes} min {rest} s"),
        (0, ..) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_what_is_known() {
        let plan = Plan { epochs: 200, steps: 1_000_800, batch: 256 };
        let mut record = Record::new(0, 0);
        assert_eq!(line(&plan, &record, None), "epoch 1/200  step 0/1000800");
        record.step = 1000;
        record.push(names::LOSS, 9.81234);
        record.push(names::LR, 0.03 * 0.987_654);
        record.push(names::IMAGES_PER_SECOND, 1340.4);
        record.push(names::WAIT_SHARE, 0.021);
        assert_eq!(
            line(&plan, &record, Some(1280.0)),
            "epoch 1/200  step 1000/1000800  loss 9.812  lr 0.0296  1340 images/s  waiting 2 %  \
             left 2 d 7 h"
        );
    }

    #[test]
    fn durations_have_two_units() {
        for (seconds, text) in [
            (0.4, "0 s"),
            (61.0, "1 min 1 s"),
            (3_720.0, "1 h 2 min"),
            (200_000.0, "2 d 7 h"),
            (f64::NAN, "0 s"),
        ] {
            assert_eq!(duration(seconds), text);
        }
    }

    #[test]
    fn the_template_parses() {
        assert!(ProgressStyle::with_template(TEMPLATE).is_ok());
    }
}
