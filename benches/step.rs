//! Time of a training step and of its parts on the CPU: `taskset -c 1 cargo bench --bench step`.
//!
//! `DETCO` recipes in miniature, from memory, one thread. Of each, the least of all rounds, which
//! other programs on the machine disturb least.
#![cfg(feature = "train")]

use std::hint::black_box;
use std::time::Instant;

use detco::batch::{Batch, Form, Sections};
use detco::config::Config;
use detco::dist::local::Local;
use detco::loss::{Embeddings, Scale, contrast, score, total};
use detco::model::{Draws, Model};
use detco::optim::Sgd;
use detco::shim::step::Meter;
use detco::step::{At, update};
use tch::{Device, Tensor};

/// Recipes, layouts and precisions.
const STEPS: &[(&str, &[&str])] = &[
    ("detco-small", &["train.layout=channels-first"]),
    ("detco-small", &["train.layout=channels-last"]),
    ("detco-small", &["train.layout=channels-last", "model.bn_splits=1"]),
    ("detco-small", &["train.layout=channels-first", "model.bn_splits=1"]),
];

fn main() {
    let measured = std::env::args().any(|argument| argument == "--bench");
    let rounds = if measured { 7 } else { 1 };
    tch::set_num_threads(1);
    for (recipe, sets) in STEPS {
        let mut sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
        if !measured {
            sets.extend(["train.batch=8", "loss.queue=16"].map(String::from));
        }
        let config = Config::load(recipe, &sets).expect("a recipe with overrides is valid");
        let (step, slab) = time_step(&config, rounds);
        println!(
            "{recipe} {sets:?}: step {:.1} ms, slab to batch {:.2} ms",
            step * 1e3,
            slab * 1e3
        );
    }
    let (n, k) = if measured { (32, 65_536) } else { (4, 64) };
    time_loss(n, k, rounds);
}

/// Seconds of one update, and of making its batch from bytes.
fn time_step(config: &Config, rounds: u64) -> (f64, f64) {
    let mut model = Model::new(config, Device::Cpu).expect("the CPU is there");
    let optim = &config.optim;
    let mut sgd = Sgd::new(model.query.parameters(), optim.momentum, optim.weight_decay);
    let n = config.train.batch as usize;
    let (size, patch) =
        (config.views.global.size, config.views.local.as_ref().map_or(0, |l| l.patch));
    let (size, patch) = (size as usize, patch as usize);
    let bytes = |length: usize| (0..length).map(|i| (i * 37 % 251) as u8).collect::<Vec<u8>>();
    let (crops, patches) = (bytes(n * size * size * 3), bytes(n * 9 * patch * patch * 3));
    let (global, local) = ([&crops[..]; 2], Some([&patches[..]; 2]));
    let sections = Sections { global, local, n, size, patch };
    let (mut least_step, mut least_slab) = (f64::INFINITY, f64::INFINITY);
    for step in 0..=rounds {
        let start = Instant::now();
        let batch = Batch::from_slab(sections, Form::of(config, Device::Cpu))
            .expect("sections have their lengths");
        let slab = start.elapsed().as_secs_f64();
        let at = At { step, learning_rate: 0.01 };
        let start = Instant::now();
        let report = update(&mut model, &mut sgd, &Local, config, &batch, at)
            .expect("the batch fits the config");
        let seconds = start.elapsed().as_secs_f64();
        black_box(report);
        least_slab = least_slab.min(slab);
        // The first round plans and allocates.
        if step > 0 {
            least_step = least_step.min(seconds);
        }
    }
    (least_step, least_slab)
}

/// Twelve terms by the definition with automatic gradients, and as training has them.
fn time_loss(n: i64, k: i64, rounds: u64) {
    let sets = ["model.backbone=resnet18".to_string(), "model.width=1".into()];
    let sets: Vec<String> =
        sets.into_iter().chain([format!("loss.queue={}", k.max(256))]).collect();
    let config = Config::load("detco-r50", &sets).expect("a recipe with overrides is valid");
    let model = Model::new(&config, Device::Cpu).expect("the CPU is there");
    let unit = |name: String| {
        let x = Draws::new(1, &name, 0).normal(&[n, config.model.dim], 1.0);
        &x / x.norm_scalaropt_dim(2, [1], true)
    };
    let draw = |side: &str| Embeddings {
        global: (0..4).map(|level| unit(format!("{side}.g{level}"))).collect(),
        local: (0..4).map(|level| unit(format!("{side}.l{level}"))).collect(),
    };
    let (query, key) = (draw("query"), draw("key"));
    let leaves: Vec<Tensor> = query.all().iter().map(|leaf| leaf.set_requires_grad(true)).collect();
    let (weights, temperature) = (&config.loss.level_weights, config.loss.temperature);
    let scale = Scale { temperature, level_weights: weights, share: 1.0 };
    let by_definition = || {
        let terms = contrast(&query, &key, &model.queues, temperature);
        total(&terms, weights).backward();
        leaves.iter().for_each(|leaf| leaf.shallow_clone().zero_grad());
    };
    let values = query.detach();
    let as_trained = || drop(black_box(score(&values, &key, &model.queues, scale)));
    let ways: [(&str, &dyn Fn()); 2] =
        [("definition", &by_definition), ("as trained", &as_trained)];
    for (name, way) in ways {
        let mut least = f64::INFINITY;
        let mut peak = 0;
        for _ in 0..rounds {
            let meter = Meter::begin().expect("counting needs nothing");
            let start = Instant::now();
            way();
            least = least.min(start.elapsed().as_secs_f64());
            peak = meter.read().expect("counting needs nothing").1;
        }
        let (ms, mb) = (least * 1e3, peak as f64 / 1e6);
        println!("loss, n = {n}, k = {}: {name} {ms:.1} ms, {mb:.0} MB", config.loss.queue);
    }
}
