//! `detco plan`: predicts the speed of a cluster.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use clap::ValueEnum;
use serde_json::{Value, json};

use crate::config::Config;
use crate::plan::{Bottleneck, CPU_MS, Cluster, Forecast, IMAGE_BYTES, IMAGENET, Load};
use crate::profile::verdict::{count, percent};

/// Predict the speed of a cluster and what limits it first
///
/// From the milliseconds of a step on one GPU it computes images per second, days for all epochs, the traffic
/// between ranks and from storage, and the cores that each GPU needs. Arithmetic only: nothing is measured and
/// no GPU is needed. What is not stated is taken as unlimited.
#[derive(clap::Args, Debug)]
#[command(after_long_help = FORMULAS)]
pub struct Args {
    /// GPUs of each node
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1024))]
    gpus: u64,

    /// Nodes
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u64).range(1..=100_000))]
    nodes: u64,

    /// Time of a step on one GPU, without waiting for other ranks or for data
    #[arg(long, value_name = "MS", value_parser = positive, allow_negative_numbers = true,
          required_unless_present = "gpu_check")]
    step_ms: Option<f64>,

    /// Batch of such a step on one GPU [default: the GPU check's, or 32]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    batch: Option<u64>,

    /// The results.json of tools/gpu-check, for the time and batch of the recipe's step
    #[arg(long, value_name = "FILE")]
    gpu_check: Option<PathBuf>,

    /// Network bandwidth of each node, Gbit/s; needed for several nodes
    #[arg(long, value_name = "GBIT/S", value_parser = positive, allow_negative_numbers = true)]
    net: Option<f64>,

    /// Bandwidth between the GPUs of a node, GB/s each way
    #[arg(long, value_name = "GB/S", default_value_t = 20.0, value_parser = positive,
          allow_negative_numbers = true)]
    link: f64,

    /// Latency between two ranks, microseconds
    #[arg(long, value_name = "US", default_value_t = 10.0, value_parser = not_negative,
          allow_negative_numbers = true)]
    latency_us: f64,

    /// Share of the step that is the backward pass, during which gradients are averaged
    #[arg(long, value_name = "SHARE", default_value_t = 0.5, value_parser = share,
          allow_negative_numbers = true)]
    backward: f64,

    /// Number format in which gradients are sent
    #[arg(long, value_enum, default_value_t = Gradients::F32)]
    gradients: Gradients,

    /// Read bandwidth of each node, from its disk or its share of a store, MB/s
    #[arg(long, value_name = "MB/S", value_parser = positive, allow_negative_numbers = true)]
    storage: Option<f64>,

    /// Bandwidth of one store for all nodes together, MB/s
    #[arg(long, value_name = "MB/S", value_parser = positive, allow_negative_numbers = true)]
    store: Option<f64>,

    /// CPU cores of each node
    #[arg(long, value_name = "N", value_parser = positive, allow_negative_numbers = true)]
    cores: Option<f64>,

    /// The output of `detco profile --json FILE`, for CPU time and bytes per image
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,

    /// CPU time from file to views, milliseconds per image [default: the profile's, or 3.26]
    #[arg(long, value_name = "MS", value_parser = positive, allow_negative_numbers = true)]
    cpu_ms: Option<f64>,

    /// Size of a compressed image, kilobytes [default: the profile's, or ImageNet's 107.7]
    #[arg(long, value_name = "KB", value_parser = positive, allow_negative_numbers = true)]
    image_kb: Option<f64>,

    /// Samples of the data set [default: ImageNet's]
    #[arg(long, value_name = "N", default_value_t = IMAGENET,
          value_parser = clap::value_parser!(u64).range(1..=1_000_000_000_000))]
    samples: u64,

    /// Epochs [default: the recipe's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    epochs: Option<u64>,

    /// A built-in recipe by name, or a TOML file, for its model and views
    #[arg(long, value_name = "NAME|FILE", default_value = "detco-r50")]
    recipe: String,

    /// Override a key of the recipe
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,

    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

const FORMULAS: &str = "\
Examples:
  detco plan --gpus 8 --step-ms 190
  detco plan --gpus 8 --nodes 4 --step-ms 190 --net 100 --cores 64 --store 2000
  detco profile shards/train --json p.json && detco plan --gpus 8 --step-ms 190 --profile p.json
  detco plan --gpus 8 --gpu-check results.json

With W = nodes x gpus ranks, n = batch, B = W n:
  a rank sends a step      images      n (1 - 1/W) x 12 (size^2 + 9 patch^2) bytes
                           embeddings  (W - 1) n x 8 dim levels bytes (half without patches)
                           gradients   2 (1 - 1/W) x 4 parameters bytes (2 as bf16)
  in the step              B / (step + images + embeddings + rest), where rest is what of the
                           gradients does not hide behind backward (share x step): those of the
                           local heads may travel from its beginning, others when it is through
                           with the patches, the last bucket (dist.bucket_mb) when it ends
  cores                    nodes x cores x 1000 / cpu-ms
  storage, store           nodes x storage / image, store / image
  images/s                 the least of these; it names the bottleneck. Where the step is the
                           least, the network is it if it takes longer than the computing
  cores a GPU              images/s in the step / W x cpu-ms / 1000
Rings go at the slower of link and net; images that leave a node at net. Left out: stragglers, other
traffic, checkpoints, evaluation. The default cpu-ms was measured on one core of an AMD EPYC
(benches/record/2026-11-23-views.md); link and latency are usual values, not measured ones.";

/// The number format in which gradients are sent.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
enum Gradients {
    /// float32
    F32,
    /// bfloat16: half the bytes
    Bf16,
}

fn number(text: &str, holds: impl Fn(f64) -> bool, what: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number <= 1e12 && holds(number) => Ok(number),
        _ => Err(format!("expected {what}")),
    }
}

fn positive(text: &str) -> Result<f64, String> {
    number(text, |number| number >= 1e-6, "a number above 0")
}

fn not_negative(text: &str) -> Result<f64, String> {
    number(text, |number| number >= 0.0, "0 or more")
}

fn share(text: &str) -> Result<f64, String> {
    number(text, |number| (0.0..=1.0).contains(&number), "0 to 1")
}

/// Runs the command.
///
/// # Errors
///
/// A recipe or a profile that cannot be read, several nodes without a network.
pub fn run(args: &Args) -> anyhow::Result<()> {
    ensure!(args.nodes == 1 || args.net.is_some(), "{} nodes need --net GBIT/S", args.nodes);
    let config = Config::load(&args.recipe, &args.overrides)?;
    let load = Load::of(&config);
    let measured = args.profile.as_deref().map(measured).transpose()?.unwrap_or_default();
    let checked = args.gpu_check.as_deref().map(|path| checked(path, &args.recipe)).transpose()?;
    let (found_ms, found_batch) = checked.unzip();
    let step_ms = args.step_ms.or(found_ms).context("--step-ms or --gpu-check is needed")?;
    let cluster = cluster(args, &config, step_ms / 1e3, found_batch, measured);
    let forecast = cluster.forecast(&load);
    let sets = sets(&config, &cluster);
    let sentence = sentence(&cluster, &forecast);
    let mut out = crate::console::stdout();
    if args.json {
        let all = json!({
            "recipe": args.recipe,
            "cluster": cluster,
            "model": load,
            "forecast": forecast,
            "sets": sets,
            "text": sentence,
        });
        writeln!(out, "{}", serde_json::to_string_pretty(&all)?)?;
    } else {
        out.write_all(text(args, &cluster, &forecast, &sets).as_bytes())?;
        writeln!(out, "\n{sentence}")?;
    }
    Ok(())
}

/// The cluster that the arguments describe, of a step of so many seconds.
fn cluster(
    args: &Args,
    config: &Config,
    step: f64,
    found_batch: Option<u64>,
    measured: Measured,
) -> Cluster {
    Cluster {
        nodes: args.nodes,
        gpus: args.gpus,
        batch: args.batch.or(found_batch).unwrap_or(32),
        step,
        backward: args.backward,
        link: args.link * 1e9,
        net: args.net.map(|gbit| gbit * 1e9 / 8.0).filter(|_| args.nodes > 1),
        latency: args.latency_us / 1e6,
        gradient_bytes: if args.gradients == Gradients::F32 { 4.0 } else { 2.0 },
        storage: args.storage.map(|mb| mb * 1e6),
        store: args.store.map(|mb| mb * 1e6),
        cores: args.cores,
        cpu_ms: args.cpu_ms.or(measured.cpu_ms).unwrap_or(CPU_MS),
        image_bytes: args
            .image_kb
            .map(|kb| kb * 1e3)
            .or(measured.image_bytes)
            .unwrap_or(IMAGE_BYTES),
        samples: args.samples,
        epochs: args.epochs.unwrap_or(u64::from(config.train.epochs)),
    }
}

/// What of the recipe has to change for this global batch on these ranks: whole BN groups on each rank, as
/// near to the recipe's size as they can be, and a queue of whole batches. Rates follow the batch by themselves.
fn sets(config: &Config, cluster: &Cluster) -> Vec<String> {
    let (batch, each) = (cluster.global_batch() as i64, cluster.batch as i64);
    let ranks = batch / each.max(1);
    let size = config.train.batch / config.model.bn_splits;
    let sizes = (2..=each).filter(|size| each % size == 0);
    let groups = sizes.min_by_key(|of| (of - size).abs()).map(|of| ranks * (each / of));
    let had = config.design().queue;
    let queue = match had {
        0 => 0,
        had => (had as f64 / batch as f64).round().max(1.0) as i64 * batch,
    };
    let wanted = [
        ("train.batch", config.train.batch, batch),
        ("model.bn_splits", config.model.bn_splits, groups.unwrap_or(config.model.bn_splits)),
        ("method.queue", had, queue),
    ];
    let changed = wanted.into_iter().filter(|(_, had, has)| had != has);
    changed.map(|(key, _, value)| format!("{key}={value}")).collect()
}

/// What a profile says of an image.
#[derive(Debug, Default, PartialEq)]
struct Measured {
    cpu_ms: Option<f64>,
    image_bytes: Option<f64>,
}

/// Reads the JSON of `detco profile`: the run with the most images a second.
fn measured(path: &Path) -> anyhow::Result<Measured> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let report: Value =
        serde_json::from_slice(&text).with_context(|| format!("{} is no JSON", path.display()))?;
    let fail = || {
        format!(
            "{} is no profile of all views: `detco profile DATA --json FILE` writes one",
            path.display()
        )
    };
    let mode = report["settings"]["mode"].as_str().unwrap_or("");
    if !matches!(mode, "detco" | "train") {
        bail!("{}, and this one says mode {mode:?}", fail());
    }
    let rate = |run: &Value| run["images_per_s"].as_f64().unwrap_or(0.0);
    let runs = report["runs"].as_array().with_context(fail)?;
    let best = runs.iter().max_by(|a, b| rate(a).total_cmp(&rate(b))).with_context(fail)?;
    let stages = best["stages"].as_object().with_context(fail)?;
    let cpu = stages.values().filter_map(|stage| stage["cpu_ms_per_image"].as_f64());
    let cpu_ms: f64 = cpu.sum();
    ensure!(cpu_ms > 0.0 && rate(best) > 0.0, fail());
    let bytes = best["megabytes_per_s"].as_f64().map(|mb| mb * 1e6 / rate(best));
    let image_bytes = bytes.filter(|bytes| bytes.is_finite() && *bytes > 0.0);
    Ok(Measured { cpu_ms: Some(cpu_ms), image_bytes })
}

/// Reads the results of `tools/gpu-check`: milliseconds of a recipe's step, and its samples.
fn checked(path: &Path, recipe: &str) -> anyhow::Result<(f64, u64)> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let results: Value =
        serde_json::from_slice(&text).with_context(|| format!("{} is no JSON", path.display()))?;
    let step = &results[format!("step-{recipe}-kernels")];
    match (step["window_ms"].as_f64(), step["batch"].as_u64()) {
        (Some(ms), Some(batch)) if ms > 0.0 && ms.is_finite() && batch > 0 => Ok((ms, batch)),
        _ => bail!("{} has no step of {recipe}: tools/gpu-check measures them", path.display()),
    }
}

/// The sentence that names the bottleneck, with a number to act on.
fn sentence(cluster: &Cluster, found: &Forecast) -> String {
    let rate = count(found.images_per_s);
    let gpu = count(found.limits.gpu);
    let least = |bytes: f64| count(bytes * found.limits.gpu / found.images_per_s / 1e6);
    match found.bottleneck {
        Bottleneck::Gpu => format!(
            "Computing limits it: {rate} images/s; the network makes steps wait {} of their time.",
            percent(found.exposed / (cluster.step + found.exposed)),
        ),
        Bottleneck::Network => format!(
            "The network limits it: it takes {:.0} ms a step, computing {:.0}. {rate} images/s, \
             where the GPUs could compute {gpu}.",
            found.network * 1e3,
            cluster.step * 1e3,
        ),
        Bottleneck::Cores => format!(
            "Cores limit it: {rate} images/s, where the GPUs could compute {gpu}. Each GPU needs \
             {:.1}, and has {:.1}.",
            found.cores_per_gpu,
            cluster.cores.unwrap_or(0.0) / cluster.gpus as f64,
        ),
        Bottleneck::Storage => format!(
            "Storage limits it: {rate} images/s, where the GPUs could compute {gpu}. Each node \
             would have to read {} MB/s.",
            least(cluster.storage.unwrap_or(0.0)),
        ),
        Bottleneck::Store => format!(
            "The store limits it: {rate} images/s, where the GPUs could compute {gpu}. It would \
             have to give {} MB/s, or the nodes keep the data in their caches.",
            least(cluster.store.unwrap_or(0.0)),
        ),
    }
}

fn text(args: &Args, cluster: &Cluster, found: &Forecast, sets: &[String]) -> String {
    let mega = |bytes: f64| count(bytes / 1e6);
    let mut out = String::new();
    let mut row = |name: &str, text: String| out += &format!("{name:<14} {text}\n");
    let (nodes, gpus) = (cluster.nodes, cluster.gpus);
    row(
        "cluster",
        format!(
            "{nodes} x {gpus} GPUs, {}: batch {} of {} each",
            args.recipe,
            cluster.global_batch(),
            cluster.batch
        ),
    );
    if !sets.is_empty() {
        let words: Vec<String> = sets.iter().map(|set| format!("--set {set}")).collect();
        row("train with", words.join(" "));
    }
    row(
        "step",
        format!(
            "{:.1} ms computing, {:.1} ms waiting for the network",
            cluster.step * 1e3,
            found.exposed * 1e3
        ),
    );
    let each = found.images_per_s / found.ranks as f64;
    row("images/s", format!("{}, {} a GPU", count(found.images_per_s), count(each)));
    row(
        "time",
        format!(
            "{:.2} days for {} epochs of {} images",
            found.days,
            cluster.epochs,
            count(cluster.samples as f64)
        ),
    );
    let node = found.reads / nodes as f64;
    row("reads", format!("{} MB/s, {} a node", mega(found.reads), mega(node)));
    if found.ranks > 1 {
        let sent = &found.sent;
        row(
            "a rank sends",
            format!(
                "{} MB of images, {} of embeddings, {} of gradients a step",
                mega(sent.images),
                mega(sent.embeddings),
                mega(sent.gradients)
            ),
        );
    }
    if nodes > 1 {
        row("a node sends", format!("{} MB/s to others", mega(found.node_sends)));
    }
    row(
        "cores",
        format!(
            "{:.1} a GPU, {:.1} a node, at {:.2} ms an image",
            found.cores_per_gpu,
            found.cores_per_gpu * gpus as f64,
            cluster.cpu_ms
        ),
    );
    let limits = [
        ("gpu", Some(found.limits.gpu)),
        ("network", found.limits.network),
        ("cores", found.limits.cores),
        ("storage", found.limits.storage),
        ("store", found.limits.store),
    ];
    let limits = limits.into_iter().filter_map(|(name, limit)| Some((name, limit?)));
    let limits: Vec<String> =
        limits.map(|(name, limit)| format!("{name} {}", count(limit))).collect();
    row("by itself", format!("{} images/s", limits.join(", ")));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_cluster_needs_of_a_recipe_makes_a_valid_one() {
        let of = |recipe: &str, gpus: u64, batch: u64| {
            let config = Config::load(recipe, &[]).unwrap();
            let words = ["plan", "--gpus", &gpus.to_string(), "--step-ms", "100"].map(String::from);
            let batch = ["--batch".to_string(), batch.to_string()];
            let recipe = ["--recipe".to_string(), recipe.to_string()];
            let words = ["detco".to_string()].into_iter().chain(words).chain(batch).chain(recipe);
            let Ok(crate::cli::Cli { command: crate::cli::Command::Plan(args), .. }) =
                clap::Parser::try_parse_from(words)
            else {
                panic!("a plan")
            };
            let cluster = cluster(&args, &config, 0.1, None, Measured::default());
            (sets(&config, &cluster), config)
        };
        assert!(of("detco-r50", 8, 32).0.is_empty(), "the recipe as it is");
        let (found, _) = of("detco-r50", 3, 32);
        assert_eq!(found, ["train.batch=96", "model.bn_splits=3", "method.queue=65568"]);
        for recipe in ["detco-r50", "moco-v2-cifar", "detco-small"] {
            for (gpus, batch) in [(1, 2), (1, 7), (2, 32), (3, 33), (7, 5), (32, 64), (64, 256)] {
                let (sets, config) = of(recipe, gpus, batch);
                let config = config.with_overrides(&sets);
                assert!(config.is_ok(), "{recipe} {gpus} {batch} {sets:?}: {config:?}");
                assert_eq!(config.unwrap().model.bn_splits % gpus as i64, 0);
            }
        }
    }

    #[test]
    fn a_profile_gives_the_cost_of_an_image() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let stage = |ms: f64| json!({ "cpu_ms_per_image": ms });
        let run = |rate: f64, views: f64| {
            json!({ "images_per_s": rate, "megabytes_per_s": rate * 0.1,
                    "stages": { "decode": stage(1.5), "views": stage(views) } })
        };
        let report =
            json!({ "settings": { "mode": "detco" }, "runs": [run(100.0, 9.0), run(500.0, 2.5)] });
        fs::write(file.path(), report.to_string()).unwrap();
        let found = measured(file.path()).unwrap();
        assert_eq!(found.cpu_ms, Some(4.0));
        assert!((found.image_bytes.unwrap() - 100e3).abs() < 1e-6);

        for wrong in [
            json!({ "settings": { "mode": "read" }, "runs": [run(1.0, 1.0)] }),
            json!({ "settings": { "mode": "detco" }, "runs": [] }),
            json!({ "settings": { "mode": "detco" } }),
            json!([]),
        ] {
            fs::write(file.path(), wrong.to_string()).unwrap();
            let error = measured(file.path()).unwrap_err().to_string();
            assert!(error.contains("no profile of all views"), "{error}");
        }
    }
}
