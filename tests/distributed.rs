//! Several ranks against one process with the whole batch: losses, gradients, weights, momentum and
//! queues after every step; and who is named when a rank is slow or differs.
//!
//! Ranks are processes: this file's own program, started again for its test `rank_of_a_test`, which
//! finds its place in the environment as a rank of `detco train` does. An error is
//! `max |a - b| / max |b|` of a tensor; the worst of each kind is printed (`--nocapture`).
#![cfg(feature = "train")]

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use detco::batch::Batch;
use detco::config::{self, Config};
use detco::dist::c10d::C10d;
use detco::dist::local::Local;
use detco::dist::rendezvous::Rendezvous;
use detco::dist::{Collective, DistError, Move, check, world};
use detco::method::LOCAL;
use detco::model::{Draws, Model};
use detco::optim::Sgd;
use detco::shim::c10d::{Role, Store};
use detco::step::{At, StepReport, update};
use tch::{Device, Kind, Tensor};

const STEPS: u64 = 20;
/// Of every error; twenty free steps in float64 amplify its 1e-16 to 1e-8 in the worst gradient.
const BOUND: f64 = 1e-5;
const PATIENCE: Duration = Duration::from_secs(60);

/// DetCo on four levels: 24 samples in 6 BN groups, so that 1, 2, 3 and 6 ranks can share them.
fn config(folder: &Path, sets: &[&str]) -> Config {
    let small = [
        "model.width=8",
        "method.dim=16",
        "model.bn_splits=6",
        "train.batch=24",
        "optim.lr=0.02",
        "optim.lr_batch=24",
        "method.queue=72",
        "method.ema=0.9",
    ];
    let file = folder.join("sets");
    let more = std::fs::read_to_string(file).unwrap_or_default();
    let all = small.iter().chain(sets).map(ToString::to_string);
    let sets: Vec<String> = all.chain(more.lines().map(String::from)).collect();
    tch::set_num_threads(1);
    Config::load("detco-small", &sets).unwrap()
}

/// Images that differ as photographs do: blobs of colour, and noise on top.
fn picture(name: &str, view: u64, shape: &[i64]) -> Tensor {
    let (edge, n) = (shape[shape.len() - 1], shape[..shape.len() - 3].iter().product::<i64>());
    let blobs = Draws::new(7, name, 0).normal(&[n, 3, 4, 4], 1.0);
    let blobs = blobs.upsample_bilinear2d([edge, edge], false, None, None);
    let noise = Draws::new(8, name, view).normal(&[n, 3, edge, edge], 0.3);
    (blobs + noise).reshape(shape)
}

/// A rank's rows of the global batch of a step.
fn batch(config: &Config, step: u64, kind: Kind, world: &dyn Collective) -> Batch {
    let n = config.train.batch;
    let rows = n / world.size() as i64;
    let view = |scope: &str, view: u64, shape: &[i64]| {
        let all = picture(&format!("{step}.{scope}"), view, shape).to_kind(kind);
        all.narrow(0, world.rank() as i64 * rows, rows)
    };
    let global = [0, 1].map(|i| view("global", i, &[n, 3, 32, 32]));
    let local = [0, 1].map(|i| view("local", i, &[n, 9, 3, 16, 16]));
    Batch::of_pairs(global, Some(local))
}

struct Trainer {
    config: Config,
    kind: Kind,
    model: Model,
    sgd: Sgd,
}

impl Trainer {
    fn new(config: Config, kind: Kind) -> Trainer {
        let mut model = Model::new(&config, Device::Cpu).unwrap();
        model.convert(kind);
        let parameters = model.query.parameters();
        let sgd = Sgd::new(parameters, config.optim.momentum, config.optim.weight_decay);
        Trainer { config, kind, model, sgd }
    }

    fn step(&mut self, step: u64, world: &dyn Collective) -> Result<StepReport, String> {
        let batch = batch(&self.config, step, self.kind, world);
        let at = At { step, learning_rate: self.config.base_lr() };
        let report = update(&mut self.model, &mut self.sgd, world, &self.config, &batch, at);
        report.map_err(|error| error.to_string())
    }

    /// Weights, queues, momentum: what a checkpoint holds.
    fn state(&self) -> Vec<(String, Tensor)> {
        let momentum = self.sgd.tensors().into_iter();
        let momentum = momentum.map(|(name, tensor)| (format!("momentum.{name}"), tensor));
        self.model.tensors().into_iter().chain(momentum).collect()
    }

    fn gradients(&self) -> Vec<(String, Tensor)> {
        let named = self.model.query.parameters().into_iter();
        let named = named.filter(|(_, parameter)| parameter.grad().defined());
        named.map(|(name, parameter)| (format!("gradient.{name}"), parameter.grad())).collect()
    }

    fn load(&mut self, state: Vec<(String, Tensor)>) {
        let (momentum, model): (Vec<_>, Vec<_>) =
            state.into_iter().partition(|(name, _)| name.starts_with("momentum."));
        let strip = |(name, tensor): (String, Tensor)| {
            (name.trim_start_matches("momentum.").to_string(), tensor)
        };
        self.model.load(&model).unwrap();
        self.sgd.load(&momentum.into_iter().map(strip).collect::<Vec<_>>()).unwrap();
    }
}

fn read(path: PathBuf) -> Vec<(String, Tensor)> {
    Tensor::read_safetensors(path).unwrap()
}

/// Parts of a state: what the test compares under one name.
fn kind_of(name: &str) -> &'static str {
    match name {
        _ if name.contains("running_") => "statistics",
        _ if name.starts_with("queue.") => "queues",
        _ if name.starts_with("momentum.") => "momentum",
        _ if name.starts_with("gradient.") => "gradients",
        _ if name.starts_with("loss") => "losses",
        _ => "weights",
    }
}

fn losses(report: &StepReport) -> Vec<(String, Tensor)> {
    let terms =
        report.terms.iter().map(|term| (format!("loss.{}", term.name), Tensor::from(term.loss)));
    [("loss".to_string(), Tensor::from(report.loss))].into_iter().chain(terms).collect()
}

/// `max |a - b| / max |b|`.
fn error(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    let (a, b) = (a.detach().to_kind(Kind::Double), b.detach().to_kind(Kind::Double));
    let scale = b.abs().max().double_value(&[]).max(f64::MIN_POSITIVE);
    let error = (a - b).abs().max().double_value(&[]) / scale;
    assert!(!error.is_nan(), "not a number");
    error
}

/// Writes tensors, however they lie in memory.
fn write(tensors: &[(String, Tensor)], path: PathBuf) {
    let laid: Vec<(&str, Tensor)> =
        tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.contiguous())).collect();
    Tensor::write_safetensors(&laid, path).unwrap();
}

/// One process with the whole batch; leaves its state before each step and what the step saw.
fn reference(folder: &Path, config: Config, kind: Kind) {
    let mut trainer = Trainer::new(config, kind);
    for step in 0..STEPS {
        let file = |name: &str| folder.join(format!("{name}.{step}.safetensors"));
        write(&trainer.state(), file("before"));
        let report = trainer.step(step, &Local).unwrap();
        let mut after = trainer.state();
        after.extend(trainer.gradients());
        after.extend(losses(&report));
        write(&after, file("after"));
    }
}

/// Starts `size` ranks of the case in `folder`.
fn ranks(folder: &Path, case: &str, size: usize) -> Vec<Output> {
    let store = Store::open("127.0.0.1", 0, Role::Serve, "", PATIENCE).unwrap();
    let start = |rank: usize| -> Child {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "rank_of_a_test", "--nocapture"]);
        command.env("DETCO_TEST_CASE", case).env("DETCO_TEST_FOLDER", folder);
        command.env("RANK", rank.to_string()).env("WORLD_SIZE", size.to_string());
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", store.port().to_string());
        command.env("TORCHELASTIC_USE_AGENT_STORE", "True").env("OMP_NUM_THREADS", "1");
        let said = File::create(said(folder, rank)).unwrap();
        command.stdout(Stdio::piped()).stderr(said).spawn().unwrap()
    };
    let children: Vec<Child> = (0..size).map(start).collect();
    let end = |(rank, child): (usize, Child)| {
        let output = child.wait_with_output().unwrap();
        Output { stderr: std::fs::read(said(folder, rank)).unwrap(), ..output }
    };
    children.into_iter().enumerate().map(end).collect()
}

/// Where a rank's standard error goes, for other ranks to read.
fn said(folder: &Path, rank: usize) -> PathBuf {
    folder.join(format!("said.{rank}"))
}

fn text(output: &Output) -> String {
    let both = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&both).into_owned()
}

/// What the other tests start as a rank; by itself it is no rank and has nothing to do.
#[test]
fn rank_of_a_test() {
    let (Some(case), Some(folder)) =
        (config::variable("DETCO_TEST_CASE"), config::variable("DETCO_TEST_FOLDER"))
    else {
        return;
    };
    let folder = PathBuf::from(folder);
    let config = config(&folder, &[]);
    let place = world::decide(&config::variable, None, false).unwrap();
    let world::World::Rank(spec) = place else { panic!("a world of several: {place:?}") };
    let rendezvous = Rendezvous::join(spec, PATIENCE, 69).unwrap();
    let stop = Arc::default();
    let world = C10d::new(rendezvous, Device::Cpu, &config.dist, stop).unwrap();
    match case.as_str() {
        "float" => equals_the_reference(&folder, config, Kind::Float, &world),
        "double" => equals_the_reference(&folder, config, Kind::Double, &world),
        "slow" => waits_for_a_slow_rank(&folder, &world),
        "differ" => differs(config, &world),
        other => panic!("no case {other}"),
    }
    world.leave();
}

/// In float64 the ranks run free from the first step; in float32 every step begins with the
/// reference's state.
fn equals_the_reference(folder: &Path, config: Config, kind: Kind, world: &C10d) {
    let mut trainer = Trainer::new(config, kind);
    let mut worst: BTreeMap<&str, (f64, String)> = BTreeMap::new();
    for step in 0..STEPS {
        let file = |name: &str| folder.join(format!("{name}.{step}.safetensors"));
        if kind == Kind::Float || step == 0 {
            trainer.load(read(file("before")));
        }
        let report = trainer.step(step, world).unwrap();
        let mut ours = trainer.state();
        ours.extend(trainer.gradients());
        ours.extend(losses(&report));
        let theirs: HashMap<String, Tensor> = read(file("after")).into_iter().collect();
        assert_eq!(ours.len(), theirs.len());
        for (name, ours) in ours {
            let error = error(&ours, &theirs[&name]);
            let kind = kind_of(&name);
            let entry = worst.entry(kind).or_insert((-1.0, String::new()));
            if error > entry.0 {
                *entry = (error, format!("{name} after step {}", step + 1));
            }
        }
    }
    for (name, (error, place)) in &worst {
        println!("{kind:?} {} of {}: {name:<10} {error:.1e} {place}", world.rank(), world.size());
    }
    for (name, (error, place)) in &worst {
        assert!(*error <= BOUND, "{name}: {error:.2e} at {place}");
    }
}

fn equal(kind: Kind, size: usize) {
    let folder = tempfile::tempdir().unwrap();
    reference(folder.path(), config(folder.path(), &[]), kind);
    let case = if kind == Kind::Double { "double" } else { "float" };
    for output in ranks(folder.path(), case, size) {
        print!("{}", text(&output));
        assert!(output.status.success(), "{}", text(&output));
    }
}

#[test]
fn two_ranks_make_each_step_as_one_does() {
    equal(Kind::Float, 2);
}

#[test]
fn three_ranks_train_as_one_does() {
    equal(Kind::Double, 3);
}

const SLOW: &str = "rank 1 is slow";

/// Rank 1 computes until rank 0 has said that it does so for too long.
fn waits_for_a_slow_rank(folder: &Path, world: &C10d) {
    world.at(7, Move::Keys);
    if world.rank() == 1 {
        let names_it = || std::fs::read_to_string(said(folder, 0)).unwrap().contains(SLOW);
        // Five minutes: then nothing will be said.
        let waited = (0..6000).find(|_| {
            std::thread::sleep(Duration::from_millis(50));
            names_it()
        });
        assert!(waited.is_some(), "rank 0 says nothing");
    }
    let sum = world.gather(&Tensor::from_slice(&[world.rank() as i64])).unwrap();
    assert_eq!(sum.size(), [3]);
}

#[test]
fn a_slow_rank_is_named_before_the_timeout() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("sets"), "dist.slow_seconds=2\n").unwrap();
    let outputs = ranks(folder.path(), "slow", 3);
    let texts: Vec<String> = outputs.iter().map(text).collect();
    assert!(outputs.iter().all(|output| output.status.success()), "{texts:?}");
    // A busy machine may have made another rank slow before.
    let said = texts[0].lines().find(|line| line.contains(SLOW)).expect(&texts[0]);
    for part in ["rank 0 of 3 has waited", "key forward of step 7"] {
        assert!(said.contains(part), "{said}");
    }
    assert!(!texts[2].contains("is slow"), "said once: {}", texts[2]);
}

/// One number in one queue of rank 1 is not what it should be.
fn differs(config: Config, world: &C10d) {
    let trainer = Trainer::new(config, Kind::Float);
    let queues = || -> Vec<Tensor> {
        trainer.model.queues.of(LOCAL).iter().map(Tensor::shallow_clone).collect()
    };
    check::compare(world, 40, &[("queues", queues())]).unwrap();
    if world.rank() == 1 {
        let ring = queues().pop().unwrap();
        let _ = tch::no_grad(|| ring.get(3).get(5).g_add_scalar_(1e-6));
    }
    match check::compare(world, 41, &[("queues", queues())]) {
        Err(error @ DistError::Diverged { .. }) => println!("{error}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_rank_whose_queues_differ_is_named() {
    let folder = tempfile::tempdir().unwrap();
    for output in ranks(folder.path(), "differ", 3) {
        assert!(output.status.success(), "{}", text(&output));
        let said = "step 41: queues of rank 1 differ from those of rank 0";
        assert!(text(&output).contains(said), "{}", text(&output));
    }
}
