//! Checks of keys that several methods have.

use super::{Refused, refuse_unless};

/// Keys of a queue: thirteen times ImageNet's images.
const QUEUE_MAX: i64 = 1 << 24;

/// Embedding size, or that of another layer.
pub(super) fn width(key: &'static str, width: i64) -> Result<(), Refused> {
    refuse_unless((2..=8192).contains(&width), key, width, "2 to 8192")
}

/// What logits are divided by.
pub(super) fn temperature(t: f64) -> Result<(), Refused> {
    refuse_unless(t.is_finite() && t > 0.0, "method.temperature", t, "above 0")
}

/// Momentum of a key encoder.
pub(super) fn ema(ema: f64) -> Result<(), Refused> {
    refuse_unless((0.0..=1.0).contains(&ema), "method.ema", ema, "0 to 1")
}

/// Length of a queue, which a whole number of batches fills.
pub(super) fn queue(queue: i64, batch: i64) -> Result<(), Refused> {
    let reason = format!("a positive multiple of train.batch = {batch}, at most {QUEUE_MAX}");
    let legal = (1..=QUEUE_MAX).contains(&queue) && batch > 0 && queue % batch == 0;
    refuse_unless(legal, "method.queue", queue, reason)
}
