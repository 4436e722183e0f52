//! `detco train --dry-run`: everything up to the first step, and what the run will take.

use std::fmt::Write;
use std::path::Path;

use detco_shards::order::Order;
use detco_shards::stream::ShardSet;
use tch::Device;

use crate::config::{self, Config, Schedule};
use crate::data::{self, BadHeader};
use crate::device;
use crate::disk::Disk;
use crate::feed::{self, Way};
use crate::memory::{self, Needs};
use crate::model::Model;
use crate::profile::machine;
use crate::schedule::{learning_rate, only_filling, steps_in_all, steps_to_fill};
use crate::shim::c10d::Member;
use crate::shim::step as shim;
use crate::train::{self, Monitor, TrainError};

/// Of a card's free memory, what may be planned with: its allocator leaves gaps.
const USABLE: f64 = 0.95;

/// Opens the shards and the monitor's, and says what a run of this config on `ranks` ranks of this machine, in
/// the folder `run`, would be: samples, steps, learning rates, memory, room for checkpoints. Compares memory with
/// what is free and names the `train.accumulate` that fits. The model itself is made only to hold a file of
/// initial weights against it. Writes nothing.
///
/// # Errors
/// As a run would end before its first step.
pub fn report(config: &Config, ranks: usize, run: Option<&Path>) -> Result<String, TrainError> {
    config.validate()?;
    if config.data.shards.is_empty() {
        return Err(TrainError::NoData);
    }
    let set = data::open(&config.data.shards, &config.data)?;
    let window = data::window(config.data.window, &set)?;
    let order = data::order(window, &set, config.train.batch as u64, config.seed)?;
    let config = &train::config_of_rank(config, ranks)?;
    let last = Member { rank: ranks - 1, size: ranks };
    train::device(config.train.device, last, ranks - 1, false)?; // a GPU for each rank
    let found = device::find(config.train.device)?;
    let mut text = String::new();
    let out = &mut text;
    amounts(out, config, &set, &order);
    let rates = rates(config, &order);
    let _ = writeln!(out, "learning rate  {rates}"); // a String takes everything
    let precision = if device::in_bf16(&config.train, found.device) { "bf16" } else { "f32" };
    let on = match ranks {
        1 => String::new(),
        ranks => format!("{ranks} ranks, each on "),
    };
    let _ = writeln!(out, "on             {on}{}, {precision}", found.describe());
    let way = {
        // Closed again before the GPU is asked what is free.
        let decoding = feed::decoding(config, &found)?;
        let _ = writeln!(out, "decoding with  {decoding}");
        Way::of(&decoding)
    };
    if let Some(monitor) = Monitor::open(config)? {
        let _ = writeln!(out, "kNN monitor    {monitor}");
    }
    memory_of(out, config, ranks, (found.device, way))?;
    if let Some(disk) = run.and_then(|run| Disk::of(config, run)) {
        train::check_room(&disk)?;
        let _ = writeln!(out, "checkpoints    {disk}");
    }
    for warning in data::oddities(config, &set, &order) {
        let _ = writeln!(out, "warning: {warning}");
    }
    if let Some(bad) = data::first_bad_header(&set, HEADERS) {
        let _ = writeln!(out, "{}", foretold(config, &bad));
    }
    if config.model.init.is_some() {
        train::start_from(&mut Model::new(config, Device::Cpu)?, &config.model)?;
    }
    Ok(text)
}

/// Image headers that are looked at, spread evenly: a second or two.
const HEADERS: u64 = 10_000;

/// What a sample that cannot be used comes to in a run.
fn foretold(config: &Config, bad: &BadHeader) -> String {
    let comes_to = match config.data.on_bad_sample {
        config::OnBadSample::Fail => "train will stop (data.on_bad_sample = \"fail\")",
        config::OnBadSample::Skip => "train will replace it (data.on_bad_sample = \"skip\")",
    };
    format!("warning: {bad}: {comes_to}")
}

fn memory_of(
    out: &mut String,
    config: &Config,
    ranks: usize,
    (device, way): (Device, Way),
) -> Result<(), TrainError> {
    let needs = Needs::of(config, ranks, device, way);
    let (batch, parts) = (config.train.batch / ranks as i64, config.train.accumulate);
    let of = if ranks == 1 { "" } else { " of each rank" };
    let _ = writeln!(out, "memory         batch {batch}{of} in {parts} micro-batches:\n{needs}");
    let gpus = if device.is_cuda() { ranks } else { 0 };
    let mut free = match gpus {
        // The ranks share the host's.
        0 => machine::memory_left().and_then(|bytes| i64::try_from(bytes / ranks as u64).ok()),
        _ => None,
    };
    for index in 0..gpus {
        let card = shim::cuda_memory(index)?.free;
        free = Some(free.map_or(card, |least: i64| least.min(card)));
    }
    if let Some(free) = free {
        let _ = writeln!(out, "{}", advice(config, ranks, (device, way), free));
    }
    Ok(())
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
        return format!("0: {} (method.fill_first)", only_filling(steps));
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

/// Whether it fits where so many bytes are free for each rank, and else what would.
fn advice(config: &Config, ranks: usize, (device, way): (Device, Way), free: i64) -> String {
    let usable = (free as f64 * USABLE) as i64;
    let gigabytes = |bytes: i64| bytes as f64 / 1e9;
    let need = Needs::of(config, ranks, device, way).sum();
    let of = if ranks == 1 { "" } else { " for each rank" };
    let compared = format!("{:.1} of {:.1} GB free{of}", gigabytes(need), gigabytes(free));
    if need <= usable {
        return format!("fits: {compared}");
    }
    match memory::accumulate_for(config, ranks, device, way, usable) {
        Some(parts) => format!("does not fit: {compared}\nhint: --set train.accumulate={parts}"),
        None => {
            let lighter = config.design().lighter;
            let or = if lighter.is_empty() { "" } else { ", " };
            format!(
                "does not fit: {compared}, nor in micro-batches of one BN group\n\
                 hint: lower train.batch{or}{lighter}"
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_that_is_too_small_gets_advice() {
        let sets = ["model.width=8", "method.local_head=pirl", "method.queue=1024"];
        let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
        let config = Config::load("detco-r50", &sets).unwrap();
        let on = (Device::Cuda(0), Way::Copied);
        let need = Needs::of(&config, 1, on.0, on.1).sum();
        let whole = need;
        let with = |free: f64| advice(&config, 1, on, free as i64);
        assert!(with(need as f64 / 0.94).starts_with("fits"));
        assert!(with(need as f64 * 0.95).ends_with("train.accumulate=2"));
        assert!(with(1e6).contains("nor in micro-batches"));
        // Two ranks share the batch and its BN groups, of which each has four.
        let need = Needs::of(&config, 2, on.0, on.1).sum();
        let with = |free: f64| advice(&config, 2, on, free as i64);
        assert!(with(need as f64 / 0.94).starts_with("fits") && need < whole);
        assert!(with(need as f64 * 0.95).ends_with("train.accumulate=2"));
    }
}
