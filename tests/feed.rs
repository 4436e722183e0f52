//! Training from the device pipeline, on its twin in host memory, held against training from the
//! loader: the same samples, losses, weights, resumes and bad samples, bit for bit.

#![cfg(feature = "train")]

mod support;
#[path = "support/tiny.rs"]
mod tiny;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use detco::batch::Form;
use detco::checkpoint::{self, Saved};
use detco::config::{CROPS, Config, ConfigError};
use detco::device::Found;
use detco::feed::{self, Feed, FeedError, Wait};
use detco::source::{Source, Starter};
use detco::train::{self, Outcome, Start, TrainError};
use detco_shards::device::{Host, Share};
use detco_shards::order::Order;
use detco_shards::pipeline::LoaderOptions;
use detco_shards::stream::ShardSet;
use support::{detco_fails, detco_ok, path, shards};
use tch::{Device, Tensor};
use tiny::TINY;

fn config(recipe: &str, data: &Path, sets: &[&str]) -> Config {
    let own = ["train.epochs=2", "monitor.samples=true", "data.workers=2"];
    let sets: Vec<String> = TINY.iter().chain(&own).chain(sets).map(ToString::to_string).collect();
    let mut config = Config::load(recipe, &sets).unwrap();
    config.data.shards = vec![path(data).to_owned()];
    config
}

/// The twin, as a GPU would be opened for this config.
fn twin(config: &Config, found: &Found) -> Result<Starter, ConfigError> {
    let host = Host::new(true).normalising(feed::number(config, found.device));
    Ok(Starter::of("a device's twin in host memory", host))
}

/// Whose batches a run reads.
#[derive(Clone, Copy, Debug)]
enum From {
    Loader,
    Twin,
}

fn start(start: Start, from: From) -> Result<Outcome, TrainError> {
    match from {
        From::Loader => train::train(start, None),
        From::Twin => train::train_from(start, None, &twin),
    }
}

fn run(folder: &Path, config: &Config, from: From) -> Result<Outcome, TrainError> {
    let (run, config) = (folder.to_path_buf(), Box::new(config.clone()));
    start(Start::New { run, config, or_resume: false }, from)
}

/// A run's lines without what the clock wrote: of `metrics.jsonl` what is not about the loader.
fn lines(run: &Path, file: &str) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(run.join(file)).unwrap_or_default();
    let lines = text.lines().map(|line| {
        let mut line: serde_json::Value = serde_json::from_str(line).expect("whole lines");
        let timed = |name: &str| {
            ["time", "images_per_second", "wait_share"].contains(&name)
                || name.starts_with("loader")
        };
        line.as_object_mut().expect("objects").retain(|name, _| !timed(name));
        line
    });
    lines.collect()
}

#[track_caller]
fn assert_same(a: &Path, b: &Path) {
    for file in ["metrics.jsonl", "samples.jsonl", "quarantine.jsonl"] {
        let (a, b) = (lines(a, file), lines(b, file));
        assert!(file == "quarantine.jsonl" || a.len() > 6, "{file} has {} lines", a.len());
        assert_eq!(a, b, "{file}");
    }
    let (a, b) = (checkpoint::open(a, None).unwrap(), checkpoint::open(b, None).unwrap());
    assert_eq!((a.state.step, a.state.cursor), (b.state.step, b.state.cursor));
    let all = |saved: &Saved| -> BTreeMap<String, Tensor> {
        let momenta = saved.optim_tensors().unwrap().into_iter();
        let momenta = momenta.map(|(name, tensor)| (format!("momentum of {name}"), tensor));
        saved.model_tensors().unwrap().into_iter().chain(momenta).collect()
    };
    let (a, b) = (all(&a), all(&b));
    assert!(a.len() > 100 && a.keys().eq(b.keys()), "{} tensors", a.len());
    for (name, tensor) in &a {
        assert!(tensor.equal(&b[name]), "{name}");
    }
}

#[test]
fn a_run_from_the_device_pipeline_is_the_run_from_the_loader() {
    let (folder, data) = shards(8);
    let cases: [(&str, &[&str]); 4] = [
        ("detco-small", &[]),
        ("detco-small", &["train.precision=bf16", "train.layout=channels-last"]),
        ("detco-small", &["train.accumulate=2", "train.layout=channels-last"]),
        ("moco-v2-small", &["train.layout=channels-first", "train.deterministic=true"]),
    ];
    for (i, (recipe, sets)) in cases.into_iter().enumerate() {
        let config = config(recipe, &data, sets);
        let [loader, device] =
            [From::Loader, From::Twin].map(|from| folder.path().join(format!("{i}-{from:?}")));
        assert_eq!(run(&loader, &config, From::Loader).unwrap(), Outcome::Finished);
        assert_eq!(run(&device, &config, From::Twin).unwrap(), Outcome::Finished);
        assert_same(&loader, &device);
    }
}

#[test]
fn a_run_goes_on_in_the_middle_of_an_epoch_whoever_made_its_batches() {
    let (folder, data) = shards(14); // 7 steps an epoch
    let config = config("detco-small", &data, &[]);
    let whole = folder.path().join("whole");
    run(&whole, &config, From::Loader).unwrap();
    for (i, (first, then)) in
        [(From::Twin, From::Twin), (From::Loader, From::Twin), (From::Twin, From::Loader)]
            .into_iter()
            .enumerate()
    {
        let parts = folder.path().join(format!("{i}"));
        let mut stopped = config.clone();
        stopped.train.steps_max = 9;
        run(&parts, &stopped, first).unwrap();
        let overrides = vec!["train.steps_max=0".to_owned()];
        start(Start::Resume { run: parts.clone(), overrides, data: Vec::new() }, then).unwrap();
        assert_same(&whole, &parts);
    }
}

#[test]
fn a_bad_sample_is_judged_the_same() {
    let (folder, data) = shards(14); // 56 samples in shards of 20
    let shard = data.join("000001.tar");
    let mut bytes = std::fs::read(&shard).unwrap();
    // The first JPEG's payload begins after its header: nothing of it is left but its place.
    bytes[512..1024].fill(0);
    std::fs::write(&shard, bytes).unwrap();

    let policies: [&[&str]; 3] = [
        &["data.on_bad_sample=skip", "data.bad_share_max=0.05"],
        &["data.on_bad_sample=skip", "data.bad_share_max=0"],
        &["data.on_bad_sample=fail"],
    ];
    for (i, policy) in policies.into_iter().enumerate() {
        let config = config("detco-small", &data, policy);
        let runs =
            [From::Loader, From::Twin].map(|from| folder.path().join(format!("{i}-{from:?}")));
        let outcomes =
            [(0, From::Loader), (1, From::Twin)].map(|(at, from)| run(&runs[at], &config, from));
        match outcomes {
            [Ok(_), Ok(_)] => {
                assert_eq!(i, 0, "only the first policy goes on");
                assert_same(&runs[0], &runs[1]);
                assert_eq!(lines(&runs[1], "quarantine.jsonl").len(), 2, "once an epoch");
            }
            [Err(loader), Err(device)] => {
                assert_eq!(loader.to_string(), device.to_string());
                for run in &runs {
                    assert_eq!(lines(run, "quarantine.jsonl").len(), 1, "the one that ended it");
                }
                assert_eq!((loader.code(), device.code()), (Some(65), Some(65)));
            }
            [loader, device] => panic!("{loader:?} and {device:?}"),
        }
    }
}

#[test]
fn the_profile_reads_the_counters_of_a_run_from_the_device_pipeline() {
    let (folder, data) = shards(14);
    let folder = folder.path().join("run");
    // The share of the batch decoder is fixed in such a run.
    run(&folder, &config("detco-small", &data, &["train.deterministic=true"]), From::Twin).unwrap();
    let text = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    // Not every record has rates: before a checkpoint two updates are looked at in a row.
    let last = text.lines().rfind(|line| line.contains("loader/images")).unwrap();
    let last: serde_json::Value = serde_json::from_str(last).unwrap();
    assert!(last["loader/images"].as_f64().is_some(), "{last}");
    assert!((0.0..=1.0).contains(&last["wait_share"].as_f64().unwrap()), "{last}");
    assert_eq!(last["loader/decoded/share"], 0.5);
    let sum = |name: &str| -> f64 {
        let lines =
            text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines.filter_map(|line| line[format!("loader/{name}")].as_f64()).sum()
    };
    let [batched, single, cpu] =
        ["batched", "single", "cpu"].map(|way| sum(&format!("decoded/{way}")));
    assert!(batched > 0.0 && single + cpu > 0.0, "{batched}, {single}, {cpu}");
    // Each image is counted as read before it is counted as decoded: they are apart by what is in work.
    let apart = (batched + single + cpu - sum("images")).abs();
    assert!(apart <= 5.0 * 8.0, "{batched} + {single} + {cpu} of {}", sum("images"));
    let report = detco_ok(&["profile", "--run", path(&folder)]);
    assert!(report.contains("train"), "{report}");
    assert!(report.contains(" one by one, ") && report.contains("hardware: 50 %"), "{report}");
}

/// A feed from the twin, and what it reads.
fn feed(data: &Path) -> (Source, Feed, Config) {
    let config = config("detco-small", data, &[]);
    let set = Arc::new(ShardSet::open(&[path(data).to_owned()]).unwrap());
    let order = Order::shuffled(set.len(), 8, 7).unwrap();
    let options = LoaderOptions::train(config.views.clone(), order, 7, 100);
    let twin = Host::new(true).normalising(feed::number(&config, Device::Cpu));
    let source = Starter::of("twin", twin).start(&set, options, Share::Fixed(0.5), None).unwrap();
    let feed = Feed::new(&config, Device::Cpu, &source, 1).unwrap();
    (source, feed, config)
}

#[test]
fn memory_that_a_tensor_still_reads_is_not_given_back() {
    let (_folder, data) = shards(8);
    let (mut source, mut feed, config) = feed(&data);
    let plain = Form::of(&config, Device::Cpu);
    let mut next = |feed: &mut Feed| {
        let taken = source.next().unwrap().unwrap();
        feed.take(taken, &mut Wait::begin(Device::Cpu).unwrap())
    };
    // A batch a step: memory for four goes round.
    for _ in 0..20 {
        let fed = next(&mut feed).unwrap();
        assert_eq!((fed.batch.len(), plain.bf16), (8, false));
        feed.give_back(fed).unwrap();
    }
    // One tensor outlives its step, and the next one's too.
    let fed = next(&mut feed).unwrap();
    let late = fed.batch.views(CROPS).unwrap()[1].narrow(0, 7, 1);
    let was = late.copy();
    feed.give_back(fed).unwrap();
    for _ in 0..8 {
        let fed = next(&mut feed).unwrap();
        feed.give_back(fed).unwrap();
    }
    assert!(late.equal(&was), "nobody has written to it");
    let fed = next(&mut feed).unwrap();
    let second = fed.batch.views(CROPS).unwrap()[0].shallow_clone();
    let error = feed.give_back(fed).unwrap_err();
    assert!(matches!(error, FeedError::Held { tensors: 1 }), "{error}");
    drop((late, second));
    let fed = next(&mut feed).unwrap();
    feed.give_back(fed).unwrap();
    // What is still read when everything ends stays readable.
    let fed = next(&mut feed).unwrap();
    let kept = fed.batch.views(CROPS).unwrap()[0].shallow_clone();
    let was = kept.copy();
    drop(fed);
    drop(feed);
    drop(source);
    assert!(kept.equal(&was));
}

#[test]
fn nvjpeg_without_a_gpu_is_refused_before_anything_is_written() {
    let (folder, data) = shards(4);
    let out = folder.path().join("run");
    let mut args = vec!["train", "detco-small", "--data", path(&data), "--out", path(&out)];
    for set in TINY.iter().chain(&["data.decode=nvjpeg"]) {
        args.extend(["--set", set]);
    }
    let reason =
        "data.decode = nvjpeg: nvJPEG decodes where the model is, and this run is on the CPU";
    let error = detco_fails(&args, 1);
    assert!(error.contains(reason), "{error}");
    assert!(!out.exists());
    let error = detco_fails(&[&args[..], &["--dry-run"]].concat(), 1);
    assert!(error.contains(reason), "{error}");
    args.extend(["--set", "data.decode=auto", "--dry-run"]);
    let text = detco_ok(&args);
    assert!(text.contains("decoding with  ") && text.contains(" on the CPU\n"), "{text}");
}
