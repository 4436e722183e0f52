//! What DetCo and MoCo promise of encoders, queues, shuffling and accumulation, one promise a test.
#![cfg(feature = "train")]

use std::collections::HashSet;

use detco::batch::Batch;
use detco::config::{CROPS, Config, PATCHES};
use detco::dist::local::Local;
use detco::method::{GLOBAL, LOCAL, Met, Method, Moco};
use detco::model::{Draws, Encoder, Model, ModelError, Moments};
use detco::optim::Sgd;
use detco::step::{At, StepError, StepReport, permutation, update, update_watched};
use tch::{Device, Kind, Tensor};

const SIZE: i64 = 64;
const PATCH: i64 = 32;

/// A narrow DetCo: four levels, patches, eight samples in four BN groups.
fn config(sets: &[&str]) -> Config {
    let small = [
        "model.backbone=resnet18",
        "model.width=8",
        "method.dim=16",
        "model.bn_splits=4",
        "train.batch=8",
        "optim.lr_batch=8",
        "method.queue=24",
        "method.ema=0.5",
    ];
    let sets: Vec<String> = small.iter().chain(sets).map(ToString::to_string).collect();
    tch::set_num_threads(1);
    Config::load("detco-r50", &sets).unwrap()
}

fn moco(config: &Config) -> &Moco {
    config.method.as_a().unwrap()
}

fn key(model: &Model) -> &Encoder {
    model.key.as_ref().unwrap()
}

fn model(config: &Config) -> Model {
    Model::new(config, Device::Cpu).unwrap()
}

/// Blobs of colour and some noise: pure noise would have the same statistics in every sample.
fn picture(seed: u64, name: &str, shape: &[i64]) -> Tensor {
    let (edge, n) = (shape[shape.len() - 1], shape[..shape.len() - 3].iter().product::<i64>());
    let blobs = Draws::new(seed, name, 0).normal(&[n, 3, 4, 4], 1.0);
    let blobs = blobs.upsample_bilinear2d([edge, edge], false, None, None);
    let noise = Draws::new(seed, name, 1).normal(&[n, 3, edge, edge], 0.3);
    (blobs + noise).reshape(shape)
}

fn crops(n: i64, name: &str) -> Tensor {
    picture(3, name, &[n, 3, SIZE, SIZE])
}

fn patches(n: i64, name: &str) -> Tensor {
    picture(4, name, &[n, 9, 3, PATCH, PATCH])
}

fn batch(n: i64, name: &str) -> Batch {
    let view = |i: usize| format!("{name}.{i}");
    let crops = [crops(n, &view(0)), crops(n, &view(1))];
    Batch::of_pairs(crops, Some([patches(n, &view(0)), patches(n, &view(1))]))
}

fn in_double(batch: Batch) -> Batch {
    batch.map(|view| view.to_kind(Kind::Double))
}

/// Both encoders see the same pixels.
fn identical_views(n: i64) -> Batch {
    let (crop, patch) = (crops(n, "same"), patches(n, "same"));
    Batch::of_pairs([crop.copy(), crop], Some([patch.copy(), patch]))
}

fn optimizer(model: &Model, config: &Config) -> Sgd {
    Sgd::new(model.query.parameters(), config.optim.momentum, config.optim.weight_decay)
}

fn at(step: u64) -> At {
    At { step, learning_rate: 0.03 }
}

fn step(model: &mut Model, sgd: &mut Sgd, config: &Config, batch: &Batch, at: At) -> StepReport {
    update(model, sgd, &Local, config, batch, at).unwrap()
}

fn number(scalar: &Tensor) -> f64 {
    scalar.detach().to_kind(Kind::Double).double_value(&[])
}

fn difference(a: &Tensor, b: &Tensor) -> f64 {
    number(&(a.detach() - b.detach()).abs().max())
}

/// `max |a - b| / max |b|`.
fn error(a: &Tensor, b: &Tensor) -> f64 {
    difference(a, b) / number(&b.abs().max()).max(f64::MIN_POSITIVE)
}

fn copies(tensors: Vec<(String, Tensor)>) -> Vec<(String, Tensor)> {
    tensors.into_iter().map(|(name, tensor)| (name, tensor.copy())).collect()
}

fn named(tensors: &[(String, Tensor)], name: &str) -> Tensor {
    let (_, tensor) = tensors.iter().find(|(other, _)| other == name).unwrap();
    tensor.shallow_clone()
}

fn assert_same(a: &[(String, Tensor)], b: &[(String, Tensor)]) {
    assert_eq!(a.len(), b.len());
    for ((name, a), (other, b)) in a.iter().zip(b) {
        assert_eq!(name, other);
        assert!(a.equal(b), "{name} differs by {:e}", difference(a, b));
    }
}

fn is_buffer(name: &str) -> bool {
    name.contains("running") || name.contains("tracked")
}

#[test]
fn the_key_encoder_starts_as_a_copy_of_the_query_encoder() {
    let model = model(&config(&[]));
    assert_same(&key(&model).tensors(), &model.query.tensors());
    for ((name, key), (_, query)) in key(&model).parameters().iter().zip(model.query.parameters()) {
        assert!(!key.requires_grad() && query.requires_grad(), "{name}");
    }
}

#[test]
fn weights_and_queues_come_from_the_seed_alone() {
    let first = model(&config(&[])).tensors();
    tch::manual_seed(99);
    assert_same(&first, &model(&config(&[])).tensors());
    // Another set of levels leaves alone what both have.
    let fewer = config(&["method.levels=[5]", "method.level_weights=[1.0]", "method.local=false"]);
    for (name, tensor) in &model(&fewer).tensors() {
        assert!(named(&first, name).equal(tensor), "{name}");
    }
    let other = model(&config(&["seed=1"])).tensors();
    for ((name, a), (_, b)) in first.iter().zip(&other) {
        let drawn = name.contains("conv") || name.contains("global") || name.contains("local");
        assert!(!drawn || !a.equal(b), "{name} does not depend on the seed");
    }
}

#[test]
fn names_of_the_state_are_unique_and_nothing_is_listed_twice() {
    let model = model(&config(&["model.backbone=resnet50"]));
    let tensors = model.tensors();
    let names: HashSet<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names.len(), tensors.len());
    let memory: HashSet<usize> = tensors.iter().map(|(_, t)| t.data_ptr() as usize).collect();
    assert_eq!(memory.len(), tensors.len(), "two names share memory");
    for name in [
        "query.backbone.conv1.weight",
        "key.backbone.layer1.0.bn1.running_mean",
        "key.backbone.layer4.0.downsample.1.num_batches_tracked",
        "query.global.2.0.weight",
        "query.local.5.2.bias",
        "queue.global.2",
        "queue.local.5",
        "queue.pointer",
    ] {
        assert!(names.contains(name), "{name}");
    }
    let backbone = model.query.backbone_tensors();
    assert_eq!(backbone.len(), 318); // torchvision's resnet50 has 320, two of them fc
    assert!(backbone.iter().all(|(name, _)| !name.starts_with("backbone") && !name.contains("fc")));
}

#[test]
fn initial_weights_are_drawn_as_torchvision_draws_them() {
    let model = model(&config(&["model.width=64"]));
    let tensors = model.query.tensors();
    let get = |name: &str| named(&tensors, name).to_kind(Kind::Double);
    for (name, fan_out) in
        [("conv1", 64 * 49), ("layer3.1.conv2", 256 * 9), ("layer4.0.downsample.0", 512)]
    {
        let weight = get(&format!("backbone.{name}.weight"));
        let expected = (2.0 / f64::from(fan_out)).sqrt();
        let std = number(&weight.std(true));
        assert!((std / expected - 1.0).abs() < 0.03, "{name}: {std} {expected}");
        assert!(number(&weight.mean(Kind::Double)).abs() < 0.05 * expected, "{name}");
    }
    for (name, fan_in) in [("global.5.0", 512.0_f64), ("local.5.0", 9.0 * 512.0)] {
        let bound = 1.0 / fan_in.sqrt();
        for part in ["weight", "bias"] {
            let tensor = get(&format!("{name}.{part}"));
            let (low, high) = (number(&tensor.min()), number(&tensor.max()));
            assert!((-1.000001 * bound..-0.97 * bound).contains(&low), "{name}.{part} {low}");
            assert!((0.97 * bound..1.000001 * bound).contains(&high), "{name}.{part} {high}");
        }
    }
    // No zero-init of the last scale in a block.
    assert_eq!(number(&get("backbone.layer2.1.bn2.weight").min()), 1.0);
    for scope in [GLOBAL, LOCAL] {
        for ring in model.queues.of(scope) {
            let lengths = ring.norm_scalaropt_dim(2, [0], false);
            assert!(difference(&lengths, &lengths.ones_like()) < 1e-6);
        }
    }
}

/// Parameters on ResNet-50, by arithmetic.
#[test]
fn heads_have_the_sizes_that_were_decided() {
    for (local_head, expected) in [("9c-c", 50_632_704), ("pirl", 6_658_560)] {
        let set = format!("method.local_head={local_head}");
        let sets = ["model.backbone=resnet50", "model.width=64", "method.dim=128", &set];
        let model = model(&config(&sets));
        let count = |prefix: &str| -> usize {
            let all = model.query.parameters();
            all.iter().filter(|(n, _)| n.starts_with(prefix)).map(|(_, t)| t.numel()).sum()
        };
        let c = [256, 512, 1024, 2048];
        let sum = |of: fn(usize) -> usize| c.into_iter().map(of).sum::<usize>();
        assert_eq!(count("global."), sum(|c| c * c + c + c * 128 + 128));
        let local = if local_head == "9c-c" {
            sum(|c| 9 * c * c + c + c * 128 + 128)
        } else {
            sum(|c| c * c + c + c * 128 + 128 + 9 * 128 * 128 + 128)
        };
        assert_eq!(count("local."), local, "{local_head}");
        assert!(local.abs_diff(expected) < 10_000, "{local_head}: {local}");
        assert_eq!(count("backbone."), 23_508_032);
    }
}

/// With equal weights, equal views and one BN group every query meets itself: the positive logit
/// is 1/tau in every row, at every level, for crops and patches. Keys that stay shuffled, a key
/// encoder that is no copy, or patches torn from their image would all show here.
#[test]
fn identical_views_give_positives_of_one_over_tau() {
    let config = config(&["model.bn_splits=1"]);
    let mut model = model(&config);
    let mut sgd = optimizer(&model, &config);
    let order = permutation(config.seed, 0, 8);
    let moved = order.iter().zip(0..).filter(|(sample, place)| *sample != place).count();
    assert!(moved > 4, "the shuffle moves nobody: this would prove nothing");
    let mut rows = 0;
    let batch = identical_views(8);
    update_watched(&mut model, &mut sgd, &Local, &config, &batch, at(0), &mut |terms| {
        for (term, logits) in terms {
            let positive = logits.narrow(1, 0, 1);
            let off = (positive.detach() - 1.0 / moco(&config).temperature).abs();
            match term.ends_with("gl") {
                true => assert!(number(&off.max()) > 0.01, "patches are not a crop"),
                false => {
                    println!("{term}: {:.1e}", number(&off.max()));
                    assert!(number(&off.max()) < 2e-5, "{term}");
                }
            }
            rows += positive.size()[0];
        }
    })
    .unwrap();
    assert_eq!(rows, 12 * 8);
}

/// The same with frozen statistics, with samples moved across groups and brought back.
#[test]
fn frozen_statistics_give_the_same_embedding_wherever_a_sample_goes() {
    let config = config(&[]);
    let mut model = model(&config);
    // Statistics that are not the initial 0 and 1, the same for both encoders.
    let mut seen = Moments::default();
    drop(tch::no_grad(|| model.query.embed(&crops(8, "warm"), GLOBAL, 4, &mut seen).unwrap()));
    model.query.settle(&seen).unwrap();
    model.key.as_mut().unwrap().settle(&seen).unwrap();
    let (crop, patch) = (crops(8, "same"), patches(8, "same"));
    let order = Tensor::from_slice(&permutation(config.seed, 1, 8));
    let back = order.argsort(0, false);
    let both = |of: &dyn Fn(&Tensor, &str) -> Vec<Tensor>| -> Vec<Tensor> {
        of(&crop, GLOBAL).into_iter().chain(of(&patch, LOCAL)).collect()
    };
    let query = both(&|images, scope| model.query.embed_frozen(images, scope).unwrap());
    let keys = both(&|images, scope| {
        let keys = key(&model).embed_frozen(&images.index_select(0, &order), scope).unwrap();
        keys.iter().map(|key| key.index_select(0, &back)).collect()
    });
    let (outputs, targets, queues) = (query.as_slice(), keys.as_slice(), &model.queues);
    let met = Met::new(outputs, targets, queues);
    for (term, logits) in moco(&config).logits(&met) {
        if !term.ends_with("gl") {
            let off = number(&(logits.narrow(1, 0, 1) - 5.0).abs().max());
            assert!(off < 1e-5, "{term}: {off:e}");
        }
    }
}

/// Keys are normalised in other company than their queries, so statistics tell nothing.
#[test]
fn shuffling_puts_keys_into_other_groups_than_their_queries() {
    let mut together = 0;
    for step in 0..200 {
        let order = permutation(0, step, 8);
        let group = |sample: i64| order.iter().position(|s| *s == sample).unwrap() / 2;
        together += (0..4).filter(|pair| group(2 * pair) == group(2 * pair + 1)).count();
    }
    // Two samples meet again with probability 1/7: 114 of 800 expected, five deviations are 50.
    assert!((64..164).contains(&together), "{together} of 800 pairs stay together");

    let config = config(&[]);
    let mut model = model(&config);
    let images = crops(8, "same");
    let order = Tensor::from_slice(&[0_i64, 2, 4, 6, 1, 3, 5, 7]);
    let (mut a, mut b) = (Moments::default(), Moments::default());
    let plain = model.query.embed(&images, GLOBAL, 4, &mut a).unwrap();
    let shuffled = model.query.embed(&images.index_select(0, &order), GLOBAL, 4, &mut b).unwrap();
    for (plain, shuffled) in plain.iter().zip(&shuffled) {
        let shuffled = shuffled.index_select(0, &order.argsort(0, false));
        assert!(difference(plain, &shuffled) > 1e-3, "groups do not matter");
    }
    // And in the step: identical views no longer give 1/tau, which they reach to 1e-6 otherwise.
    let mut sgd = optimizer(&model, &config);
    let report = step(&mut model, &mut sgd, &config, &identical_views(8), at(0));
    assert!(
        report.terms.iter().all(|term| term.reading("positive") < 4.9999),
        "{:?}",
        report.terms
    );
}

/// Groups are contiguous, keep a sample's nine patches together, and move the running statistics
/// by the mean of what each would do alone.
#[test]
fn a_group_is_a_batch_of_its_own() {
    let config = config(&[]);
    for (scope, images) in [(GLOBAL, crops(8, "a")), (LOCAL, patches(8, "a"))] {
        let mut whole = model(&config);
        let mut seen = Moments::default();
        let together = whole.query.embed(&images, scope, 4, &mut seen).unwrap();
        whole.query.settle(&seen).unwrap();
        let mut parts: Vec<Vec<Tensor>> = Vec::new();
        let mut statistics: Vec<Vec<(String, Tensor)>> = Vec::new();
        for group in 0..4 {
            let mut alone = model(&config);
            let mut seen = Moments::default();
            let rows = images.narrow(0, 2 * group, 2);
            parts.push(alone.query.embed(&rows, scope, 1, &mut seen).unwrap());
            alone.query.settle(&seen).unwrap();
            statistics.push(alone.query.backbone_tensors());
        }
        for (level, together) in together.iter().enumerate() {
            let apart: Vec<&Tensor> = parts.iter().map(|part| &part[level]).collect();
            let off = difference(together, &Tensor::cat(&apart, 0));
            assert!(off < 1e-5, "{scope} level {level}: {off:e}");
        }
        for (i, (name, tensor)) in whole.query.backbone_tensors().iter().enumerate() {
            let apart: Vec<&Tensor> = statistics.iter().map(|part| &part[i].1).collect();
            if name.contains("running") {
                let mean =
                    Tensor::stack(&apart, 0).mean_dim([0_i64].as_slice(), false, Kind::Float);
                assert!(error(tensor, &mean) < 1e-5, "{name}");
            } else {
                assert!(tensor.equal(apart[0]), "{name}");
            }
        }
    }
}

#[test]
fn a_forward_pass_changes_nothing() {
    let model = model(&config(&[]));
    let before = copies(model.tensors());
    let mut seen = Moments::default();
    drop(model.query.embed(&patches(8, "a"), LOCAL, 2, &mut seen).unwrap());
    drop(model.query.features(&crops(8, "a")).unwrap());
    assert_same(&before, &model.tensors());
}

/// The negatives are the queue as it was; the step's keys enter it afterwards, in the batch's order.
#[test]
fn the_keys_of_a_step_are_not_among_its_negatives() {
    let config = config(&[]);
    let mut model = model(&config);
    let mut sgd = optimizer(&model, &config);
    for s in 0..2 {
        let batch = batch(8, &format!("step {s}"));
        let before = copies(model.tensors());
        let mut seen = Moments::default();
        let (crops, patches) = (batch.views(CROPS).unwrap(), batch.views(PATCHES).unwrap());
        let global = model.query.embed(&crops[0], GLOBAL, 4, &mut seen).unwrap();
        let local = model.query.embed(&patches[0], LOCAL, 4, &mut seen).unwrap();
        let pointer = model.queues.pointer();
        assert_eq!(pointer, 8 * s as i64);
        let mut positives = Vec::new();
        update_watched(&mut model, &mut sgd, &Local, &config, &batch, at(s), &mut |terms| {
            for (term, logits) in terms {
                let (level, pair) = term.trim_start_matches("res").split_once('/').unwrap();
                let index = level.parse::<usize>().unwrap() - 2;
                let (query, scope) = match pair {
                    "gg" => (&global, "global"),
                    "ll" => (&local, "local"),
                    _ => (&local, "global"),
                };
                let query = query[index].detach();
                let name = format!("queue.{scope}.{level}");
                let expected = query.matmul(&named(&before, &name)) / moco(&config).temperature;
                let found = logits.narrow(1, 1, 24);
                assert!(difference(&found, &expected) < 1e-5, "{name} {pair}");
                positives.push((name, query, logits.narrow(1, 0, 1).detach().copy()));
            }
        })
        .unwrap();
        // What was the positive is now in the queue.
        let after = model.tensors();
        for (name, query, positive) in &positives {
            let keys = named(&after, name).narrow(1, pointer, 8).tr();
            let again = (query * keys).sum_dim_intlist([1_i64].as_slice(), true, Kind::Float);
            assert!(difference(&(again / 0.2), positive) < 1e-5, "{name}");
            let untouched = |of: &[(String, Tensor)]| named(of, name).narrow(1, 16, 8);
            assert!(untouched(&before).equal(&untouched(&after)), "{name}");
        }
    }
}

#[test]
fn queues_wrap_around() {
    let mut model = model(&config(&[]));
    let keys = |value: f64| -> Vec<Tensor> {
        let float = (Kind::Float, Device::Cpu);
        (0..4).map(|level| Tensor::full([8, 16], value + 0.1 * f64::from(level), float)).collect()
    };
    for (round, pointer) in [(1.0, 8), (2.0, 16), (3.0, 0), (4.0, 8)] {
        let new: Vec<Tensor> = [keys(round), keys(10.0 * round)].into_iter().flatten().collect();
        model.queues.enqueue(&new).unwrap();
        assert_eq!(model.queues.pointer(), pointer);
    }
    for (scope, factor) in [(GLOBAL, 1.0), (LOCAL, 10.0)] {
        for (level, ring) in model.queues.of(scope).iter().enumerate() {
            for (column, round) in [(0, 4.0), (7, 4.0), (8, 2.0), (15, 2.0), (16, 3.0), (23, 3.0)] {
                let expected = factor * round + 0.1 * level as f64;
                let found = ring.double_value(&[3, column]);
                assert!((found - expected).abs() < 1e-5, "{scope} {level} {column}");
            }
        }
    }
}

#[test]
fn the_key_encoder_follows_by_its_parameters_alone() {
    let mut model = model(&config(&[]));
    let mut seen = Moments::default();
    drop(tch::no_grad(|| model.query.embed(&crops(8, "a"), GLOBAL, 4, &mut seen).unwrap()));
    model.query.settle(&seen).unwrap();
    tch::no_grad(|| {
        for (_, mut parameter) in model.query.parameters() {
            let _ = parameter.g_add_scalar_(1.0);
        }
    });
    let (before, query) = (copies(key(&model).tensors()), copies(model.query.tensors()));
    model.follow(0.75).unwrap();
    for (((name, now), (_, key)), (_, query)) in
        key(&model).tensors().iter().zip(&before).zip(&query)
    {
        if is_buffer(name) {
            assert!(now.equal(key), "{name}");
        } else {
            assert!(difference(now, &(key * 0.75 + query * 0.25)) < 1e-6, "{name}");
        }
    }
    assert_same(&model.query.tensors(), &query);
}

#[test]
fn both_encoders_keep_running_statistics_of_their_own() {
    let config = config(&[]);
    let mut model = model(&config);
    let mut sgd = optimizer(&model, &config);
    step(&mut model, &mut sgd, &config, &batch(8, "a"), at(0));
    for ((name, query), (_, key)) in model.query.tensors().iter().zip(key(&model).tensors()) {
        if name.ends_with("running_mean") {
            assert!(difference(query, &key) > 0.0, "{name}");
        }
        if name.ends_with("num_batches_tracked") {
            // Two passes a step: crops and patches.
            assert_eq!((query.int64_value(&[]), key.int64_value(&[])), (2, 2), "{name}");
        }
    }
}

#[test]
fn twelve_terms_have_twelve_readings() {
    let config = config(&[]);
    let mut model = model(&config);
    let mut sgd = optimizer(&model, &config);
    let report = step(&mut model, &mut sgd, &config, &batch(8, "a"), at(0));
    let which: HashSet<_> = report.terms.iter().map(|term| &term.name).collect();
    assert_eq!((which.len(), report.terms.len()), (12, 12));
    let losses: HashSet<u64> = report.terms.iter().map(|term| term.loss.to_bits()).collect();
    assert_eq!(losses.len(), 12, "two terms show the same reading: {:?}", report.terms);
    let weight = |term: &str| moco(&config).level_weights[usize::from(term.as_bytes()[3] - b'2')];
    let weighted: f64 = report.terms.iter().map(|term| weight(&term.name) * term.loss).sum();
    assert!((weighted - report.loss).abs() < 1e-9);
    assert!(report.gradient_norm > 0.0);
    for term in &report.terms {
        assert!((0.0..=1.0).contains(&term.reading("accuracy")));
        let [positive, negative] = ["positive", "negative"].map(|name| term.reading(name));
        assert!(positive.abs() <= 5.0 && negative.abs() <= 5.0);
    }
    let spreads: HashSet<_> = report.embedding_std.iter().map(|s| (s.level, &s.scope)).collect();
    assert_eq!(spreads.len(), 8);
    // The mean square over d coordinates is 1/d, so no spread exceeds 1/sqrt(16).
    assert!(report.embedding_std.iter().all(|s| s.std > 0.0 && s.std <= 0.25 + 1e-6));
}

/// A step in micro-batches is the same step: losses, gradients, weights, momentum, statistics,
/// queues. In float64, where rounding does not carry units across their ReLU.
#[test]
fn accumulation_changes_nothing_but_rounding() {
    let run = |accumulate: &str| {
        let accumulate = format!("train.accumulate={accumulate}");
        let config = config(&["train.batch=16", "method.queue=48", &accumulate]);
        let mut model = model(&config);
        model.convert(Kind::Double);
        let mut sgd = optimizer(&model, &config);
        let mut losses = Vec::new();
        let mut spreads = Vec::new();
        for s in 0..3 {
            let batch = in_double(batch(16, &format!("{s}")));
            let report = step(&mut model, &mut sgd, &config, &batch, at(s));
            losses.push(report.loss);
            spreads.extend(report.embedding_std.iter().map(|spread| spread.std));
        }
        let gradients = sgd.gradients().into_iter().map(|g| ("gradient".to_string(), g));
        let state = model.tensors().into_iter().chain(sgd.tensors()).chain(gradients);
        (losses, spreads, copies(state.collect()))
    };
    let (losses, spreads, state) = run("1");
    for accumulate in ["2", "4"] {
        let (other_losses, other_spreads, other_state) = run(accumulate);
        let mut worst = (0.0_f64, String::new());
        for (a, b) in losses.iter().zip(&other_losses).chain(spreads.iter().zip(&other_spreads)) {
            let error = (a / b - 1.0).abs();
            assert!(error < 1e-9, "accumulate = {accumulate}: {a} {b}");
        }
        for ((name, a), (_, b)) in state.iter().zip(&other_state) {
            if name.contains("tracked") || name.contains("pointer") {
                assert!(a.equal(b), "{name}: {a:?} {b:?}");
            } else if error(a, b) > worst.0 {
                worst = (error(a, b), name.clone());
            }
        }
        println!("accumulate = {accumulate}: worst relative error {:.1e} at {}", worst.0, worst.1);
        assert!(worst.0 < 1e-9, "accumulate = {accumulate}: {worst:?}");
    }
}

/// A pixel that is not a number is reported, and the state stays as it was.
#[test]
fn a_loss_that_is_not_finite_leaves_the_state_alone() {
    let config = config(&[]);
    let mut model = model(&config);
    let mut sgd = optimizer(&model, &config);
    step(&mut model, &mut sgd, &config, &batch(8, "good"), at(0));
    let state = |model: &Model, sgd: &Sgd| {
        copies(model.tensors().into_iter().chain(sgd.tensors()).collect())
    };
    for view in 0..2 {
        let before = state(&model, &sgd);
        let bad = batch(8, "bad");
        let _ = bad.views(CROPS).unwrap()[view].narrow(0, 3, 1).fill_(f64::NAN);
        let report = step(&mut model, &mut sgd, &config, &bad, at(1));
        assert!(!report.applied && report.loss.is_nan(), "{report:?}");
        for ((name, a), (_, b)) in before.iter().zip(state(&model, &sgd)) {
            if name.starts_with("key.") && !is_buffer(name) {
                assert_eq!(number(&b.isfinite().all()), 1.0, "{name}");
            } else {
                assert!(a.equal(&b), "{name} changed");
            }
        }
    }
    let report = step(&mut model, &mut sgd, &config, &batch(8, "good again"), at(2));
    assert!(report.applied && report.loss.is_finite());
}

/// Model and optimizer, saved and loaded into fresh ones, go on bit by bit.
#[test]
fn a_loaded_state_goes_on_where_the_saved_one_was() {
    let config = config(&[]);
    let mut first = model(&config);
    let mut sgd = optimizer(&first, &config);
    for s in 0..2 {
        step(&mut first, &mut sgd, &config, &batch(8, &format!("{s}")), at(s));
    }
    let mut other = model(&Config { seed: 77, ..config.clone() });
    other.load(&copies(first.tensors())).unwrap();
    let mut other_sgd = optimizer(&other, &config);
    other_sgd.load(&copies(sgd.tensors())).unwrap();
    for s in 2..4 {
        let batch = batch(8, &format!("{s}"));
        let a = step(&mut first, &mut sgd, &config, &batch, at(s));
        let b = step(&mut other, &mut other_sgd, &config, &batch, at(s));
        assert_eq!(a, b);
    }
    assert_same(&first.tensors(), &other.tensors());
    assert_same(&sgd.tensors(), &other_sgd.tensors());
}

#[test]
fn a_state_that_does_not_fit_is_refused_by_name_and_changes_nothing() {
    let config = config(&[]);
    let mut own = model(&config);
    let before = copies(own.tensors());
    let foreign = || copies(model(&Config { seed: 5, ..config.clone() }).tensors());
    let name = "query.global.3.0.weight";
    let of = |name: &str| before.iter().position(|(other, _)| other == name).unwrap();

    let mut state = foreign();
    drop(state.remove(of(name)));
    let error = own.load(&state).unwrap_err();
    assert!(matches!(&error, ModelError::Missing { names, .. } if *names == [name]), "{error}");

    let mut state = foreign();
    state.push(("layers.0.weight".into(), Tensor::from(1.0)));
    let error = own.load(&state).unwrap_err();
    assert!(matches!(error, ModelError::Unexpected { .. }), "{error}");

    let mut state = foreign();
    let twice = (state[3].0.clone(), state[3].1.copy());
    state.push(twice);
    assert!(matches!(own.load(&state), Err(ModelError::Twice { .. })));

    let mut state = foreign();
    state[of(name)].1 = Tensor::zeros([4, 16], (Kind::Float, Device::Cpu));
    let error = own.load(&state).unwrap_err().to_string();
    assert!(error.contains(name) && error.contains("[4, 16]"), "{error}");

    let mut state = foreign();
    state[of(name)].1 = state[of(name)].1.to_kind(Kind::Double);
    assert!(matches!(own.load(&state), Err(ModelError::Type { .. })));

    let mut state = foreign();
    state[of("queue.pointer")].1 = Tensor::from(24_i64);
    assert!(matches!(own.load(&state), Err(ModelError::Pointer { found: 24, length: 24 })));

    assert_same(&before, &own.tensors());
}

#[test]
fn foreign_backbone_weights_start_both_encoders() {
    let config = config(&[]);
    let mut own = model(&config);
    let other = model(&Config { seed: 9, ..config.clone() });
    let mut weights = copies(other.query.backbone_tensors());
    weights.retain(|(name, _)| !name.ends_with("num_batches_tracked"));
    own.start_from(&weights).unwrap();
    assert_same(&own.query.backbone_tensors(), &other.query.backbone_tensors());
    assert_same(&key(&own).tensors(), &own.query.tensors());
    weights.push(("fc.weight".to_string(), Tensor::from(0.0)));
    assert!(matches!(own.start_from(&weights), Err(ModelError::Unexpected { .. })));
}

#[test]
fn a_batch_that_does_not_fit_is_refused() {
    let config = config(&[]);
    let mut model = model(&config);
    let mut sgd = optimizer(&model, &config);
    let error = update(&mut model, &mut sgd, &Local, &config, &batch(7, "short"), at(0));
    assert!(matches!(error, Err(StepError::Samples { found: 7, expected: 8, .. })));
    let bare = [crops(8, "bare.0"), crops(8, "bare.1")];
    let bare = Batch::of_pairs(bare, None);
    let error = update(&mut model, &mut sgd, &Local, &config, &bare, at(0));
    assert!(matches!(error, Err(StepError::Views { group, .. }) if group == PATCHES));
}

#[test]
fn the_cifar_stem_keeps_the_resolution() {
    for (stem, expected) in [("cifar", [64, 32, 16, 8]), ("imagenet", [16, 8, 4, 2])] {
        let model = model(&config(&[&format!("model.stem={stem}")]));
        let maps = model.query.maps(&crops(2, "a")).unwrap();
        let edges: Vec<i64> = maps.iter().map(|map| map.size()[3]).collect();
        assert_eq!(edges, expected, "{stem}");
        assert_eq!(model.query.features(&crops(2, "a")).unwrap().size(), [2, 64]);
    }
}
