//! What DenseCL, BYOL, SwAV and Jigsaw have to be besides their formulas: identities between methods, values at the start, and
//! the mistakes that other implementations made, of which each is a test that ours has not got it.
#![cfg(feature = "train")]

use std::collections::HashMap;

use detco::batch::Batch;
use detco::config::Config;
use detco::dist::local::Local;
use detco::method::GLOBAL;
use detco::model::{Draws, Model, Moments};
use detco::optim::Sgd;
use detco::step::{At, StepReport, update};
use detco_shards::views::{Note, Rect};
use tch::{Device, Kind, Tensor};

const SMALL: [&str; 5] = [
    "model.backbone=resnet18",
    "model.width=8",
    "model.bn_splits=2",
    "train.batch=8",
    "optim.lr_batch=8",
];

fn load(recipe: &str, sets: &[&str]) -> Config {
    tch::set_num_threads(1);
    let sets: Vec<String> = SMALL.iter().chain(sets).map(ToString::to_string).collect();
    Config::load(recipe, &sets).unwrap()
}

/// A model, its optimiser, and steps on drawn pictures of 64 pixels.
struct Trainer {
    config: Config,
    model: Model,
    sgd: Sgd,
    step: u64,
}

impl Trainer {
    fn new(recipe: &str, sets: &[&str]) -> Trainer {
        let config = load(recipe, sets);
        let model = Model::new(&config, Device::Cpu).unwrap();
        let sgd = Sgd::of(model.query.parameters(), &config.optim);
        Trainer { config, model, sgd, step: 0 }
    }

    /// The views of a step, by their places among all of it.
    fn batch(&self) -> Batch {
        let mut number = 0;
        let mut view = |_| {
            number += 1;
            let name = self.step.to_string();
            let blobs = Draws::new(7, &name, 0).normal(&[8, 3, 4, 4], 1.0);
            let blobs = blobs.upsample_bilinear2d([64, 64], false, None, None);
            blobs + Draws::new(8, &name, number).normal(&[8, 3, 64, 64], 0.3)
        };
        let groups = self.config.training_views().groups.into_iter();
        let groups =
            groups.map(|group| (group.name.clone(), (0..group.count).map(&mut view).collect()));
        Batch::new(groups.collect())
    }

    fn step_of(&mut self, batch: &Batch, learning_rate: f64) -> StepReport {
        let Trainer { config, model, sgd, step } = self;
        let at = At { step: *step, learning_rate };
        let report = update(model, sgd, &Local, config, batch, at).unwrap();
        self.step += 1;
        report
    }

    fn step(&mut self) -> StepReport {
        let batch = self.batch();
        let report = self.step_of(&batch, self.config.base_lr());
        assert!(report.applied);
        report
    }

    /// Weights, statistics, queues and momentum, copied.
    fn state(&self) -> HashMap<String, Tensor> {
        let momentum = self.sgd.tensors().into_iter();
        let momentum = momentum.map(|(name, tensor)| (format!("momentum.{name}"), tensor));
        let all = self.model.tensors().into_iter().chain(momentum);
        all.map(|(name, tensor)| (name, tensor.copy())).collect()
    }
}

fn number(t: &Tensor) -> f64 {
    t.to_kind(Kind::Double).double_value(&[])
}

fn off(a: &Tensor, b: &Tensor) -> f64 {
    number(&(a - b).abs().max())
}

/// Without weight on the cells, bit for bit: losses, the backbone and MoCo's head of both encoders, its queue, momentum.
#[test]
fn densecl_without_its_dense_term_is_moco_v2() {
    let sets = ["method.queue=24", "method.dim=16", "method.ema=0.9"];
    for more in ["method.dense_weight=0", "method.dense_from=3"] {
        let mut densecl = Trainer::new("densecl-r50", &[&sets[..], &[more]].concat());
        let mut moco = Trainer::new("moco-v2-r50", &sets);
        for _ in 0..3 {
            let (ours, theirs) = (densecl.step(), moco.step());
            assert_eq!(ours.terms[0], theirs.terms[0], "{more}");
            assert_eq!(ours.loss.to_bits(), theirs.loss.to_bits(), "{more}");
            // Its sum has the zeros of another head in it.
            assert!((ours.gradient_norm / theirs.gradient_norm - 1.0).abs() < 1e-6, "{more}");
        }
        let (ours, theirs) = (densecl.state(), moco.state());
        for (name, theirs) in theirs {
            assert!(ours[&name].equal(&theirs), "{more}: {name}");
        }
    }
}

/// The ring of cells takes the key encoder's average of cells, not cells of the query's choice, nor the query's; and
/// the key encoder is another network than the query encoder (lightly's example was none of that).
#[test]
fn densecls_second_queue_holds_the_key_encoders_averages() {
    let sets = ["method.queue=24", "method.dim=16", "method.ema=0.9", "model.bn_splits=1"];
    let mut trainer = Trainer::new("densecl-r50", &sets);
    trainer.step();
    let batch = trainer.batch();
    trainer.step_of(&batch, 0.0); // the key encoder has followed, and nothing else has changed
    let key = trainer.model.key.as_ref().unwrap();
    let view = &batch.views("crops").unwrap()[1];
    let of = |encoder: &detco::model::Encoder| {
        tch::no_grad(|| encoder.embed(view, GLOBAL, 1, &mut Moments::default()).unwrap())
    };
    let (keys, queries) = (of(key), of(&trainer.model.query));
    let [global, cells, mean, _] = keys.as_slice() else { panic!("{} outputs", keys.len()) };
    let state = trainer.state();
    let entered = |name: &str| state[name].narrow(1, 8, 8).tr();
    assert!(off(&entered("queue.global.5"), global) < 1e-5);
    assert!(off(&entered("queue.dense_mean.5"), mean) < 1e-5);
    assert_eq!((cells.size(), mean.size()), (vec![8 * 4, 16], vec![8, 16]));
    assert!(off(mean, &queries[2]) > 1e-3, "two encoders");
    // Unit length comes after the average, not before.
    let of_units = cells.view([8, 4, 16]).mean_dim([1_i64].as_slice(), false, None);
    let lengths = of_units.norm_scalaropt_dim(2, [1], true);
    assert!(number(&lengths.max()) < 1.0 - 1e-6);
    for rows in [global, cells, mean] {
        assert!(
            off(
                &rows.square().sum_dim_intlist([1].as_slice(), false, None),
                &Tensor::from(1.0_f32)
            ) < 1e-5
        );
    }
}

/// At the start both of its terms are near ln(k + 1), as a positive that is no better than a negative.
#[test]
fn densecl_starts_near_the_logarithm_of_its_queue() {
    let mut trainer = Trainer::new("densecl-r50", &["method.queue=4096"]);
    let report = trainer.step();
    for term in &report.terms {
        // A positive of up to 1 / 0.2 above the negatives' mean.
        assert!((4097_f64.ln() - 5.5..4097_f64.ln() + 1.0).contains(&term.loss), "{term:?}");
    }
}

/// With a momentum of 1 the teacher stays as it is, with 0 it is the student; it has no predictor.
#[test]
fn byols_teacher_follows_by_its_momentum_and_does_not_predict() {
    let sets = ["method.hidden=64", "method.dim=16", "optim.lr=1.0"];
    for (ema, set) in [(1.0, "method.ema=1.0"), (0.0, "method.ema=0.0")] {
        let mut trainer = Trainer::new("byol-r50", &[&sets[..], &[set]].concat());
        let start = trainer.state();
        trainer.step();
        let before = trainer.state(); // the student that the teacher follows in the next step
        trainer.step();
        let after = trainer.state();
        let parameters = trainer.model.key.as_ref().unwrap().parameters();
        assert!(!parameters.is_empty());
        for (name, _) in parameters {
            assert!(!name.contains("predictor"), "{name}");
            let expected = if ema == 1.0 { &start } else { &before };
            let of = if ema == 1.0 { "key" } else { "query" };
            let off = off(&after[&format!("key.{name}")], &expected[&format!("{of}.{name}")]);
            assert!(off < 1e-6, "{ema} {name}: {off:.1e}");
        }
        assert!(after.contains_key("query.predictor.5.3.weight"));
        assert!(!after.contains_key("query.predictor.5.3.bias"), "none, as in the paper's code");
        assert!(!after.keys().any(|name| name.starts_with("key.predictor")));
        assert!(!after.keys().any(|name| name.starts_with("queue")));
    }
}

/// At the start a prediction tells nothing of its target: a distance of about 2 in each direction. What collapses, a
/// teacher that says the same of all images, shows as a spread of 0.
#[test]
fn byol_starts_near_2_and_shows_its_spread() {
    let mut trainer = Trainer::new("byol-r50", &[]);
    let report = trainer.step();
    assert_eq!(report.terms.len(), 2);
    for term in &report.terms {
        assert!((1.4..2.6).contains(&term.loss), "{term:?}");
        assert!((term.loss - (2.0 - 2.0 * term.reading("cosine"))).abs() < 1e-5);
        assert!(term.reading("target_std") > 0.01);
    }
    assert!((report.loss - report.terms.iter().map(|term| term.loss).sum::<f64>()).abs() < 1e-9);
    let names: Vec<&str> = report.embedding_std.iter().map(|of| of.scope.as_str()).collect();
    let all = ["global/first", "predictor/first", "global/second", "predictor/second"];
    assert_eq!(names, all);
    assert!(report.embedding_std.iter().all(|of| of.std > 0.0 && of.width == 256));
    // The last layer's zeros leave one direction for all: no spread.
    let mut collapsed = Trainer::new("byol-r50", &["method.ema=0"]);
    for (name, mut tensor) in collapsed.model.tensors() {
        if name.contains("global.5.0.weight") {
            let _ = tch::no_grad(|| tensor.zero_());
        }
    }
    let batch = collapsed.batch();
    let report = collapsed.step_of(&batch, 0.0);
    assert!(report.embedding_std[0].std < 1e-4 && report.terms[0].reading("target_std") < 1e-4);
}

/// What LARS adapts moves as far whatever the loss is multiplied by; vectors, which it leaves out, do not.
#[test]
fn the_scale_of_byols_loss_leaves_steps_of_lars_alone() {
    let run = |scale: &str| {
        let sets = ["method.hidden=64", "method.dim=16", "optim.weight_decay=0", "optim.lr=1.0"];
        let mut trainer = Trainer::new("byol-r50", &[&sets[..], &[scale]].concat());
        let start = trainer.state();
        trainer.step();
        (start, trainer)
    };
    let ((start, one), (_, four)) = (run("method.scale=1.0"), run("method.scale=4.0"));
    let (a, b) = (one.state(), four.state());
    for (name, parameter) in one.model.query.parameters() {
        let name = format!("query.{name}");
        let moved = off(&a[&name], &start[&name]);
        let apart = off(&a[&name], &b[&name]);
        match parameter.dim() {
            1 => assert!(moved < 1e-6 || apart > moved, "{name}: {apart:.1e} of {moved:.1e}"),
            _ => assert!(moved > 0.0 && apart < 1e-3 * moved, "{name}: {apart:.1e} of {moved:.1e}"),
        }
    }
}

const SWAV: [&str; 6] = [
    "method.hidden=64",
    "method.dim=16",
    "method.small_crops=2",
    "views.small.count=2",
    "method.queue=16",
    "optim.lr=1.0",
];
const PROTOTYPES: &str = "query.prototypes.5.1.weight";

fn lengths(rows: &Tensor) -> Tensor {
    rows.norm_scalaropt_dim(2, [1], false)
}

/// ln 3000 = 8.006, and somewhat more for scores that say something wrong; every prototype is in use.
#[test]
fn swav_starts_near_the_logarithm_of_its_prototypes() {
    let mut trainer = Trainer::new("swav-r50", &SWAV[2..5]);
    let report = trainer.step();
    let term = &report.terms[0];
    assert!((3000_f64.ln() - 0.2..3000_f64.ln() + 1.5).contains(&term.loss), "{term:?}");
    assert!(term.reading("perplexity") > 100.0, "{term:?}");
    assert!((2.0..=16.0).contains(&term.reading("prototypes")), "two views of eight samples");
    assert!((0.0..=1.0).contains(&term.reading("accuracy")));
}

/// They have unit length when they are used, no offsets (lightly's had), stay for as long as they are held (and are not
/// decayed), and then learn.
#[test]
fn prototypes_have_unit_length_and_are_held_at_first() {
    let sets = [&SWAV[..], &["method.freeze_updates=2", "optim.weight_decay=0.1"]].concat();
    let mut trainer = Trainer::new("swav-r50", &sets);
    let drawn = trainer.state()[PROTOTYPES].copy();
    let unit = &drawn / lengths(&drawn).unsqueeze(1);
    for _ in 0..2 {
        trainer.step();
        let state = trainer.state();
        assert!(off(&state[PROTOTYPES], &unit) < 1e-6);
        assert_eq!(number(&state["momentum.prototypes.5.1.weight"].abs().max()), 0.0);
    }
    trainer.step();
    let state = trainer.state();
    let learnt = &state[PROTOTYPES];
    assert!(off(learnt, &unit) > 1e-5);
    assert!(number(&state["momentum.prototypes.5.1.weight"].abs().max()) > 0.0);
    let batch = trainer.batch();
    trainer.step_of(&batch, 0.0); // makes their lengths 1 again and changes nothing else
    let again = &trainer.state()[PROTOTYPES];
    assert!(off(&lengths(again), &Tensor::from(1.0_f32)) < 1e-6);
    assert!(off(again, &(learnt / lengths(learnt).unsqueeze(1))) < 1e-6);
    let of_prototypes = state.keys().filter(|name| name.starts_with("query.prototypes"));
    assert_eq!(of_prototypes.count(), 1, "no offsets");
}

/// A queue for each of both large views takes the batch's embeddings once, after they were scored; of a step that is
/// refused it takes none. Without the queues' part in it the loss is that of no queues.
#[test]
fn swavs_queues_take_each_embedding_once() {
    let sets = [&SWAV[..], &["model.bn_splits=1", "method.queue_from=2"]].concat();
    let mut trainer = Trainer::new("swav-r50", &sets);
    let mut without = Trainer::new("swav-r50", &[&sets[..], &["method.queue=0"]].concat());
    let start = trainer.state();
    for step in 0..2 {
        let batch = trainer.batch();
        let (ours, theirs) = (trainer.step_of(&batch, 0.0), without.step_of(&batch, 0.0));
        assert_eq!(ours.terms, theirs.terms, "step {step}");
        let groups = ["crops", "small"].map(|group| batch.views(group).unwrap());
        let images = groups.map(|views| Tensor::stack(views, 1));
        let mut moments = [Moments::default(), Moments::default()];
        let query = &trainer.model.query;
        let outputs = query.embed_together(&images, GLOBAL, 1, &mut moments).unwrap();
        let z = outputs[0].view([8, 4, 16]);
        let state = trainer.state();
        for view in 0..2 {
            let queue = &state[&format!("queue.global.5.{view}")];
            let place = step * 8;
            assert!(off(&queue.narrow(1, place, 8).tr(), &z.select(1, view)) < 1e-5);
            let rest = |of: &Tensor| of.narrow(1, 8, if step == 0 { 8 } else { 0 });
            assert!(rest(queue).equal(&rest(&start[&format!("queue.global.5.{view}")])));
        }
    }
    // From here on the queues take part.
    let batch = trainer.batch();
    let (ours, theirs) = (trainer.step_of(&batch, 0.0), without.step_of(&batch, 0.0));
    assert_ne!(ours.terms[0].loss, theirs.terms[0].loss);
    let before = trainer.state();
    let bad = trainer.batch();
    let _ = bad.views("small").unwrap()[0].narrow(0, 3, 1).fill_(f64::NAN);
    assert!(!trainer.step_of(&bad, 0.1).applied);
    let after = trainer.state();
    for (name, before) in before {
        assert!(after[&name].equal(&before) || name == PROTOTYPES, "{name}");
    }
    assert!(trainer.step().applied);
}

/// Bad batches leave the others' state alone as well, but for the teacher, which follows first.
#[test]
fn refused_steps_change_nothing_of_densecl_and_byol() {
    let densecl = ["method.queue=24", "method.dim=16", "method.ema=1.0"];
    let byol = ["method.hidden=64", "method.dim=16", "method.ema=1.0"];
    for (recipe, sets, group) in [("densecl-r50", densecl, "crops"), ("byol-r50", byol, "second")] {
        let mut trainer = Trainer::new(recipe, &sets);
        trainer.step();
        let before = trainer.state();
        let bad = trainer.batch();
        let _ = bad.views(group).unwrap()[0].narrow(0, 3, 1).fill_(f64::NAN);
        assert!(!trainer.step_of(&bad, 0.1).applied);
        let after = trainer.state();
        for (name, before) in before {
            assert!(after[&name].equal(&before), "{recipe}: {name}");
        }
        assert!(trainer.step().applied);
    }
}

/// ln P, as a classifier that says nothing; and orders that come with the batch, without which it is refused.
#[test]
fn jigsaw_starts_at_the_logarithm_of_its_permutations() {
    let mut trainer = Trainer::new("jigsaw-r50", &["views.patches.grid.patch=32"]);
    let patches = Tensor::randn([8, 9, 3, 32, 32], (Kind::Float, Device::Cpu));
    let batch = || Batch::new(vec![("patches".to_string(), vec![patches.copy()])]);
    let at = At { step: 0, learning_rate: 0.1 };
    let Trainer { config, model, sgd, .. } = &mut trainer;
    let refused = update(model, sgd, &Local, config, &batch(), at).unwrap_err().to_string();
    assert!(refused.contains("does not say what was drawn"), "{refused}");
    let crop = Rect { left: 0, top: 0, width: 64, height: 64 };
    let note = |order| Note {
        picture: [64, 64],
        crop,
        flip: false,
        rotation: 0,
        permutation: Some(order),
    };
    let notes = (0..8).map(|sample| note(250 * sample)).collect();
    let batch = batch().with_notes(vec![("patches".to_string(), vec![notes])]);
    let report = update(model, sgd, &Local, config, &batch, at).unwrap();
    assert!((report.loss - 2000_f64.ln()).abs() < 0.5, "{report:?}");
    assert!(report.embedding_std.is_empty() && report.terms[0].reading("accuracy") <= 0.25);
}

/// What does not fit is refused by name, with what was expected.
#[test]
fn keys_and_views_that_do_not_fit_are_refused() {
    for (recipe, set, said) in [
        ("densecl-r50", "method.queue=1000", "method.queue = 1000: expected a positive multiple"),
        ("densecl-r50", "method.dense_weight=1.5", "method.dense_weight = 1.5: expected 0 to 1"),
        ("densecl-r50", "views.crops.count=3", "views.crops = 3 views: expected two views"),
        ("densecl-r50", "method.local=true", "unknown key `local`"),
        ("byol-r50", "method.ema=1.5", "method.ema = 1.5: expected 0 to 1"),
        ("byol-r50", "method.scale=0", "method.scale = 0: expected above 0"),
        ("byol-r50", "views.second.count=2", "views.second = 2 views: expected one view"),
        ("byol-r50", "method.queue=64", "it is a key of"),
        (
            "jigsaw-r50",
            "method.permutations=100",
            "views.patches = 1 views: expected one view with",
        ),
        ("jigsaw-r50", "method.permutations=1", "method.permutations = 1: expected 2 to 10000"),
        ("swav-r50", "method.epsilon=0", "method.epsilon = 0: expected above 0"),
        ("swav-r50", "method.small_crops=4", "views.small = 6 views: expected 4 views"),
        ("swav-r50", "views.small.count=0", "views.small = 0 views: expected 6 views"),
        ("swav-r50", "method.queue=300", "method.queue = 300: expected a positive multiple"),
        ("swav-r50", "method.prototypes=1", "method.prototypes = 1: expected 2 to 1048576"),
        ("swav-r50", "optim.cosine_end=2", "optim.cosine_end = 2: expected 0 to 1"),
    ] {
        let error = Config::load(recipe, &[set.to_string()]).unwrap_err().to_string();
        assert!(error.contains(said), "{recipe} {set}: {error}");
    }
}
