//! DenseCL, BYOL, SwAV and Jigsaw against PyTorch: same weights, same views, same shuffles, compared after every step.
//!
//! The other side is `tools/reference/methods_reference.py`, written from the papers' equations, with torchvision's
//! ResNet inside and autograd's gradients. As in `tests/parity.rs`, which explains the bounds: five free steps in
//! float64 to 1e-7, and in float32 steps that each begin with the reference's state.
#![cfg(feature = "train")]

#[expect(dead_code, reason = "other pixels are not tried here")]
#[path = "support/comparison.rs"]
mod comparison;
#[path = "support/numerical.rs"]
mod numerical;
#[path = "support/reference.rs"]
mod reference;

use std::collections::HashMap;

use comparison::{Allowed, Comparison};
use detco::batch::Batch;
use detco::config::{Backbone, Config};
use detco::dist::local::Local;
use detco::model::{Draws, Model};
use detco::optim::Sgd;
use detco::step::{At, permutation, update};
use detco_shards::views::{Note, Rect};
use numerical::set_threads;
use reference::{Reference, STEPS, dtype};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

/// In which of a set's orders a view's patches lie.
fn note(order: i64) -> Note {
    let crop = Rect { left: 0, top: 0, width: 64, height: 64 };
    let permutation = Some(order as u32);
    Note { picture: [64, 64], crop, flip: false, rotation: 0, permutation }
}

/// Blobs of colour and some noise, which differ as photographs do.
fn picture(name: &str, view: u64, n: i64, edge: i64) -> Tensor {
    let blobs = Draws::new(7, name, 0).normal(&[n, 3, 4, 4], 1.0);
    let blobs = blobs.upsample_bilinear2d([edge, edge], false, None, None);
    blobs + Draws::new(8, name, view).normal(&[n, 3, edge, edge], 0.3)
}

/// Puts the reference's state in the place of ours.
fn follow(model: &mut Model, sgd: &mut Sgd, theirs: Vec<(String, Tensor)>) {
    let of_model = |name: &str| ["query.", "key.", "queue."].iter().any(|p| name.starts_with(p));
    let (state, rest): (Vec<_>, Vec<_>) = theirs.into_iter().partition(|(name, _)| of_model(name));
    model.load(&state).unwrap();
    let rest: HashMap<String, Tensor> = rest.into_iter().collect();
    let momentum = sgd.tensors().into_iter().map(|(name, ours)| {
        let found = rest.get(&format!("momentum.{name}"));
        (name, found.map_or(ours, Tensor::copy))
    });
    let momentum: Vec<_> = momentum.collect();
    sgd.load(&momentum).unwrap();
}

/// Offsets that a batch normalisation behind them takes away: their gradient is nothing but rounding.
const WITHOUT_EFFECT: [&str; 3] =
    ["global.5.0.bias", "predictor.5.0.bias", "jigsaw.5.patch.0.bias"];

/// Whether this is such an offset's gradient or momentum. The gradient has to be next to nothing beside its matrix's.
fn is_without_effect(name: &str, ours: &HashMap<String, (String, Tensor)>, kind: Kind) -> bool {
    let Some((what, parameter)) = name.split_once('.') else { return false };
    let Some(matrix) = parameter.strip_suffix("bias").map(|stem| format!("grad.{stem}weight"))
    else {
        return false;
    };
    // A normalisation follows in the heads of BYOL, SwAV and Jigsaw, not in DenseCL's.
    let is_norm = |name: &String| name.contains(&parameter.replace(".0.bias", ".1.running_mean"));
    if !WITHOUT_EFFECT.contains(&parameter) || !ours.keys().any(is_norm) {
        return false;
    }
    let largest = |name: &str| ours.get(name).map(|(_, t)| t.abs().max().double_value(&[]));
    if let (Some(offset), Some(matrix)) = (largest(name), largest(&matrix)) {
        let bound = if kind == Kind::Double { 1e-10 } else { 1e-3 };
        assert!(what != "grad" || offset < bound * matrix, "{name}: {offset:e} of {matrix:e}");
    }
    what == "grad" || what == "momentum"
}

/// What of a step is compared, by name: kind and tensor.
fn readings(model: &Model, sgd: &Sgd) -> HashMap<String, (String, Tensor)> {
    let mut ours = HashMap::new();
    let mut add = |kind: &str, name: String, tensor| ours.insert(name, (kind.to_string(), tensor));
    let momentum: HashMap<String, Tensor> = sgd.tensors().into_iter().collect();
    for (name, parameter) in model.query.parameters() {
        let momentum = &momentum[&name];
        if parameter.grad().defined() {
            add("gradients", format!("grad.{name}"), parameter.grad());
            add("momentum", format!("momentum.{name}"), momentum.shallow_clone());
        }
    }
    for (name, tensor) in model.tensors() {
        let side = name.split('.').next().unwrap();
        let kind = match name.rsplit('.').next().unwrap() {
            "running_mean" | "running_var" => format!("{side} BN statistics"),
            "num_batches_tracked" | "pointer" => "counters".to_string(),
            _ if side == "queue" => "queues".to_string(),
            _ => format!("{side} weights"),
        };
        add(&kind, name, tensor);
    }
    ours
}

/// Trains both sides from the same weights on the same views.
fn compare(recipe: &str, edges: &[(&str, i64)], sets: &[&str], kind: Kind) {
    let threads = set_threads();
    let small = ["model.backbone=resnet18", "train.batch=8", "optim.lr_batch=8"];
    let sets: Vec<String> = small.iter().chain(sets).map(ToString::to_string).collect();
    let config = Config::load(recipe, &sets).unwrap();
    assert_eq!(config.model.backbone, Backbone::Resnet18);
    let (n, lr, optim) = (config.train.batch, config.base_lr(), &config.optim);
    let mut model = Model::new(&config, Device::Cpu).unwrap();
    model.convert(kind);
    let mut sgd = Sgd::of(model.query.parameters(), optim);
    let groups: Vec<(String, u32)> =
        config.training_views().groups.iter().map(|g| (g.name.clone(), g.count)).collect();
    let views: Vec<(String, Tensor)> = (0..STEPS)
        .flat_map(|step| {
            groups.iter().flat_map(move |(group, count)| {
                let edge = edges.iter().find(|(name, _)| name == group).unwrap().1;
                (0..*count).map(move |view| {
                    // Views of all groups are of the same pictures.
                    let number = edge as u64 * 10 + u64::from(view) + 1000 * group.len() as u64;
                    let images = if group == "patches" { 9 } else { 1 };
                    let pixels = picture(&step.to_string(), number, n * images, edge);
                    let pixels = pixels.to_kind(kind);
                    let pixels = match images {
                        1 => pixels,
                        images => pixels.view([n, images, 3, edge, edge]),
                    };
                    (format!("{step}.{group}.{view}"), pixels)
                })
            })
        })
        .collect();
    let shuffles: Vec<Vec<i64>> =
        (0..STEPS).map(|step| permutation(config.seed, step, n as usize)).collect();
    let orders = |step: u64| -> Vec<i64> {
        let mut draw = Draws::new(9, "orders", step);
        (0..n).map(|_| draw.below(12) as i64).collect()
    };
    let method: Value = serde_json::to_value(&config.method).unwrap();
    let mut settings = json!({
        "backbone": "resnet18", "bn_splits": config.model.bn_splits, "lr": lr,
        "momentum": optim.momentum, "weight_decay": optim.weight_decay, "nesterov": optim.nesterov,
        "trust": optim.trust, "decay_vectors": optim.decay_vectors, "optimizer": optim.optimizer,
        "threads": threads, "dtype": dtype(kind), "steps": STEPS, "shuffles": shuffles,
        "orders": (0..STEPS).map(orders).collect::<Vec<_>>(),
        "groups": groups.iter().cloned().collect::<HashMap<String, u32>>(),
        "method": method["name"],
    });
    let keys = method.as_object().unwrap().clone();
    settings.as_object_mut().unwrap().extend(keys.into_iter().filter(|(name, _)| name != "name"));
    let mut reference = Reference::start("methods_reference.py", &settings);
    // The reference has to make its own teacher: it is given none.
    let mut initial = model.tensors();
    initial.retain(|(name, _)| !name.starts_with("key."));
    reference.send(&initial);
    drop(initial);
    reference.send(&views);
    let views: HashMap<String, Tensor> = views.into_iter().collect();
    let (mut comparison, mut trace) = (Comparison::default(), Vec::new());
    for step in 0..STEPS {
        let of_group = |(group, count): &(String, u32)| {
            let views = (0..*count).map(|view| views[&format!("{step}.{group}.{view}")].copy());
            (group.clone(), views.collect())
        };
        let notes: Vec<Note> = orders(step).into_iter().map(note).collect();
        let batch = Batch::new(groups.iter().map(of_group).collect())
            .with_notes(vec![("patches".to_string(), vec![notes])]);
        let at = At { step, learning_rate: lr };
        let report = update(&mut model, &mut sgd, &Local, &config, &batch, at).unwrap();
        assert!(report.applied);
        trace.push(format!("{:.4}", report.loss));
        let mut ours = readings(&model, &sgd);
        let mut add = |name: String, loss: f64| {
            ours.insert(name, ("losses".to_string(), Tensor::from(loss)));
        };
        add("loss".into(), report.loss);
        for term in &report.terms {
            add(format!("loss.{}", term.name), term.loss);
        }
        let mut theirs = Vec::new();
        while let Some((name, tensor)) = reference.receive() {
            let (of, own) = ours.get(&name).unwrap_or_else(|| panic!("not compared: {name}"));
            if !is_without_effect(&name, &ours, kind) {
                comparison.note(of, &name, step, own, &tensor);
            }
            theirs.push((name, tensor));
        }
        assert_eq!(ours.len(), theirs.len(), "the reference has no more");
        if kind == Kind::Float {
            follow(&mut model, &mut sgd, theirs);
        }
    }
    reference.end();
    println!("{recipe} {sets:?} in {kind:?}: losses {}", trace.join(" "));
    for (kind, differences) in &comparison.0 {
        let by_step = |step| format!("{:.1e}", differences.worst_of(step));
        let by_step: Vec<String> = (0..STEPS as usize).map(by_step).collect();
        println!("  {kind:<20} {}", by_step.join(" "));
    }
    let faults = comparison.faults(kind, Allowed::SAME_KERNELS);
    assert!(faults.is_empty(), "{} faults:\n  {}", faults.len(), faults.join("\n  "));
}

const CROPS: &[(&str, i64)] = &[("crops", 64), ("small", 32)];
const VIEWS: &[(&str, i64)] = &[("first", 64), ("second", 64)];

const DENSECL: &[&str] = &["method.queue=32", "method.dim=16", "method.ema=0.9"];
const BYOL: &[&str] = &["method.hidden=64", "method.dim=16", "method.ema=0.9"];
const SWAV: &[&str] = &[
    "method.hidden=64",
    "method.dim=16",
    "method.prototypes=24",
    "method.small_crops=2",
    "views.small.count=2",
    "method.freeze_updates=2",
    "method.queue=16",
    "method.queue_from=3",
];

const JIGSAW: &[&str] =
    &["method.hidden=32", "method.permutations=12", "views.patches.grid.shuffle=12"];

#[test]
fn jigsaw_trains_as_pytorch_does() {
    let sets = ["model.bn_splits=1", "optim.lr=0.05"];
    compare("jigsaw-r50", &[("patches", 24)], &[JIGSAW, &sets].concat(), Kind::Float);
}

#[test]
fn jigsaw_in_groups_and_parts_trains_as_pytorch_does() {
    let sets = ["model.bn_splits=4", "train.accumulate=2", "optim.lr=0.05"];
    compare("jigsaw-r50", &[("patches", 24)], &[JIGSAW, &sets].concat(), Kind::Double);
}

#[test]
fn densecl_trains_as_pytorch_does() {
    compare("densecl-r50", CROPS, &[DENSECL, &["model.bn_splits=1"]].concat(), Kind::Float);
}

/// In groups and micro-batches, of which each finds its keys again; the dense term begins after two updates.
#[test]
fn densecl_in_groups_and_parts_trains_as_pytorch_does() {
    let sets = ["model.bn_splits=4", "train.accumulate=2", "method.dense_from=2"];
    let more = ["method.dense_weight=0.7", "method.temperature=0.3"];
    compare("densecl-r50", CROPS, &[DENSECL, &sets, &more].concat(), Kind::Double);
}

#[test]
fn densecl_of_larger_maps_in_channels_last_trains_as_pytorch_does() {
    let sets = ["model.bn_splits=2", "train.layout=channels-last"];
    compare("densecl-r50", &[("crops", 96)], &[DENSECL, &sets].concat(), Kind::Double);
}

#[test]
fn byol_trains_as_pytorch_does() {
    let sets = ["model.bn_splits=1", "optim.lr=0.05", "optim.optimizer=sgd"];
    compare("byol-r50", VIEWS, &[BYOL, &sets].concat(), Kind::Float);
}

/// By LARS, as in the recipe.
#[test]
fn byol_in_groups_and_parts_trains_as_pytorch_does() {
    let sets = ["model.bn_splits=2", "train.accumulate=2", "method.scale=0.25", "optim.lr=0.3"];
    compare("byol-r50", VIEWS, &[BYOL, &sets].concat(), Kind::Double);
}

#[test]
fn byol_in_channels_last_trains_as_pytorch_does() {
    let sets = ["model.bn_splits=2", "train.layout=channels-last", "model.stem=imagenet"];
    compare("byol-cifar", VIEWS, &[BYOL, &sets].concat(), Kind::Double);
}

#[test]
fn swav_trains_as_pytorch_does() {
    let sets = ["model.bn_splits=1", "optim.lr=0.05", "optim.optimizer=sgd"];
    compare("swav-r50", CROPS, &[SWAV, &sets].concat(), Kind::Float);
}

/// By LARS that leaves nothing out, as in the recipe; the prototypes are held for two updates, and the queues take
/// part from the fourth on.
#[test]
fn swav_in_groups_and_parts_trains_as_pytorch_does() {
    let sets = ["model.bn_splits=4", "train.accumulate=2", "optim.lr=2.0"];
    compare("swav-r50", CROPS, &[SWAV, &sets].concat(), Kind::Double);
}

/// The form of two large views, without queues.
#[test]
fn swav_of_two_views_in_channels_last_trains_as_pytorch_does() {
    let sets = ["model.bn_splits=2", "train.layout=channels-last", "model.stem=imagenet"];
    let more = ["method.hidden=64", "method.dim=16", "method.prototypes=24", "optim.lr=0.05"];
    let held = ["method.freeze_updates=0", "method.epsilon=0.1", "method.rounds=5"];
    let two = [("crops", 64)];
    compare("swav-cifar", &two, &[&sets[..], &more, &held].concat(), Kind::Double);
}
