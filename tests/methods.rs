//! SimCLR and Rotation against PyTorch; all methods beside MoCo on several ranks against one, and after a kill.
//!
//! The other side of the first is `tools/reference/rows_reference.py`; `tests/parity_methods.rs` compares the others.
#![cfg(feature = "train")]

#[expect(dead_code, reason = "only float64 is compared here")]
#[path = "support/comparison.rs"]
mod comparison;
#[path = "support/numerical.rs"]
mod numerical;
#[path = "support/reference.rs"]
mod reference;
#[expect(dead_code, reason = "nothing here fails on purpose")]
mod support;
#[expect(dead_code, reason = "of ranks, only what starts, ends and compares them")]
#[path = "support/world.rs"]
mod world;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use comparison::{Allowed, Comparison};
use detco::batch::Batch;
use detco::checkpoint;
use detco::config::{Backbone, CROPS, Config};
use detco::dist::local::Local;
use detco::method::{Rotation, Simclr};
use detco::model::{Draws, Model};
use detco::optim::Sgd;
use detco::step::{At, update};
use detco_shards::views::{Note, Rect};
use numerical::{error, set_threads};
use reference::{Reference, STEPS, dtype};
use serde_json::{Value, json};
use support::{detco_ok, path, shards};
use tch::{Device, Kind, Tensor};
use world::{Ranks, losses, wait_for_step};

/// Blobs of colour and some noise, which differ as photographs do.
fn picture(name: &str, view: u64, n: i64) -> Tensor {
    let blobs = Draws::new(7, name, 0).normal(&[n, 3, 4, 4], 1.0);
    let blobs = blobs.upsample_bilinear2d([64, 64], false, None, None);
    blobs + Draws::new(8, name, view).normal(&[n, 3, 64, 64], 0.3)
}

/// A note of a view that is to be turned.
fn note(rotation: u8) -> Note {
    let crop = Rect { left: 0, top: 0, width: 64, height: 64 };
    Note { picture: [64, 64], crop, flip: false, rotation, permutation: None }
}

/// What the script needs to know of a method.
fn settings(config: &Config) -> Value {
    if let Some(simclr) = config.method.as_a::<Simclr>() {
        let Simclr { dim, norm, temperature } = simclr;
        return json!({ "method": "simclr", "dim": dim, "norm": norm, "temperature": temperature, "views": 2 });
    }
    let rotation: &Rotation = config.method.as_a().unwrap();
    json!({ "method": "rotation", "rotations": rotation.rotations, "views": 1 })
}

/// Five free steps in float64, where rounding does not carry units across their ReLU.
fn compare(recipe: &str, sets: &[&str]) {
    let threads = set_threads();
    let small = ["model.backbone=resnet18", "train.batch=8", "optim.lr_batch=8"];
    let sets: Vec<String> = small.iter().chain(sets).map(ToString::to_string).collect();
    let config = Config::load(recipe, &sets).unwrap();
    let (n, lr, optim) = (config.train.batch, config.base_lr(), &config.optim);
    let mut model = Model::new(&config, Device::Cpu).unwrap();
    model.convert(Kind::Double);
    let mut sgd = Sgd::of(model.query.parameters(), optim);
    let mut settings = settings(&config);
    let count = settings["views"].as_u64().unwrap();
    let name = |step: u64, view: u64| format!("{step}.crops.{view}");
    let of_step = |step: u64| (0..count).map(move |view| (step, view));
    let views: Vec<(String, Tensor)> = (0..STEPS)
        .flat_map(of_step)
        .map(|(step, view)| {
            (name(step, view), picture(&step.to_string(), view, n).to_kind(Kind::Double))
        })
        .collect();
    let turns = |step: u64| -> Vec<u8> {
        let mut draw = Draws::new(9, "turns", step);
        (0..n).map(|_| draw.below(4) as u8).collect()
    };
    let names =
        |of: Vec<(String, Tensor)>| of.into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    let backbone = match config.model.backbone {
        Backbone::Resnet18 => "resnet18",
        other => panic!("{other:?} is not compared"),
    };
    let more = json!({
        "backbone": backbone, "bn_splits": config.model.bn_splits, "lr": lr, "momentum": optim.momentum,
        "weight_decay": optim.weight_decay, "nesterov": optim.nesterov, "trust": optim.trust,
        "decay_vectors": optim.decay_vectors, "optimizer": optim.optimizer, "threads": threads,
        "dtype": dtype(Kind::Double), "steps": STEPS, "trained": names(model.query.parameters()),
        "turns": (0..STEPS).map(turns).collect::<Vec<_>>(),
    });
    settings.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let mut reference = Reference::start("rows_reference.py", &settings);
    reference.send(&model.tensors());
    reference.send(&views);
    let views: HashMap<String, Tensor> = views.into_iter().collect();
    let (mut comparison, mut trace) = (Comparison::default(), Vec::new());
    for step in 0..STEPS {
        let crops: Vec<Tensor> =
            of_step(step).map(|(step, view)| views[&name(step, view)].copy()).collect();
        let notes = turns(step).into_iter().map(note).collect();
        let batch = Batch::new(vec![(CROPS.to_string(), crops)])
            .with_notes(vec![(CROPS.to_string(), vec![notes])]);
        let at = At { step, learning_rate: lr };
        let report = update(&mut model, &mut sgd, &Local, &config, &batch, at).unwrap();
        assert!(report.applied);
        trace.push(format!("{:.4}", report.loss));
        let mut ours: HashMap<String, Tensor> = model.tensors().into_iter().collect();
        ours.insert("loss".into(), Tensor::from(report.loss));
        let gradients = model.query.parameters().into_iter();
        ours.extend(gradients.map(|(name, p)| (format!("grad.{name}"), p.grad())));
        ours.extend(sgd.tensors().into_iter().map(|(name, t)| (format!("momentum.{name}"), t)));
        while let Some((name, theirs)) = reference.receive() {
            let ours = ours.remove(&name).unwrap_or_else(|| panic!("not compared: {name}"));
            let kind = name.split('.').next().unwrap();
            let kind = if name.contains("running") { "statistics" } else { kind };
            comparison.note(kind, &name, step, &ours, &theirs);
        }
        assert!(ours.is_empty(), "the reference has no {:?}", ours.keys());
    }
    reference.end();
    println!("{recipe} {sets:?}: losses {}", trace.join(" "));
    let all = Allowed { clean_steps: STEPS as usize, ..Allowed::SAME_KERNELS };
    let faults = comparison.faults(Kind::Double, all);
    assert!(faults.is_empty(), "{}", faults.join("\n  "));
}

#[test]
fn simclr_trains_as_pytorch_does() {
    compare("simclr-r50", &["model.bn_splits=1", "optim.weight_decay=0.01"]);
}

#[test]
fn simclr_in_groups_and_parts_trains_as_pytorch_does() {
    compare("simclr-r50", &["model.bn_splits=4", "train.accumulate=2"]);
}

#[test]
fn simclr_by_sgd_without_norms_in_its_head_trains_as_pytorch_does() {
    let sets = ["optim.optimizer=sgd", "optim.lr=0.05", "method.norm=false", "model.bn_splits=2"];
    compare("simclr-r50", &sets);
}

#[test]
fn rotation_trains_as_pytorch_does() {
    compare("rotation-r50", &["model.bn_splits=1", "optim.lr=0.05"]);
}

#[test]
fn rotation_in_groups_and_parts_trains_as_pytorch_does() {
    let sets = ["model.bn_splits=4", "train.accumulate=2", "optim.nesterov=true", "optim.lr=0.05"];
    compare("rotation-r50", &[&sets[..], &["optim.decay_vectors=false"]].concat());
}

#[test]
fn rotation_by_one_drawn_turn_trains_as_pytorch_does() {
    let sets = ["method.rotations=1", "views.crops.rotate=true", "optim.lr=0.05"];
    compare("rotation-r50", &[&sets[..], &["model.bn_splits=2"]].concat());
}

/// Where channels lie, and in how many parts a batch is computed, changes nothing but rounding: weights, momentum and
/// running statistics, those of the head among them, after three free steps in float64.
#[test]
fn layouts_and_parts_change_nothing_but_rounding() {
    set_threads();
    for (recipe, own) in [
        ("simclr-r50", &[][..]),
        ("rotation-r50", &[]),
        ("densecl-r50", DENSECL),
        ("byol-r50", BYOL),
        ("swav-r50", SWAV),
    ] {
        let run = |layout: &str, parts: &str| {
            let small = ["model.backbone=resnet18", "model.width=16", "train.batch=8"];
            let more = ["model.bn_splits=4", "optim.lr_batch=8", "optim.lr=0.05", layout, parts];
            let sets = small.iter().chain(&more).chain(own).map(ToString::to_string);
            let sets: Vec<String> = sets.collect();
            let config = Config::load(recipe, &sets).unwrap();
            let mut model = Model::new(&config, Device::Cpu).unwrap();
            model.convert(Kind::Double);
            let mut sgd = Sgd::of(model.query.parameters(), &config.optim);
            for step in 0..3 {
                let mut number = 0;
                let mut view = |_| {
                    number += 1;
                    picture(&step.to_string(), number, 8).to_kind(Kind::Double)
                };
                let groups = config.training_views().groups.into_iter();
                let groups = groups
                    .map(|group| (group.name.clone(), (0..group.count).map(&mut view).collect()));
                let batch = Batch::new(groups.collect());
                let at = At { step, learning_rate: config.base_lr() };
                assert!(update(&mut model, &mut sgd, &Local, &config, &batch, at).unwrap().applied);
            }
            model.tensors().into_iter().chain(sgd.tensors()).collect::<Vec<_>>()
        };
        let plain = run("train.layout=channels-first", "train.accumulate=1");
        for (layout, parts) in [("first", "4"), ("last", "1"), ("last", "2")] {
            let layout = format!("train.layout=channels-{layout}");
            let other = run(&layout, &format!("train.accumulate={parts}"));
            let largest = |all: &[(String, Tensor)], name: &str| {
                let (_, found) = all.iter().find(|(known, _)| known == name).unwrap();
                found.abs().max().double_value(&[])
            };
            for ((name, a), (_, b)) in plain.iter().zip(&other) {
                let off = error(b, a);
                // A normalisation may take an offset away: its gradient, and so its momentum, is rounding alone.
                let taken = ["global.5.0.bias", "predictor.5.0.bias"].contains(&name.as_str())
                    && largest(&other, name)
                        < 1e-8 * largest(&other, &name.replace("bias", "weight"));
                assert!(off < 1e-7 || taken, "{recipe} {layout} {parts} parts: {name} {off:.1e}");
            }
        }
    }
}

/// Milliseconds an update.
const TINY: &[&str] = &[
    "model.backbone=resnet18",
    "model.width=8",
    "model.bn_splits=4",
    "train.batch=16",
    "train.threads=1",
    "optim.lr=0.05",
    "optim.lr_batch=16",
    "optim.warmup_start=0.5",
    "views.crops.size=32",
    "monitor.every_steps=1",
    "monitor.collapse_share=0",
    "data.workers=1",
    "train.device=cpu",
];

/// Small, with more than one cell.
const DENSECL: &[&str] = &["method.dim=16", "method.queue=48", "views.crops.size=64"];
const BYOL: &[&str] = &[
    "method.dim=16",
    "method.hidden=64",
    "views.first.size=32",
    "views.second.size=32",
    // Groups of four samples go through two normalisations more: free steps part where it is faster.
    "optim.lr=0.005",
];
/// With queues from the second step on, and prototypes that are held in the first.
const SWAV: &[&str] = &[
    "method.dim=16",
    "method.hidden=64",
    "method.prototypes=24",
    "method.small_crops=2",
    "method.queue=48",
    "method.queue_from=1",
    "method.freeze_updates=1",
    "views.small.count=2",
    "views.small.size=24",
];

const JIGSAW: &[&str] = &[
    "method.hidden=32",
    "method.permutations=12",
    "views.patches.size=54",
    "views.patches.grid.patch=16",
    "views.patches.grid.shuffle=12",
    // As for BYOL.
    "optim.lr=0.005",
];

const RECIPES: [(&str, &[&str]); 8] = [
    ("jigsaw-r50", JIGSAW),
    ("densecl-r50", DENSECL),
    ("byol-r50", BYOL),
    ("swav-r50", SWAV),
    ("simclr-r50", &[]),
    // By SGD, whose free steps part where it is faster.
    ("simclr-cifar", &["optim.lr=0.005"]),
    ("rotation-r50", &[]),
    ("rotation-cifar", &["method.rotations=1", "views.crops.rotate=true"]),
];

fn new_run<'a>(recipe: &'a str, data: &'a Path, run: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["train", recipe, "--data", path(data), "--out", path(run)];
    args.extend(TINY.iter().chain(more).flat_map(|set| ["--set", set]));
    args
}

/// Momentum after one step is the gradient; then losses of free steps.
#[test]
fn several_ranks_make_the_gradient_of_one() {
    let (folder, data) = shards(12); // 48 samples: 3 steps an epoch
    for (recipe, sets) in RECIPES {
        let mut runs = Vec::new();
        for ranks in ["1", "2", "4"] {
            let run = folder.path().join(format!("{recipe}.{ranks}"));
            let first = folder.path().join(format!("{recipe}.{ranks}.first"));
            for (run, steps) in [(&first, "train.steps_max=1"), (&run, "train.steps_max=4")] {
                let mut args = new_run(recipe, &data, run, &[sets, &[steps]].concat());
                args.extend(["--ranks", ranks]);
                detco_ok(&args);
            }
            let momentum: BTreeMap<String, Tensor> = checkpoint::open(&first, None)
                .unwrap()
                .optim_tensors()
                .unwrap()
                .into_iter()
                .collect();
            runs.push((losses(&run), momentum));
        }
        let length = |t: &Tensor| t.square().sum(Kind::Double).sqrt().double_value(&[]);
        for (losses, momentum) in &runs[1..] {
            let (mut off, mut all) = (0.0, 0.0);
            for (name, one) in &runs[0].1 {
                off += length(&(&momentum[name] - one)).powi(2);
                all += length(one).powi(2);
            }
            let off = (off / all).sqrt();
            assert!(off < 1e-3 && all > 0.0, "{recipe}: gradients {off:.1e}");
            for (step, loss) in losses {
                let off = (loss / runs[0].0[step] - 1.0).abs();
                println!("{recipe} step {step}: {loss:.5} {off:.1e}");
                assert!(off < 1e-4, "{recipe} step {step}: loss {loss}, not {}", runs[0].0[step]);
            }
        }
    }
}

/// Losses, weights, statistics and momentum after a SIGKILL of one rank and a signal that stops all are those of
/// a run that nobody has ended.
fn resumes_to_the_same_bits(recipe: &str, sets: &[&str], ranks: usize) {
    let (folder, data) = shards(12); // 48 samples: 3 steps an epoch
    let (run, whole) = (folder.path().join("run"), folder.path().join("whole"));
    let long = ["train.epochs=5000", "checkpoint.every_epochs=0", "checkpoint.every_steps=5"];
    let start = |run: &Path, more: &[&str]| {
        let args = new_run(recipe, &data, run, &[sets, &long, more].concat());
        let args = [&args[..], &["--or-resume"]].concat();
        Ranks::start(folder.path(), &vec![args; ranks])
    };
    let mut world = start(&run, &[]);
    wait_for_step(&run, 6, &mut world.children[0]);
    world.signal(ranks - 1, "KILL");
    world.codes();
    let made = losses(&run).len() as u64;
    let mut world = start(&run, &[]);
    wait_for_step(&run, made + 2, &mut world.children[0]);
    world.signal(0, "TERM");
    assert_eq!(world.codes(), vec![Some(75); ranks], "{}", world.said(0));
    let last = checkpoint::open(&run, None).unwrap().state.step + 4;
    let steps = format!("train.steps_max={last}");
    for run in [&run, &whole] {
        let mut world = start(run, &[&steps]);
        assert_eq!(world.codes(), vec![Some(0); ranks], "{}", world.said(0));
    }
    assert_eq!(losses(&run), losses(&whole), "{recipe}, {ranks} ranks");
    for file in ["model.safetensors", "optim.safetensors"] {
        let bytes = |run: &Path| std::fs::read(run.join("checkpoints/latest").join(file)).unwrap();
        assert!(bytes(&run) == bytes(&whole), "{file} of {recipe}, {ranks} ranks");
    }
}

#[test]
fn resumed_runs_have_the_bits_of_whole_runs() {
    for (recipe, sets) in RECIPES {
        for ranks in [1, 2] {
            resumes_to_the_same_bits(recipe, sets, ranks);
        }
    }
}

/// Rotation's monitor reads Res4, SimCLR's Res5: metrics name the stage where it is not Res5, and `detco eval
/// knn` finds there what the monitor found.
#[test]
fn the_monitor_reads_the_map_that_the_method_declares() {
    let (folder, data) = shards(12);
    let test = format!("monitor.knn_test=[{data:?}]");
    let monitor = [
        test.as_str(),
        "monitor.knn_every_epochs=1",
        "train.epochs=1",
        "optim.warmup_epochs=0",
        "monitor.linear=true",
    ];
    for (recipe, level, name) in
        [("rotation-r50", 4, "knn/res4/top1"), ("simclr-r50", 5, "knn/top1")]
    {
        let run = folder.path().join(recipe);
        detco_ok(&new_run(recipe, &data, &run, &monitor));
        let lines = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
        let lines = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let of_knn: Vec<Value> = lines.filter(|line| line.to_string().contains("\"knn/")).collect();
        let steps: Vec<_> = of_knn.iter().map(|line| line["step"].as_u64()).collect();
        assert_eq!(steps, [Some(0), Some(3)], "{recipe}");
        let eval = ["eval", "knn", path(&run), "--train", path(&data), "--test", path(&data)];
        let level = level.to_string();
        let said = detco_ok(&[&eval[..], &["--json", "--level", &level]].concat());
        let said: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
        assert_eq!(said["level"].to_string(), level);
        assert!(said["top1"].is_f64(), "{said}");
        assert_eq!(of_knn[1][name], said["top1"], "{recipe}");
        let rankme = of_knn[1]["features/rankme"].as_f64().unwrap();
        assert!((1.0..49.0).contains(&rankme), "{rankme}"); // 48 samples
        let linear = ["eval", "linear", path(&run), "--train", path(&data), "--test", path(&data)];
        let said = detco_ok(&[&linear[..], &["--json", "--levels", &level]].concat());
        let said: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
        let name = name.replace("knn", "linear");
        assert_eq!(of_knn[1][&name], said["readings"][0]["value"], "{recipe}");
    }
}

/// What a run will take is said by arithmetic: a key encoder and queues where the method has them.
#[test]
fn a_dry_run_says_what_a_method_takes() {
    let (folder, data) = shards(12);
    for (recipe, sets) in RECIPES {
        let run = folder.path().join("run");
        // A megabyte of queues.
        let is_queued = recipe.starts_with("densecl") || recipe.starts_with("swav");
        let more: &[&str] = if is_queued { &["method.queue=4800"] } else { &[] };
        let mut args = new_run(recipe, &data, &run, &[sets, more].concat());
        args.push("--dry-run");
        let said = detco_ok(&args);
        for part in ["query encoder", "momentum", "activations", "steps"] {
            assert!(said.contains(part), "{recipe}: {said}");
        }
        for (part, methods) in
            [("key encoder", &["densecl", "byol"]), ("queues", &["densecl", "swav"])]
        {
            let line = said.lines().find(|line| line.trim_start().starts_with(part)).unwrap();
            let has_it = methods.iter().any(|method| recipe.starts_with(method));
            assert_eq!(!line.trim_end().ends_with(" 0.0 MB"), has_it, "{recipe}: {line}");
        }
        assert!(!run.exists());
    }
}
