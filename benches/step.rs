//! Milliseconds of an update, from batches that lie in the device's memory:
//! `cargo bench --bench step -- --recipe detco-r50 --batch 256`.
//!
//! `--device cpu|cuda` (a GPU where there is one), `--steps N`, `--set key=value`; `--json` prints one
//! line of JSON. Run as a test it makes three updates of a tiny network on the CPU.
#![cfg_attr(not(feature = "train"), allow(unused, reason = "nothing to measure without libtorch"))]

#[cfg(not(feature = "train"))]
fn main() {}

#[cfg(feature = "train")]
fn main() {
    train::main();
}

#[cfg(feature = "train")]
mod train {
    use std::time::Instant;

    use detco::batch::Batch;
    use detco::config::Config;
    use detco::dist::local::Local;
    use detco::model::Model;
    use detco::optim::Sgd;
    use detco::step::{At, update};
    use serde_json::json;
    use tch::{Cuda, Device, Kind, Tensor};

    /// What to measure.
    struct Options {
        recipe: String,
        sets: Vec<String>,
        device: Device,
        warm_up: u64,
        steps: u64,
        json: bool,
    }

    impl Options {
        fn parse() -> Options {
            let arguments: Vec<String> = std::env::args().skip(1).collect();
            let measured =
                arguments.iter().any(|argument| argument == "--bench" || argument == "--json");
            let value = |name: &str| {
                let at = arguments.iter().position(|argument| argument == name)?;
                arguments.get(at + 1).cloned()
            };
            let device = match value("--device").as_deref() {
                Some("cuda") => Device::Cuda(0),
                Some(_) => Device::Cpu,
                None if Cuda::is_available() => Device::Cuda(0),
                None => Device::Cpu,
            };
            if !measured {
                let tiny =
                    ["model.backbone=resnet18", "model.width=8", "train.batch=8", "loss.queue=64"];
                let tiny = tiny.iter().chain(&["views.global.size=32", "views.local.patch=16"]);
                let sets = tiny.map(ToString::to_string).collect();
                let recipe = "detco-r50".to_string();
                return Options {
                    recipe,
                    sets,
                    device: Device::Cpu,
                    warm_up: 1,
                    steps: 2,
                    json: false,
                };
            }
            let mut sets: Vec<String> =
                vec![format!("train.batch={}", value("--batch").unwrap_or("256".into()))];
            let pairs = arguments.iter().zip(arguments.iter().skip(1));
            sets.extend(pairs.filter(|(name, _)| *name == "--set").map(|(_, set)| set.clone()));
            let steps = value("--steps").and_then(|steps| steps.parse().ok()).unwrap_or(20);
            let recipe = value("--recipe").unwrap_or("detco-r50".into());
            let json = arguments.iter().any(|argument| argument == "--json");
            Options { recipe, sets, device, warm_up: 8, steps, json }
        }
    }

    pub(super) fn main() {
        let options = Options::parse();
        let config = Config::load(&options.recipe, &options.sets).expect("a valid configuration");
        let device = options.device;
        let mut model = Model::new(&config, device).expect("a model");
        let optim = &config.optim;
        let mut sgd = Sgd::new(model.query.parameters(), optim.momentum, optim.weight_decay);
        let batch = batch(&config, device);
        let mut times = Vec::new();
        let mut loss = f64::NAN;
        for step in 0..options.warm_up + options.steps {
            let start = Instant::now();
            let at = At { step, learning_rate: 0.03 };
            let report =
                update(&mut model, &mut sgd, &Local, &config, &batch, at).expect("an update");
            loss = report.loss; // on the host: the device has finished
            if step >= options.warm_up {
                times.push(start.elapsed().as_secs_f64() * 1e3);
            }
        }
        assert!(loss.is_finite(), "the loss is {loss}");
        times.sort_by(f64::total_cmp);
        let (median, least) = (times[times.len() / 2], times[0]);
        let n = config.train.batch;
        if options.json {
            let figures = json!({
                "recipe": options.recipe, "batch": n, "bn_splits": config.model.bn_splits,
                "median_ms": median, "least_ms": least, "steps": options.steps, "loss": loss,
            });
            println!("{figures}");
        } else {
            let rate = n as f64 / median * 1e3;
            println!(
                "{}, batch {n}, {device:?}: {median:.1} ms a step (least {least:.1}), {rate:.1} images/s",
                options.recipe
            );
        }
    }

    /// Noise, which costs a network what pictures cost it.
    fn batch(config: &Config, device: Device) -> Batch {
        let n = config.train.batch;
        let size = i64::from(config.views.global.size);
        let noise = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, device));
        let global = [(); 2].map(|()| noise(&[n, 3, size, size]));
        let local = config.views.local.as_ref().filter(|_| config.model.local).map(|local| {
            let patch = i64::from(local.patch);
            [(); 2].map(|()| noise(&[n, 9, 3, patch, patch]))
        });
        Batch { global, local }
    }
}
