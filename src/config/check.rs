//! What types cannot check: ranges, divisibility, matching lengths.

use super::Config;
use super::error::ConfigError;
use super::tables::Optimizer;
use crate::method::Around;

/// Samples of an update: four times the largest batch that anybody trains with.
const BATCH_MAX: i64 = 1 << 20;

/// Bytes of the cache.
const CACHE_MAX: u64 = 1 << 60;

impl Config {
    /// Checks what types cannot: ranges, divisibility, matching lengths.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let m = &self.model;
        let batch = self.train.batch;
        let seed = self.seed;
        check("seed", seed, i64::try_from(seed).is_ok(), "at most 2^63 - 1, as TOML has it")?;
        let reason = format!("1 to {BATCH_MAX}");
        check("train.batch", batch, (1..=BATCH_MAX).contains(&batch), reason)?;
        check("train.epochs", self.train.epochs, self.train.epochs >= 1, "at least 1")?;
        // Where the system has no more threads, libtorch waits for them for ever.
        let threads = self.train.threads;
        check("train.threads", threads, (0..=1024).contains(&threads), "0 to 1024")?;
        check("model.width", m.width, (1..=512).contains(&m.width), "1 to 512")?;
        check("model.bn_splits", m.bn_splits, m.bn_splits >= 1, "at least 1")?;
        let whole = m.bn_splits >= 1 && batch % m.bn_splits == 0;
        check(
            "model.bn_splits",
            m.bn_splits,
            whole,
            format!("a divisor of train.batch = {batch}"),
        )?;
        // A group of one sample has no variance at Res5 of a 32-pixel image.
        let pairs = m.bn_splits >= 1 && batch / m.bn_splits >= 2;
        check("model.bn_splits", m.bn_splits, pairs, "at least 2 samples in a BN group")?;
        let a = self.train.accumulate;
        let reason =
            format!("a divisor of model.bn_splits = {}: BN groups stay whole", m.bn_splits);
        check("train.accumulate", a, a >= 1 && m.bn_splits % a == 0, reason)?;
        let lr = self.optim.lr;
        check("optim.lr", lr, lr.is_finite() && lr >= 0.0, "finite, 0 or more")?;
        check("optim.lr_batch", self.optim.lr_batch, self.optim.lr_batch >= 1, "at least 1")?;
        let reason = format!(
            "finite times train.batch / optim.lr_batch = {batch} / {}",
            self.optim.lr_batch
        );
        check("optim.lr", lr, self.base_lr().is_finite(), reason)?;
        let momentum = self.optim.momentum;
        check("optim.momentum", momentum, (0.0..1.0).contains(&momentum), "0 to below 1")?;
        let decay = self.optim.weight_decay;
        check("optim.weight_decay", decay, decay.is_finite() && decay >= 0.0, "finite, 0 or more")?;
        let trust = self.optim.trust;
        check("optim.trust", trust, trust.is_finite() && trust > 0.0, "above 0")?;
        let (warm, epochs) = (self.optim.warmup_epochs, self.train.epochs);
        let reason = format!("below train.epochs = {epochs}");
        check("optim.warmup_epochs", warm, warm == 0 || warm < epochs, reason)?;
        let start = self.optim.warmup_start;
        check("optim.warmup_start", start, (0.0..=1.0).contains(&start), "0 to 1")?;
        let end = self.optim.cosine_end;
        check("optim.cosine_end", end, (0.0..=1.0).contains(&end), "0 to 1")?;
        let factor = self.optim.milestone_factor;
        check("optim.milestone_factor", factor, (0.0..=1.0).contains(&factor), "0 to 1")?;
        let looks_ahead = self.optim.nesterov;
        let possible = self.optim.optimizer == Optimizer::Sgd && momentum > 0.0;
        let reason = "false, or optim.optimizer = \"sgd\" with a momentum";
        check("optim.nesterov", looks_ahead, !looks_ahead || possible, reason)?;
        let size = self.data.cache_size.0;
        check("data.cache_size", size, size <= CACHE_MAX, "at most 1 EiB")?;
        let workers = self.data.workers;
        check("data.workers", workers, workers <= 1024, "0 to 1024")?;
        let ahead = self.data.batches_ahead;
        check("data.batches_ahead", ahead, (1..=64).contains(&ahead), "1 to 64")?;
        let fetches = self.data.fetches;
        check("data.fetches", fetches, (1..=1024).contains(&fetches), "1 to 1024")?;
        let share = self.data.bad_share_max;
        check("data.bad_share_max", share, (0.0..=1.0).contains(&share), "0 to 1")?;
        let d = &self.dist;
        let (slow, timeout) = (d.slow_seconds, d.timeout_seconds);
        check("dist.timeout_seconds", timeout, (1..=86_400).contains(&timeout), "1 to 86400")?;
        let reason = format!("1 to dist.timeout_seconds = {timeout}");
        check("dist.slow_seconds", slow, (1..=timeout).contains(&slow), reason)?;
        let mb = d.bucket_mb;
        check("dist.bucket_mb", mb, (1..=4096).contains(&mb), "1 to 4096")?;
        check("checkpoint.keep", self.checkpoint.keep, self.checkpoint.keep >= 1, "at least 1")?;
        let every = self.monitor.every_steps;
        check("monitor.every_steps", every, every >= 1, "at least 1")?;
        let collapse = self.monitor.collapse_share;
        check("monitor.collapse_share", collapse, (0.0..1.0).contains(&collapse), "0 to below 1")?;
        self.views.validate()?;
        self.check_method()
    }

    /// Checks the method's keys, and what it declares.
    fn check_method(&self) -> Result<(), ConfigError> {
        let around = Around { batch: self.train.batch, views: &self.views };
        self.method.check(&around)?;
        let design = self.design();
        let (key, name) = ("method.name", self.method.name());
        for group in &design.groups {
            let reason = format!("a recipe with the group of views {group:?}, which it trains on");
            check(key, name, self.views.group(group).is_some(), reason)?;
        }
        let mut widths = design.outputs().filter(|head| head.unit).map(|head| head.width);
        let first = widths.next();
        let reason = "outputs of unit length to be of one width";
        check(key, name, widths.all(|width| Some(width) == first), reason)?;
        let reason = "heads to read maps, or heads before them of the same scope and level";
        check(key, name, design.reads_what_is_there(), reason)?;
        let whole = !design.groups.is_empty() && design.outputs().next().is_some();
        let reason = "a group of views, a pass and a head";
        check(key, name, whole && design.readings.first() == Some(&"loss"), reason)
    }
}

fn check(
    key: &'static str,
    value: impl ToString,
    holds: bool,
    reason: impl Into<String>,
) -> Result<(), ConfigError> {
    if holds {
        return Ok(());
    }
    let reason = format!("expected {}", reason.into());
    Err(ConfigError::Value { key, value: value.to_string(), reason })
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, ConfigError};

    #[test]
    fn values_that_make_no_sense_are_refused_by_name() {
        for (text, key) in [
            ("train.batch=0", "train.batch"),
            ("method.queue=1000", "method.queue"),
            ("model.bn_splits=7", "model.bn_splits"),
            ("train.accumulate=3", "train.accumulate"),
            ("method.levels=[5,2]", "method.levels"),
            ("method.level_weights=[1.0]", "method.level_weights"),
            ("method.temperature=0", "method.temperature"),
            ("method.ema=1.5", "method.ema"),
            ("optim.lr=nan", "optim.lr"),
        ] {
            let error = Config::load("detco-r50", &[text.into()]).unwrap_err();
            assert!(
                matches!(&error, ConfigError::Value { key: k, .. } if *k == key),
                "{text}: {error}"
            );
        }
        let error = Config::load("detco-r50", &["train.batch".into()]).unwrap_err();
        assert!(matches!(error, ConfigError::Set { .. }), "{error}");
    }
}
