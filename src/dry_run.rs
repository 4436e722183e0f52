//! `detco train --dry-run`: everything up to the first step, and what the run will take.

use std::fmt::Write;

use detco_shards::order::Order;
use detco_shards::stream::ShardSet;
use tch::Device;

use crate::config::{Config, Schedule};
use crate::data;
use crate::device;
use crate::feed::{self, Way};
use crate::memory::{self, Needs};
use crate::model::Model;
use crate::profile::machine;
use crate::schedule::{learning_rate, steps_in_all, steps_to_fill};
use crate::shim::step as shim;
use crate::train::{self, TrainError};

/// Of a card's free memory, what may be planned with: its allocator leaves gaps.
const USABLE: f64 = 0.95;

/// Opens the shards, makes the model, and says what a run of this config would be: samples, steps,
/// learning rates, memory. On a GPU it compares the memory with what is free and names the
/// `train.accumulate` that fits. Writes nothing.
///
/// # Errors
/// As a run would end before its first step.
pub fn report(config: &Config) -> Result<String, TrainError> {
    config.validate()?;
    if config.data.shards.is_empty() {
        return Err(TrainError::NoData);
    }
    let set = data::open(&config.data.shards, &config.data)?;
    let window = data::window(config.data.window, &set)?;
    let order = data::order(window, &set, config.train.batch as u64, config.seed)?;
    let found = device::find(config.train.device)?;
    let mut text = String::new();
    let out = &mut text;
    amounts(out, config, &set, &order);
    let rates = rates(config, &order);
    let _ = writeln!(out, "learning rate  {rates}"); // a String takes everything
    let precision = if device::in_bf16(&config.train, found.device) { "bf16" } else { "f32" };
    let _ = writeln!(out, "on             {}, {precision}", found.describe());
    let way = {
        // Closed again before the GPU is asked what is free.
        let decoding = feed::decoding(config, &found)?;
        let _ = writeln!(out, "decoding with  {decoding}");
        Way::of(&decoding)
    };
    let mut model = Model::new(config, Device::Cpu)?;
    if let Some(init) = &config.model.init {
        train::start_from(&mut model, init)?;
    }
    let needs = Needs::of(&model, config, found.device, way);
    let (batch, parts) = (config.train.batch, config.train.accumulate);
    let _ = writeln!(out, "memory         batch {batch} in {parts} micro-batches:\n{needs}");
    let free = match found.device {
        Device::Cuda(index) => Some(shim::cuda_memory(index)?.free),
        _ => machine::memory_left().and_then(|bytes| i64::try_from(bytes).ok()),
    };
    if let Some(free) = free {
        let _ = writeln!(out, "{}", advice(&model, config, (found.device, way), free));
    }
    Ok(text)
}

fn amounts(out: &mut String, config: &Config, set: &ShardSet, order: &Order) {
    let steps = steps_in_all(config, order.steps_per_epoch());
    let (samples, each) = (set.len(), order.steps_per_epoch());
    let _ = writeln!(out, "samples        {samples}");
    let _ = writeln!(out, "steps          {steps}: {} epochs of {each}", config.train.epochs);
}

/// `0.03, cosine to 0` and the like.
fn rates(config: &Config, order: &Order) -> String {
    let each = order.steps_per_epoch().max(1);
    let at = |step: u64| learning_rate(config, (step / each) as u32, step % each, each);
    let (fill, steps) = (steps_to_fill(config), steps_in_all(config, each));
    if fill >= steps {
        return format!("0: all {steps} updates only fill the queues (loss.fill_first)");
    }
    let (first, last) = (at(fill), at(steps - 1));
    let filling = match fill {
        0 => String::new(),
        fill => format!(", after {fill} updates that fill the queues"),
    };
    let kind = match config.optim.schedule {
        Schedule::Cosine => "cosine",
        Schedule::Steps => "steps",
    };
    format!("{first} at first{filling}, {last:.3e} in the last step ({kind})")
}

/// Whether it fits where so many bytes are free, and else what would.
fn advice(model: &Model, config: &Config, (device, way): (Device, Way), free: i64) -> String {
    let usable = (free as f64 * USABLE) as i64;
    let gigabytes = |bytes: i64| bytes as f64 / 1e9;
    let need = Needs::of(model, config, device, way).sum();
    let compared = format!("{:.1} of {:.1} GB free", gigabytes(need), gigabytes(free));
    if need <= usable {
        return format!("fits: {compared}");
    }
    match memory::accumulate_for(model, config, device, way, usable) {
        Some(parts) => format!("does not fit: {compared}\nhint: --set train.accumulate={parts}"),
        None => format!(
            "does not fit: {compared}, nor in micro-batches of one BN group\n\
             hint: lower train.batch, or model.local_head = \"pirl\""
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_that_is_too_small_gets_advice() {
        let sets = ["model.width=8", "model.local_head=pirl", "loss.queue=1024"];
        let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
        let config = Config::load("detco-r50", &sets).unwrap();
        let model = Model::new(&config, Device::Cpu).unwrap();
        let on = (Device::Cuda(0), Way::Copied);
        let need = Needs::of(&model, &config, on.0, on.1).sum();
        let with = |free: f64| advice(&model, &config, on, free as i64);
        assert!(with(need as f64 / 0.94).starts_with("fits"));
        assert!(with(need as f64 * 0.95).ends_with("train.accumulate=2"));
        assert!(with(1e6).contains("nor in micro-batches"));
    }
}
