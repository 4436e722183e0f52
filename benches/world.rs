//! What a world of one costs: steps through c10d (a store, a process group, a reducer of one rank)
//! beside steps without, in turn, in one process.
//!
//! ```text
//! cargo bench --bench world -- [--pairs 40]
//! ```
//!
//! Which of a pair comes first alternates. Prints the medians and the median of the ratios, by the
//! clock and by the CPU time of all threads, which other programs on the machine disturb less. As a
//! test it makes two pairs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use detco::batch::Batch;
use detco::config::Config;
use detco::dist::Collective;
use detco::dist::c10d::C10d;
use detco::dist::local::Local;
use detco::dist::rendezvous::Rendezvous;
use detco::dist::world::{Here, Launcher, Spec};
use detco::model::{Draws, Model};
use detco::optim::Sgd;
use detco::shim::c10d::{Member, Role};
use detco::step::{At, update};
use tch::Device;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let at = arguments.iter().position(|argument| argument == "--pairs");
    let pairs = at.and_then(|at| arguments.get(at + 1)?.parse().ok()).unwrap_or(2);
    tch::set_num_threads(1);
    let config = Config::load("detco-small", &[]).expect("a built-in recipe");
    let n = config.train.batch;
    let normal = |name: &str, shape: &[i64]| Draws::new(1, name, 0).normal(shape, 1.0);
    let size = i64::from(config.crop_size());
    let patch = config.patch_size().map_or(0, i64::from);
    let crops = [0, 1].map(|i| normal(&format!("global.{i}"), &[n, 3, size, size]));
    let patches = [0, 1].map(|i| normal(&format!("local.{i}"), &[n, 9, 3, patch, patch]));
    let batch = Batch::of_pairs(crops, Some(patches));
    let mut sides = [side(&config, Box::new(Local)), side(&config, Box::new(one()))];
    let mut times = [const { (Vec::new(), Vec::new()) }; 2];
    for pair in 0..pairs + WARM_UP {
        let order = if pair % 2 == 0 { [0, 1] } else { [1, 0] };
        for i in order {
            let (model, sgd, world) = &mut sides[i];
            let at = At { step: pair, learning_rate: 0.001 };
            let (start, cpu) = (Instant::now(), cpu_seconds());
            update(model, sgd, world.as_ref(), &config, &batch, at).expect("a step");
            if pair >= WARM_UP {
                times[i].0.push(start.elapsed().as_secs_f64());
                times[i].1.push(cpu_seconds() - cpu);
            }
        }
    }
    let [local, c10d] = times;
    for (name, local, c10d) in [("clock", local.0, c10d.0), ("CPU time", local.1, c10d.1)] {
        let ratios: Vec<f64> = local.iter().zip(&c10d).map(|(a, b)| b / a).collect();
        println!(
            "batch {n}, {pairs} pairs, {name}: {:.1} ms a step without c10d, {:.1} ms with; \
             ratio {:.4}",
            median(local) * 1e3,
            median(c10d) * 1e3,
            median(ratios)
        );
    }
}

/// Pairs that are not counted: the first steps make the reducer and its buckets.
const WARM_UP: u64 = 2;

/// CPU time of all threads of this process.
fn cpu_seconds() -> f64 {
    let tasks = std::fs::read_dir("/proc/self/task").expect("Linux");
    let of = |task: std::io::Result<std::fs::DirEntry>| {
        let text = std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<f64>().ok()
    };
    tasks.filter_map(of).sum::<f64>() / 1e9
}

fn side(config: &Config, world: Box<dyn Collective>) -> (Model, Sgd, Box<dyn Collective>) {
    let model = Model::new(config, Device::Cpu).expect("a model on the CPU");
    let parameters = model.query.parameters();
    let sgd = Sgd::new(parameters, config.optim.momentum, config.optim.weight_decay);
    (model, sgd, world)
}

/// A world of one, with everything that a world of several has.
fn one() -> C10d {
    let spec = Spec {
        launcher: Launcher::Torchrun,
        member: Member { rank: 0, size: 1 },
        local_rank: 0,
        here: Here::Ranks(1),
        local_size: 1,
        master: "127.0.0.1".into(),
        port: 0,
        role: Role::Serve,
        agent: false,
        prefix: "bench".into(),
    };
    let rendezvous = Rendezvous::join(spec, Duration::from_secs(20), 1).expect("a free port");
    let options = detco::config::Dist::default();
    C10d::new(rendezvous, Device::Cpu, &options, Arc::default()).expect("a group of one")
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
