//! Precision, layout and lateness: what may change the bits of a step, by how much, and what not.
#![cfg(feature = "train")]

#[path = "support/narrow.rs"]
mod narrow;

use detco::batch::Batch;
use detco::config::{CROPS, Config};
use detco::dist::local::Local;
use detco::method::parts::info_nce::total;
use detco::method::{Met, Method, Moco};
use detco::model::{Draws, Model, Norms};
use detco::optim::Sgd;
use detco::shim::norm::copies;
use detco::shim::step::Meter;
use detco::step::{At, StepReport, launch, update};
use narrow::NARROW;
use tch::{Device, Kind, Tensor};

/// A narrow DetCo with three levels.
fn config(sets: &[&str]) -> Config {
    let sets: Vec<String> = NARROW.iter().chain(sets).map(ToString::to_string).collect();
    tch::set_num_threads(1);
    Config::load("detco-r50", &sets).unwrap()
}

struct Trainer {
    config: Config,
    model: Model,
    sgd: Sgd,
}

impl Trainer {
    fn new(sets: &[&str], kind: Kind) -> Trainer {
        let config = config(sets);
        let mut model = Model::new(&config, Device::Cpu).unwrap();
        model.convert(kind);
        let optim = &config.optim;
        let sgd = Sgd::new(model.query.parameters(), optim.momentum, optim.weight_decay);
        Trainer { config, model, sgd }
    }

    fn step(&mut self, batch: &Batch, step: u64) -> StepReport {
        let Trainer { config, model, sgd } = self;
        update(model, sgd, &Local, config, batch, at(step)).unwrap()
    }

    /// Goes on from another's state.
    fn take_over(&mut self, other: &Trainer) {
        self.model.load(&other.model.tensors()).unwrap();
        self.sgd.load(&other.sgd.tensors()).unwrap();
    }

    fn state(&self) -> Vec<(String, Tensor)> {
        let momentum =
            self.sgd.tensors().into_iter().map(|(name, t)| (format!("momentum.{name}"), t));
        let all = self.model.tensors().into_iter().chain(momentum);
        all.map(|(name, tensor)| (name, tensor.copy())).collect()
    }
}

fn at(step: u64) -> At {
    At { step, learning_rate: 0.03 }
}

fn batch(name: &str, kind: Kind) -> Batch {
    batch_of(name, kind, 64, 32)
}

fn batch_of(name: &str, kind: Kind, crop: i64, patch: i64) -> Batch {
    let picture = |view: u64, images: &[i64], edge: i64| {
        let n: i64 = images.iter().product();
        let blobs = Draws::new(3, name, 0).normal(&[n, 3, 4, 4], 1.0);
        let blobs = blobs.upsample_bilinear2d([edge, edge], false, None, None);
        let noise = Draws::new(4, name, view).normal(&[n, 3, edge, edge], 0.3);
        (blobs + noise).reshape([images, &[3, edge, edge]].concat()).to_kind(kind)
    };
    let both = |images: &[i64], edge| [picture(0, images, edge), picture(1, images, edge)];
    Batch::of_pairs(both(&[16], crop), Some(both(&[16, 9], patch)))
}

fn error(a: &Tensor, b: &Tensor) -> f64 {
    let number = |t: Tensor| t.to_kind(Kind::Double).double_value(&[]);
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    number((&a - &b).abs().max()) / number(b.abs().max()).max(f64::MIN_POSITIVE)
}

/// 20 free steps from the same state: the losses of each step differ by less than 2 %.
#[test]
fn bf16_agrees_with_float32_over_20_steps() {
    let sets = ["model.bn_splits=1", "model.width=8"];
    let mut full = Trainer::new(&[&sets[..], &["train.precision=f32"]].concat(), Kind::Float);
    let mut half = Trainer::new(&[&sets[..], &["train.precision=bf16"]].concat(), Kind::Float);
    let mut worst = 0.0_f64;
    for step in 0..20 {
        let batch = batch_of(&format!("{}", step % 4), Kind::Float, 48, 16);
        let (a, b) = (full.step(&batch, step), half.step(&batch, step));
        assert!(a.applied && b.applied);
        let off = (b.loss / a.loss - 1.0).abs();
        println!("{step}: {:.4} {:.4} {off:.1e}", a.loss, b.loss);
        worst = worst.max(off);
    }
    assert!(worst > 0.0, "bf16 changes nothing: it is not on");
    assert!(worst < 0.02, "{worst}");
    // What is kept from step to step is float32 in both.
    for (name, tensor) in half.state() {
        let kind = tensor.kind();
        assert!(kind == Kind::Float || kind == Kind::Int64, "{name} is {kind:?}");
    }
}

/// Where channels lie changes nothing but rounding: three free steps in float64.
#[test]
fn channels_last_trains_as_channels_first() {
    for more in [&["train.accumulate=2"][..], &["model.bn_splits=1"]] {
        let layout = |layout| Trainer::new(&[more, &[layout]].concat(), Kind::Double);
        let mut first = layout("train.layout=channels-first");
        let mut last = layout("train.layout=channels-last");
        for step in 0..3 {
            let batch = batch(&format!("{step}"), Kind::Double);
            let (a, b) = (first.step(&batch, step), last.step(&batch, step));
            assert!((a.loss / b.loss - 1.0).abs() < 1e-9, "{} {}", a.loss, b.loss);
        }
        let weight = &last.model.query.parameters()[0];
        assert!(detco::device::is_channels_last(&weight.1), "{} lies channels first", weight.0);
        for ((name, a), (_, b)) in first.state().iter().zip(last.state()) {
            assert!(error(&b, a) < 1e-8, "{more:?} {name}: {:.1e}", error(&b, a));
        }
    }
}

/// A GPU's kernels normalise groups with the ReLU and the residual that follow; here their source runs
/// on the CPU. From the same state, losses, statistics, keys and gradients of a step are those of
/// libtorch's operations but for rounding, for both kinds of blocks. Where rounding flips a ReLU, as it
/// does in one step of ten against float64 with libtorch too, gradients feel it: hence the median.
#[test]
fn steps_with_the_kernels_are_those_with_libtorch() {
    let cases: [&[&str]; 2] = [
        &["train.accumulate=2"],
        &["model.backbone=resnet50", "model.width=8", "method.local_head=pirl"],
    ];
    for more in cases {
        let sets = [more, &["train.layout=channels-last"]].concat();
        let mut plain = Trainer::new(&sets, Kind::Float);
        let mut fused = Trainer::new(&sets, Kind::Float);
        fused.model.normalise_by(Norms::Kernels);
        let mut gradients = Vec::new();
        for step in 0..5 {
            let batch = batch_of(&format!("{step}"), Kind::Float, 48, 16);
            let (a, b) = (plain.step(&batch, step), fused.step(&batch, step));
            assert!((b.loss / a.loss - 1.0).abs() < 1e-5, "{more:?} {} {}", a.loss, b.loss);
            let (want, have) = (plain.state(), fused.state());
            let (mut off, mut all, mut rounded) = (0.0, 0.0, 0);
            for ((name, a), (_, b)) in want.iter().zip(&have) {
                if name.starts_with("momentum") {
                    let square = |t: Tensor| t.square().sum(Kind::Double).double_value(&[]);
                    off += square(a - b);
                    all += square(a.copy());
                } else if !name.starts_with("query") || name.contains("running") {
                    assert!(error(b, a) < 3e-4, "{more:?} {name}: {:.1e}", error(b, a));
                    rounded += usize::from(!a.equal(b));
                }
            }
            assert!(rounded > 0, "sums in another order round differently: did the kernels run?");
            gradients.push((off / all).sqrt());
            fused.take_over(&plain);
        }
        println!("{more:?}: gradients {gradients:?}");
        gradients.sort_by(f64::total_cmp);
        assert!(gradients[2] < 5e-3 && gradients[4] < 0.1, "{more:?}: {gradients:?}");
    }
}

/// Each layer hands the kernels maps and gradients in the layout they want. But for the last map of each
/// scope, of which only the mean is read: its gradient is one number a channel, to be written out once.
#[test]
fn a_step_with_the_kernels_turns_no_map_around() {
    for backbone in ["resnet18", "resnet50"] {
        let backbone = format!("model.backbone={backbone}");
        // Wide enough that no convolution goes around oneDNN's fault by picking pixels.
        let sets = ["train.layout=channels-last", "model.width=16", backbone.as_str()];
        let mut trainer = Trainer::new(&sets, Kind::Float);
        trainer.model.normalise_by(Norms::Kernels);
        let before = copies();
        trainer.step(&batch_of("0", Kind::Float, 64, 48), 0);
        assert_eq!(copies() - before, 0, "{backbone}");
    }
}

/// In bfloat16 the kernels round once where libtorch rounds after the normalisation, after the sum and
/// after the ReLU: the losses of 8 free steps stay within the tolerance of bfloat16 itself.
#[test]
fn bf16_steps_with_the_kernels_are_those_with_libtorch() {
    let sets = ["train.precision=bf16", "train.layout=channels-last", "model.width=8"];
    let mut plain = Trainer::new(&sets, Kind::Float);
    let mut fused = Trainer::new(&sets, Kind::Float);
    fused.model.normalise_by(Norms::Kernels);
    for step in 0..8 {
        let batch = batch_of(&format!("{}", step % 4), Kind::Float, 48, 16);
        let (a, b) = (plain.step(&batch, step), fused.step(&batch, step));
        assert!(a.applied && b.applied);
        let off = (b.loss / a.loss - 1.0).abs();
        println!("{step}: {:.4} {:.4} {off:.1e}", a.loss, b.loss);
        assert!(off < 0.02, "step {step}: {off}");
    }
}

/// Steps whose reports are read later are the same steps.
#[test]
fn a_step_read_late_is_the_same_step() {
    let (mut now, mut late) = (Trainer::new(&[], Kind::Float), Trainer::new(&[], Kind::Float));
    let mut pending = Vec::new();
    for step in 0..3 {
        let Trainer { config, model, sgd } = &mut late;
        let batch = batch(&format!("{step}"), Kind::Float);
        pending.push(launch(model, sgd, &Local, config, &batch, at(step)).unwrap());
    }
    for (step, pending) in pending.into_iter().enumerate() {
        let batch = batch(&format!("{step}"), Kind::Float);
        assert_eq!(now.step(&batch, step as u64), pending.wait().unwrap());
    }
    for ((name, a), (_, b)) in now.state().iter().zip(late.state()) {
        assert!(a.equal(&b), "{name}");
    }
}

/// The next step is on its way before anybody knows that this one was refused: it must find weights,
/// statistics, momentum and keys as if this one had not been.
#[test]
fn a_refused_step_does_not_reach_the_next() {
    let (mut with, mut without) = (Trainer::new(&[], Kind::Float), Trainer::new(&[], Kind::Float));
    for trainer in [&mut with, &mut without] {
        assert!(trainer.step(&batch("good", Kind::Float), 0).applied);
    }
    let bad = batch("bad", Kind::Float);
    let _ = bad.views(CROPS).unwrap()[0].narrow(0, 5, 1).fill_(f64::INFINITY);
    let before = with.state();
    let Trainer { config, model, sgd } = &mut with;
    let refused = launch(model, sgd, &Local, config, &bad, at(1)).unwrap();
    for ((name, a), (_, b)) in before.iter().zip(with.state()) {
        let follows = name.starts_with("key.") && !name.contains("running");
        assert!(a.equal(&b) || follows || name == "queue.pointer", "{name} changed");
    }
    let Trainer { config, model, sgd } = &mut with;
    let next = launch(model, sgd, &Local, config, &batch("next", Kind::Float), at(2)).unwrap();
    assert!(!refused.wait().unwrap().applied);
    assert!(next.wait().unwrap().applied);
    let ema = without.config.design().teacher.unwrap().ema;
    without.model.follow(ema).unwrap(); // the key encoder has followed once more
    assert!(without.step(&batch("next", Kind::Float), 2).applied);
    for ((name, a), (_, b)) in with.state().iter().zip(without.state()) {
        if !name.starts_with("queue.") {
            assert!(a.equal(&b), "{name}");
        }
    }
}

/// The terms take the memory of one term's logits and their softmax; the definition that of many.
#[test]
fn the_loss_holds_one_terms_logits_at_a_time() {
    let config = config(&["method.queue=16384"]);
    let model = Model::new(&config, Device::Cpu).unwrap();
    let moco: &Moco = config.method.as_a().unwrap();
    let n = 16;
    let unit = |name: String| {
        let x = Draws::new(1, &name, 0).normal(&[n, moco.dim], 1.0);
        (&x / x.norm_scalaropt_dim(2, [1], true)).set_requires_grad(name.starts_with('q'))
    };
    let draw = |side: &str| -> Vec<Tensor> {
        let names = ["g", "l"].into_iter().flat_map(|s| (0..4).map(move |l| format!("{s}{l}")));
        names.map(|name| unit(format!("{side}.{name}"))).collect()
    };
    let (query, key) = (draw("q"), draw("k"));
    let one = (n * (1 + moco.queue) * 4) as f64;
    let peak = |of: &dyn Fn()| {
        let meter = Meter::begin().unwrap();
        of();
        meter.read().unwrap().1 as f64 / one
    };
    let met = |outputs| {
        let (targets, queues) = (key.as_slice(), &model.queues);
        Met::new(outputs, targets, queues)
    };
    let values: Vec<Tensor> = query.iter().map(Tensor::detach).collect();
    let scored = peak(&|| drop(moco.score(&met(&values))));
    let defined = peak(&|| total(&moco.contrast(&met(&query))).backward());
    println!("in logits of a term: {scored:.2} against {defined:.2}");
    assert!(scored < 2.2, "{scored}");
    assert!(defined > 12.0, "{defined}");
}
