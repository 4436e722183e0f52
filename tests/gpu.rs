//! Training steps on a GPU, held against the CPU's. `cargo xtask test` runs them where there is one.
#![cfg(feature = "train")]

#[path = "support/narrow.rs"]
mod narrow;

use std::sync::{Mutex, MutexGuard, PoisonError};

use detco::batch::Batch;
use detco::config::{self, Config};
use detco::device;
use detco::dist::local::Local;
use detco::model::{Draws, Model, Norms};
use detco::optim::Sgd;
use detco::step::{At, StepReport, launch, update};
use narrow::NARROW;
use tch::{Device, Tensor};

/// The GPU, for one test at a time: numerics are the process's.
fn gpu() -> (Device, MutexGuard<'static, ()>) {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let found = device::find(config::Device::Cuda).unwrap_or_else(|error| panic!("{error}"));
    (found.device, turn)
}

struct Trainer {
    config: Config,
    model: Model,
    sgd: Sgd,
    device: Device,
}

impl Trainer {
    fn new(device: Device, sets: &[&str]) -> Trainer {
        let sets: Vec<String> = NARROW.iter().chain(sets).map(ToString::to_string).collect();
        let config = Config::load("detco-r50", &sets).unwrap();
        device::set_numerics(&config.train).unwrap();
        let model = Model::new(&config, device).unwrap();
        let optim = &config.optim;
        let sgd = Sgd::new(model.query.parameters(), optim.momentum, optim.weight_decay);
        Trainer { config, model, sgd, device }
    }

    fn step(&mut self, step: u64) -> StepReport {
        let batch = batch(step % 4, self.device);
        let Trainer { config, model, sgd, .. } = self;
        update(model, sgd, &Local, config, &batch, at(step)).unwrap()
    }
}

fn at(step: u64) -> At {
    At { step, learning_rate: 0.03 }
}

/// Blobs, and noise that tells the views apart; the same on every device.
fn batch(number: u64, device: Device) -> Batch {
    let picture = |view: u64, images: &[i64], edge: i64| {
        let n: i64 = images.iter().product();
        let blobs = Draws::new(3, "blobs", number).normal(&[n, 3, 4, 4], 1.0);
        let blobs = blobs.upsample_bilinear2d([edge, edge], false, None, None);
        let noise = Draws::new(4 + view, "noise", number).normal(&[n, 3, edge, edge], 0.3);
        (blobs + noise).reshape([images, &[3, edge, edge]].concat()).to_device(device)
    };
    let both = |images: &[i64], edge| [picture(0, images, edge), picture(1, images, edge)];
    Batch::of_pairs(both(&[16], 48), Some(both(&[16, 9], 16)))
}

fn state(trainer: &Trainer) -> Vec<(String, Tensor)> {
    let momentum = trainer.sgd.tensors().into_iter();
    trainer.model.tensors().into_iter().chain(momentum).collect()
}

/// 20 free steps in bfloat16 on the GPU and in float32 on the CPU: losses differ by less than 2 %.
#[test]
#[ignore = "needs a GPU"]
fn bf16_on_a_gpu_agrees_with_float32_on_the_cpu_over_20_steps() {
    let (gpu, _turn) = gpu();
    let mut here = Trainer::new(Device::Cpu, &["train.precision=f32", "model.bn_splits=1"]);
    let mut there = Trainer::new(gpu, &["train.precision=bf16", "model.bn_splits=1"]);
    for step in 0..20 {
        let (a, b) = (here.step(step), there.step(step));
        assert!(a.applied && b.applied);
        let off = (b.loss / a.loss - 1.0).abs();
        println!("{step}: {:.4} {:.4} {off:.1e}", a.loss, b.loss);
        assert!(off < 0.02, "step {step}: {} on the CPU, {} on the GPU", a.loss, b.loss);
    }
}

/// The same seed on the same GPU, with `--deterministic`: the same bits, of losses and of the state.
#[test]
#[ignore = "needs a GPU"]
fn deterministic_steps_on_a_gpu_have_the_same_bits() {
    let (gpu, _turn) = gpu();
    let run = || {
        let mut trainer = Trainer::new(gpu, &["train.deterministic=true"]);
        let reports: Vec<StepReport> = (0..6).map(|step| trainer.step(step)).collect();
        (reports, state(&trainer))
    };
    let ((reports, once), (same, again)) = (run(), run());
    assert_eq!(reports, same);
    for ((name, once), (_, again)) in once.iter().zip(&again) {
        assert!(once.equal(again), "{name}");
    }
}

/// In float32, a step with the GPU's kernels for batch normalisation is one with libtorch's operations.
#[test]
#[ignore = "needs a GPU"]
fn kernels_on_a_gpu_are_libtorchs_operations() {
    let (gpu, _turn) = gpu();
    let sets = ["train.precision=f32", "model.backbone=resnet50", "method.local_head=pirl"];
    let mut plain = Trainer::new(gpu, &sets);
    let mut fused = Trainer::new(gpu, &sets);
    plain.model.normalise_by(Norms::Libtorch);
    fused.model.normalise_by(Norms::Kernels);
    let (a, b) = (plain.step(0), fused.step(0));
    assert!((b.loss / a.loss - 1.0).abs() < 1e-4, "{} {}", a.loss, b.loss);
    for ((name, a), (_, b)) in state(&plain).iter().zip(&state(&fused)) {
        if name.contains("running") {
            let off = ((a - b).abs().max() / a.abs().max()).double_value(&[]);
            assert!(off < 1e-3, "{name}: {off:.1e}");
        }
    }
}

/// Reports that are read late, when the next steps are under way, are the same reports.
#[test]
#[ignore = "needs a GPU"]
fn steps_on_a_gpu_can_be_read_late() {
    let (gpu, _turn) = gpu();
    let sets = ["train.deterministic=true"];
    let (mut now, mut late) = (Trainer::new(gpu, &sets), Trainer::new(gpu, &sets));
    let mut pending = Vec::new();
    for step in 0..4 {
        let batch = batch(step, gpu);
        let Trainer { config, model, sgd, .. } = &mut late;
        pending.push(launch(model, sgd, &Local, config, &batch, at(step)).unwrap());
    }
    for (step, pending) in pending.into_iter().enumerate() {
        assert_eq!(now.step(step as u64), pending.wait().unwrap());
    }
}
