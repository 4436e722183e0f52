//! Time of a training step and of its parts on the CPU: `taskset -c 1 cargo bench --bench step`.
//!
//! `DETCO` recipes in miniature, from memory, one thread. Of each, the least of all rounds, which
//! other programs on the machine disturb least.
//!
//! Or of one recipe on a GPU, from a batch that lies there; one line of JSON:
//!
//! ```text
//! cargo bench --bench step -- --recipe detco-r50 [--device cuda|cpu] [--set train.batch=256]...
//!     [--norms kernels|libtorch] [--warm-up 8] [--windows 5] [--steps 4]
//! ```
//!
//! `window_ms` is the median of so many windows of so many steps, in milliseconds a step; in a window
//! reports are read a step late, as training does it. `median_ms` is the median of steps that are
//! waited for one by one.
#![cfg(feature = "train")]

use std::collections::VecDeque;
use std::hint::black_box;
use std::time::Instant;

use detco::batch::{Batch, Form, Section, Sections};
use detco::config::{self, CROPS, Config, PATCHES};
use detco::device;
use detco::dist::local::Local;
use detco::method::parts::info_nce::total;
use detco::method::{Met, Method, Moco};
use detco::model::{Draws, Model, Norms};
use detco::optim::Sgd;
use detco::shim::step::{Meter, cuda_memory};
use detco::step::{At, launch, update};
use serde_json::json;
use tch::{Device, Kind, Tensor};

/// Recipes, layouts and precisions.
const STEPS: &[(&str, &[&str])] = &[
    ("detco-small", &["train.layout=channels-first"]),
    ("detco-small", &["train.layout=channels-last"]),
    ("detco-small", &["train.layout=channels-last", "model.bn_splits=1"]),
    ("detco-small", &["train.layout=channels-first", "model.bn_splits=1"]),
];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--recipe") {
        return one_recipe(&Options::parse(&arguments));
    }
    let measured = arguments.iter().any(|argument| argument == "--bench");
    let rounds = if measured { 7 } else { 1 };
    tch::set_num_threads(1);
    for (recipe, sets) in STEPS {
        let mut sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
        if !measured {
            sets.extend(["train.batch=8", "method.queue=16"].map(String::from));
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

/// What to measure of one recipe.
struct Options {
    recipe: String,
    sets: Vec<String>,
    device: config::Device,
    norms: Option<Norms>,
    warm_up: u64,
    windows: u64,
    steps: u64,
}

impl Options {
    /// Ends the program with what is wrong: this is a bench.
    fn parse(arguments: &[String]) -> Options {
        let mut options = Options {
            recipe: String::new(),
            sets: Vec::new(),
            device: config::Device::Auto,
            norms: None,
            warm_up: 8,
            windows: 5,
            steps: 4,
        };
        let mut rest = arguments.iter().filter(|argument| *argument != "--bench");
        while let Some(name) = rest.next() {
            let Some(value) = rest.next() else { panic!("{name} has no value") };
            let number = || value.parse().unwrap_or_else(|_| panic!("{name} {value}: no number"));
            match (name.as_str(), value.as_str()) {
                ("--recipe", _) => options.recipe.clone_from(value),
                ("--set", _) => options.sets.push(value.clone()),
                ("--device", "cuda") => options.device = config::Device::Cuda,
                ("--device", "cpu") => options.device = config::Device::Cpu,
                ("--norms", "kernels") => options.norms = Some(Norms::Kernels),
                ("--norms", "libtorch") => options.norms = Some(Norms::Libtorch),
                ("--warm-up", _) => options.warm_up = number(),
                ("--windows", _) => options.windows = number(),
                ("--steps", _) => options.steps = number(),
                _ => panic!("{name} {value} means nothing here"),
            }
        }
        assert!(options.windows > 0 && options.steps > 0, "nothing to measure");
        options
    }
}

/// Measures one recipe and prints a line of JSON.
fn one_recipe(options: &Options) {
    let config = Config::load(&options.recipe, &options.sets).unwrap_or_else(|e| panic!("{e}"));
    let found = device::find(options.device).unwrap_or_else(|error| panic!("{error}"));
    device::set_numerics(&config.train).expect("libtorch takes its settings");
    let mut model = Model::new(&config, found.device).unwrap_or_else(|error| panic!("{error}"));
    if let Some(norms) = options.norms {
        model.normalise_by(norms);
    }
    let optim = &config.optim;
    let mut sgd = Sgd::new(model.query.parameters(), optim.momentum, optim.weight_decay);
    let batch = noise(&config, found.device);
    let mut number = 0;
    let mut at = || {
        number += 1;
        At { step: number, learning_rate: 0.03 }
    };
    // The first steps plan, allocate, and try out convolutions.
    let start = Instant::now();
    for _ in 0..options.warm_up {
        update(&mut model, &mut sgd, &Local, &config, &batch, at()).expect("a step");
    }
    let warm_up = start.elapsed().as_secs_f64();
    let (mut windows, mut singles, mut losses) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..options.windows {
        let (start, mut under_way) = (Instant::now(), VecDeque::new());
        for _ in 0..options.steps {
            let next = launch(&mut model, &mut sgd, &Local, &config, &batch, at());
            under_way.push_back(next.expect("a step"));
            if under_way.len() > 1 {
                losses.extend(under_way.pop_front().map(|done| done.wait().expect("a step").loss));
            }
        }
        losses.extend(under_way.pop_front().map(|done| done.wait().expect("a step").loss));
        windows.push(start.elapsed().as_secs_f64() * 1e3 / options.steps as f64);
    }
    for _ in 0..options.windows {
        let start = Instant::now();
        update(&mut model, &mut sgd, &Local, &config, &batch, at()).expect("a step");
        singles.push(start.elapsed().as_secs_f64() * 1e3);
    }
    assert!(losses.iter().all(|loss| loss.is_finite()), "losses {losses:?}");
    let peak = match found.device {
        Device::Cuda(index) => cuda_memory(index).ok().map(|memory| memory.peak),
        _ => None,
    };
    let figures = json!({
        "recipe": options.recipe, "device": found.describe(), "batch": config.train.batch,
        "bn_splits": config.model.bn_splits, "window_ms": median(&mut windows),
        "windows_ms": windows, "median_ms": median(&mut singles), "steps": options.steps,
        "warm_up_s": warm_up, "peak_bytes": peak, "loss": losses.last(),
    });
    println!("{figures}");
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A batch of noise, as the loader would make it: noise costs a network what pictures cost it.
fn noise(config: &Config, device: Device) -> Batch {
    let form = Form::of(config, device);
    let kind = if form.bf16 { Kind::BFloat16 } else { Kind::Float };
    let images = |lead: &[i64], edge: u32| {
        let (n, edge) = (lead.iter().product::<i64>(), i64::from(edge));
        let shape = match form.channels_last {
            true => [n, edge, edge, 3],
            false => [n, 3, edge, edge],
        };
        let images = Tensor::randn(shape, (Kind::Float, device)).to_kind(kind);
        let images = if form.channels_last { images.permute([0, 3, 1, 2]) } else { images };
        images.view([lead, &[3, edge, edge]].concat().as_slice())
    };
    let (n, size) = (config.train.batch, config.crop_size());
    let global = [(); 2].map(|()| images(&[n], size));
    let local = config.patch_size().map(|patch| [(); 2].map(|()| images(&[n, 9], patch)));
    Batch::of_pairs(global, local)
}

/// Seconds of one update, and of making its batch from bytes.
fn time_step(config: &Config, rounds: u64) -> (f64, f64) {
    let mut model = Model::new(config, Device::Cpu).expect("the CPU is there");
    let optim = &config.optim;
    let mut sgd = Sgd::new(model.query.parameters(), optim.momentum, optim.weight_decay);
    let n = config.train.batch as usize;
    let [size, patch] =
        [config.crop_size(), config.patch_size().unwrap_or(0)].map(|side| side as usize);
    let bytes = |length: usize| (0..length).map(|i| (i * 37 % 251) as u8).collect::<Vec<u8>>();
    let (crops, patches) = (bytes(n * size * size * 3), bytes(n * 9 * patch * patch * 3));
    let (of_crop, of_patches) = ([size, size, 3], [9, patch, patch, 3]);
    let crops = Section { name: CROPS, shape: &of_crop, views: vec![&crops; 2] };
    let patches = Section { name: PATCHES, shape: &of_patches, views: vec![&patches; 2] };
    let sections = Sections { n, groups: vec![crops, patches] };
    let (mut least_step, mut least_slab) = (f64::INFINITY, f64::INFINITY);
    for step in 0..=rounds {
        let start = Instant::now();
        let batch = Batch::from_slab(&sections, Form::of(config, Device::Cpu))
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
        sets.into_iter().chain([format!("method.queue={}", k.max(256))]).collect();
    let config = Config::load("detco-r50", &sets).expect("a recipe with overrides is valid");
    let model = Model::new(&config, Device::Cpu).expect("the CPU is there");
    let moco: &Moco = config.method.as_a().expect("detco-r50 is a MoCo");
    let unit = |name: String| {
        let x = Draws::new(1, &name, 0).normal(&[n, moco.dim], 1.0);
        &x / x.norm_scalaropt_dim(2, [1], true)
    };
    let draw = |side: &str| -> Vec<Tensor> {
        let names = ["g", "l"].into_iter().flat_map(|s| (0..4).map(move |l| format!("{s}{l}")));
        names.map(|name| unit(format!("{side}.{name}"))).collect()
    };
    let (query, key) = (draw("query"), draw("key"));
    let leaves: Vec<Tensor> = query.iter().map(|leaf| leaf.set_requires_grad(true)).collect();
    let met = |outputs| {
        let (targets, queues) = (key.as_slice(), &model.queues);
        Met::new(outputs, targets, queues)
    };
    let by_definition = || {
        total(&moco.contrast(&met(&query))).backward();
        leaves.iter().for_each(|leaf| leaf.shallow_clone().zero_grad());
    };
    let values: Vec<Tensor> = query.iter().map(Tensor::detach).collect();
    let as_trained = || drop(black_box(moco.score(&met(&values))));
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
        println!("loss, n = {n}, k = {}: {name} {ms:.1} ms, {mb:.0} MB", moco.queue);
    }
}
