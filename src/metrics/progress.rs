//! The line for the person watching: a bar that stays in place on a terminal, now and then a plain
//! line elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::Pace;

/// Time between lines in a log file.
const LINE_EVERY: Duration = Duration::from_secs(30);

/// Weight of the newest step in the time left: steady over some fifty steps.
const NEWEST: f64 = 0.02;

const TEMPLATE: &str = "{bar:24} {msg}";

/// Shows where a run is, on standard error.
#[derive(Debug)]
pub(super) struct Progress {
    steps: u64,
    speed: Speed,
    /// Learning rate, once it is known.
    rate: Option<f64>,
    /// When the last update came, unless something else took its time since.
    last: Option<(u64, Instant)>,
    output: Output,
}

#[derive(Debug)]
enum Output {
    Bar(ProgressBar),
    Lines { last: Option<Instant> },
}

impl Progress {
    /// A bar where standard error is a terminal, else a line every half minute.
    pub(super) fn new(step: u64, steps: u64) -> Progress {
        let output = if std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr());
            // The template is a constant that a test parses; without it the bar is merely plainer.
            if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
                bar.set_style(style.progress_chars("━╸ "));
            }
            bar.set_position(step);
            Output::Bar(bar)
        } else {
            Output::Lines { last: None }
        };
        Progress { steps, speed: Speed::default(), rate: None, last: None, output }
    }

    /// Shows this learning rate from now on.
    pub(super) fn learning_rate(&mut self, rate: f64) {
        self.rate = Some(rate);
    }

    pub(super) fn update(&mut self, step: u64, loss: f64, pace: &Pace) {
        let now = Instant::now();
        if let Some((before, then)) = self.last.replace((step, now)) {
            self.speed.add(step.saturating_sub(before), now - then);
        }
        let line = || line((step, self.steps), loss, self.rate, pace, self.speed.seconds_a_step);
        match &mut self.output {
            Output::Bar(bar) => {
                bar.set_position(step);
                bar.set_message(line());
            }
            Output::Lines { last } => {
                let due = last.is_none_or(|last| now - last >= LINE_EVERY);
                if due || step >= self.steps {
                    eprintln!("{}", line());
                    *last = Some(now);
                }
            }
        }
    }

    pub(super) fn message(&mut self, text: &str) {
        self.last = None;
        match &self.output {
            Output::Bar(bar) => bar.suspend(|| eprintln!("{text}")),
            Output::Lines { .. } => eprintln!("{text}"),
        }
    }

    pub(super) fn finish(&self) {
        if let Output::Bar(bar) = &self.output {
            bar.abandon();
        }
    }
}

/// Seconds a step takes, smoothed: at first the plain mean.
#[derive(Debug, Default)]
struct Speed {
    seconds_a_step: Option<f64>,
    seen: u32,
}

impl Speed {
    fn add(&mut self, steps: u64, took: Duration) {
        if steps == 0 {
            return;
        }
        let now = took.as_secs_f64() / steps as f64;
        self.seen = self.seen.saturating_add(1);
        let weight = NEWEST.max(1.0 / f64::from(self.seen));
        let before = self.seconds_a_step.unwrap_or(now);
        self.seconds_a_step = Some(before + weight * (now - before));
    }
}

/// `step 1200/100000  epoch 3.25  loss 9.812  lr 0.03  1342 images/s  waiting for data 2 %  left
/// 2 d 5 h`.
fn line(
    (step, steps): (u64, u64),
    loss: f64,
    rate: Option<f64>,
    pace: &Pace,
    seconds_a_step: Option<f64>,
) -> String {
    let rate = rate.map(|rate| format!("  lr {}", short(rate))).unwrap_or_default();
    let left = seconds_a_step
        .map(|seconds| format!("  left {}", duration(steps.saturating_sub(step) as f64 * seconds)))
        .unwrap_or_default();
    format!(
        "step {step}/{steps}  epoch {:.2}  loss {loss:.3}{rate}  {:.0} images/s  waiting for data \
         {:.0} %{left}",
        pace.epoch,
        pace.images_per_second,
        pace.waiting_share * 100.0
    )
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
        let pace = Pace { epoch: 0.2, images_per_second: 1340.4, waiting_share: 0.021 };
        let at = (1000, 1_000_800);
        assert_eq!(
            line(at, 9.81234, None, &pace, None),
            "step 1000/1000800  epoch 0.20  loss 9.812  1340 images/s  waiting for data 2 %"
        );
        assert_eq!(
            line(at, 9.81234, Some(0.029_63), &pace, Some(0.2)),
            "step 1000/1000800  epoch 0.20  loss 9.812  lr 0.0296  1340 images/s  waiting for data \
             2 %  left 2 d 7 h"
        );
    }

    #[test]
    fn speed_starts_as_the_mean_and_then_follows() {
        let mut speed = Speed::default();
        for seconds in [2, 4, 6] {
            speed.add(1, Duration::from_secs(seconds));
        }
        assert_eq!(speed.seconds_a_step, Some(4.0));
        speed.add(0, Duration::from_secs(100)); // the same step twice
        for _ in 0..500 {
            speed.add(2, Duration::from_secs(2));
        }
        let seconds = speed.seconds_a_step.unwrap();
        assert!((seconds - 1.0).abs() < 0.01, "{seconds}");
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
