//! The learning rate of a step: arithmetic on the config, no state.

use crate::config::{Config, Schedule, SchedulePer};
use crate::method::{EmaSchedule, TeacherDesign};

/// Learning rate of step `step` of epoch `epoch`, both from 0: the base rate, scaled linearly with
/// the batch, times the warm-up or the schedule; 0 while the method only fills its queues.
pub fn learning_rate(config: &Config, epoch: u32, step: u64, steps_per_epoch: u64) -> f64 {
    let steps_before = u64::from(epoch).saturating_mul(steps_per_epoch).saturating_add(step);
    if steps_before < steps_to_fill(config) {
        return 0.0;
    }
    let fractional = f64::from(epoch) + step as f64 / steps_per_epoch.max(1) as f64;
    let warmup = f64::from(config.optim.warmup_epochs);
    if fractional < warmup {
        let start = config.optim.warmup_start;
        return config.base_lr() * (start + (1.0 - start) * fractional / warmup);
    }
    let position = match config.optim.schedule_per {
        SchedulePer::Epoch => f64::from(epoch),
        SchedulePer::Step => fractional,
    };
    let factor = match config.optim.schedule {
        Schedule::Cosine => {
            let share = (position - warmup) / (f64::from(config.train.epochs) - warmup);
            let share = share.min(1.0);
            let cosine = 0.5 * (1.0 + (std::f64::consts::PI * share).cos());
            let end = config.optim.cosine_end;
            end + (1.0 - end) * cosine
        }
        Schedule::Steps => {
            let passed = config.optim.milestones.iter().filter(|m| f64::from(**m) <= position);
            config.optim.milestone_factor.powi(passed.count() as i32)
        }
    };
    config.base_lr() * factor
}

/// Says of a run of so many updates that all of them only fill the queues.
pub(crate) fn only_filling(steps: u64) -> String {
    match steps {
        1 => "the only update just fills the queues".to_owned(),
        steps => format!("all {steps} updates only fill the queues"),
    }
}

/// Updates that only fill the queues.
pub fn steps_to_fill(config: &Config) -> u64 {
    (config.design().fill / config.train.batch.max(1)) as u64
}

/// Momentum of the teacher for the update after `done` of `steps`.
pub fn ema(teacher: TeacherDesign, done: u64, steps: u64) -> f64 {
    match teacher.schedule {
        EmaSchedule::Constant => teacher.ema,
        EmaSchedule::Cosine => {
            let share = (done as f64 / steps.max(1) as f64).min(1.0);
            1.0 - (1.0 - teacher.ema) * 0.5 * (1.0 + (std::f64::consts::PI * share).cos())
        }
    }
}

/// Updates of a whole run.
pub fn steps_in_all(config: &Config, steps_per_epoch: u64) -> u64 {
    let steps = u64::from(config.train.epochs).saturating_mul(steps_per_epoch);
    match config.train.steps_max {
        0 => steps,
        most => steps.min(most),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() <= 1e-15 + 1e-12 * b.abs(), "{a} {b}");
    }

    #[test]
    fn cosine_falls_once_an_epoch_or_every_step() {
        let mut config = Config::default();
        close(learning_rate(&config, 0, 4999, 5000), 0.03);
        close(learning_rate(&config, 100, 0, 5000), 0.015);
        close(learning_rate(&config, 50, 10, 5000), 0.015 * (1.0 + 0.5_f64.sqrt()));
        close(learning_rate(&config, 200, 0, 5000), 0.0);
        config.optim.schedule_per = SchedulePer::Step;
        close(learning_rate(&config, 99, 5000, 5000), 0.015);
        config.optim.cosine_end = 0.1;
        close(learning_rate(&config, 0, 0, 5000), 0.03);
        close(learning_rate(&config, 100, 0, 5000), 0.03 * 0.55);
        close(learning_rate(&config, 200, 0, 5000), 0.003);
        config.optim.cosine_end = 0.0;
        assert!(learning_rate(&config, 0, 1, 5000) < 0.03);
    }

    #[test]
    fn the_rate_rises_step_by_step_and_falls_after_the_warm_up() {
        let mut config = Config::load("simclr-r50", &[]).unwrap();
        let of = |config: &Config, epoch, step| learning_rate(config, epoch, step, 100);
        close(of(&config, 0, 0), 0.0);
        close(of(&config, 2, 50), 0.3 * 0.25);
        close(of(&config, 10, 0), 0.3);
        close(of(&config, 105, 0), 0.15);
        assert!(of(&config, 105, 1) < 0.15);
        config.optim.warmup_start = 0.2;
        close(of(&config, 5, 0), 0.3 * 0.6);
        let rotation = Config::load("rotation-cifar", &[]).unwrap();
        close(of(&rotation, 0, 0), 0.1);
        close(of(&rotation, 120, 3), 0.1 * 0.04);
    }

    #[test]
    fn the_rate_is_zero_until_the_queues_are_full() {
        let config = Config::load("detco-r50", &["method.fill_first=true".into()]).unwrap(); // 65,536 keys of 256 samples: 256 steps
        close(learning_rate(&config, 0, 255, 5000), 0.0);
        close(learning_rate(&config, 0, 256, 5000), 0.03);
        close(learning_rate(&config, 2, 55, 100), 0.0);
        assert!(learning_rate(&config, 2, 56, 100) > 0.0);
    }

    #[test]
    fn the_teachers_momentum_stays_or_rises_to_1() {
        let of = |set: &str| {
            let config = Config::load("detco-r50", &[set.into()]).unwrap();
            config.design().teacher.unwrap()
        };
        close(ema(of("method.ema_schedule=constant"), 70, 100), 0.999);
        let rising = of("method.ema_schedule=cosine");
        for (done, expected) in [(0, 0.999), (50, 0.9995), (100, 1.0), (200, 1.0)] {
            close(ema(rising, done, 100), expected);
        }
    }

    #[test]
    fn steps_fall_at_milestones_and_the_batch_scales() {
        let config = Config::load("moco-v1-r50", &["train.batch=128".into()]).unwrap();
        for (epoch, expected) in [(0, 0.015), (119, 0.015), (120, 0.0015), (160, 0.00015)] {
            close(learning_rate(&config, epoch, 7, 100), expected);
        }
    }
}
