//! `detco eval`.

mod ap;

use std::path::PathBuf;

pub use ap::{ApArgs, Metric};

/// Measure how good a backbone is.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// How to measure.
    #[command(subcommand)]
    pub how: How,
}

/// Ways to measure.
#[derive(clap::Subcommand, Debug)]
pub enum How {
    /// Weighted k-nearest-neighbour classification on frozen features: no training, minutes.
    Knn(KnnArgs),
    /// Average precision of detections: COCO's twelve numbers, or PASCAL VOC's.
    Ap(ApArgs),
}

/// Weighted k-nearest-neighbour classification on frozen features: no training, minutes.
///
/// Features are a map of the backbone (--level), average-pooled, of unit length, of the centre of each
/// image. Each of a test image's k most similar training images votes for its class with weight exp(similarity / t)
/// (Wu et al., 2018; k and t as in MoCo's CIFAR notebook).
#[derive(clap::Args, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct KnnArgs {
    /// The run's folder, or a weights file: .safetensors, .pth (of any torch) or .pkl; ours,
    /// torchvision's, MoCo's, detectron2's and others' (see `detco train --help`, --init).
    pub run: PathBuf,

    /// Labelled shards whose images vote: folders, globs, brace lists, tars, or URLs of those.
    #[arg(long, value_name = "SHARDS", num_args = 1.., required = true)]
    pub train: Vec<String>,

    /// Labelled shards to classify.
    #[arg(long, value_name = "SHARDS", num_args = 1.., required = true)]
    pub test: Vec<String>,

    /// Which checkpoint: latest, a name (step-000001200) or a step (1200).
    #[arg(long, value_name = "NAME", default_value = "latest", conflicts_with = "init")]
    pub checkpoint: String,

    /// Use the weights that the run started from, before any training, for comparison.
    #[arg(long, conflicts_with = "key")]
    pub init: bool,

    /// For a weights file: the prefix of the backbone's names, where the file holds several backbones and
    /// you want another than the trained one (`module.encoder_k.`).
    #[arg(long, value_name = "PREFIX")]
    pub init_prefix: Option<String>,

    /// Measure the key encoder (the moving average) instead of the query encoder.
    #[arg(long, visible_alias = "key-encoder")]
    pub key: bool,

    /// The map to read: 5 for Res5, the last one; 4 suits Rotation, whose monitor reads it too.
    #[arg(long, value_name = "STAGE", default_value_t = 5, value_parser = clap::value_parser!(u8).range(2..=5))]
    pub level: u8,

    /// Number of neighbours that vote; at most the number of training samples.
    #[arg(short, value_name = "N", default_value_t = 200, value_parser = at_least_one)]
    pub k: usize,

    /// Temperature of the votes.
    #[arg(short, value_name = "T", default_value_t = 0.1, value_parser = positive)]
    pub t: f64,

    /// Edge of the images in pixels [default: the run's global crops; for a file 224, or 32 with a
    /// CIFAR stem].
    #[arg(long, value_name = "PIXELS", value_parser = clap::value_parser!(u32).range(8..=4096))]
    pub size: Option<u32>,

    /// At most this many samples of each set, evenly spaced; 0 means all.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub samples: u64,

    /// Decode threads; 0 means one per core.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = workers)]
    pub workers: usize,

    /// Print the result as JSON.
    #[arg(long)]
    pub json: bool,

    /// Where shards from URLs are kept.
    #[command(flatten)]
    pub cache: super::CacheArgs,
}

const EXAMPLES: &str = "\
Examples:
  detco eval knn runs/a --train shards/train --test shards/val
  detco eval knn runs/a --train shards/train --test shards/val --init   before training
  detco eval knn resnet50.pth --train shards/train --test shards/val    someone else's backbone";

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("expected at least 1".into()),
        other => other.map_err(|error: std::num::ParseIntError| error.to_string()),
    }
}

fn workers(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|workers| *workers <= 1024).ok_or("expected 0 to 1024".into())
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(t) if t.is_finite() && t > 0.0 => Ok(t),
        _ => Err("expected a number above 0".into()),
    }
}

/// Measures and prints.
#[cfg(feature = "train")]
pub fn run(args: &Args) -> anyhow::Result<()> {
    match &args.how {
        How::Knn(args) => {
            super::with_libtorch("--samples N and a smaller --size need less", || knn::run(args))
        }
        How::Ap(args) => ap::run(args),
    }
}

#[cfg(feature = "train")]
mod knn {
    use std::io::Write;
    use std::ops::ControlFlow;
    use std::sync::Arc;

    use anyhow::{Context, anyhow, bail};
    use detco_shards::limits;
    use detco_shards::stream::ShardSet;
    use indicatif::{ProgressBar, ProgressStyle};
    use tch::Device;

    use super::KnnArgs;
    use crate::checkpoint;
    use crate::config::{self, Config, Stem};
    use crate::device;
    use crate::eval::knn::{self, KnnOptions, Report};
    use crate::model::Model;
    use crate::{train, weights};

    pub(super) fn run(args: &KnnArgs) -> anyhow::Result<()> {
        let threads = device::check_threads();
        threads.map_err(|error| {
            anyhow!("cannot start a thread: {error}{}", limits::of_threads(&error))
        })?;
        let (model, size, what) = model(args)?;
        let open = |what: &str, spec: &[String]| {
            let open = || {
                let set = ShardSet::open_with(spec, Some(&args.cache.remote()))?;
                set.one_numbering()?;
                set.first_bad().map_or(Ok(Arc::new(set)), Err)
            };
            open().with_context(|| format!("--{what}"))
        };
        let (train, test) = (open("train", &args.train)?, open("test", &args.test)?);
        for note in knn::compare(&train, &test)?.notes() {
            note!("{note}");
        }
        let options = KnnOptions {
            level: args.level,
            k: args.k,
            temperature: args.t,
            size: args.size.unwrap_or(size),
            samples_max: args.samples,
            workers: args.workers,
            ..KnnOptions::default()
        };
        let encoder = match (args.key, &model.key) {
            (false, _) => &model.query,
            (true, Some(key)) => key,
            (true, None) => bail!("--key: the run's method has no key encoder"),
        };
        // indicatif draws on standard error, and only where that is a terminal.
        let bar = ProgressBar::new(0);
        let template = "features {bar:24} {pos}/{len}  {per_sec}  left {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("━╸ "));
        }
        let report = knn::evaluate_watched(encoder, &train, &test, &options, &mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
            ControlFlow::Continue(())
        });
        bar.finish_and_clear();
        let report = report?;
        if args.train == args.test {
            note!(
                "note: --train and --test are the same: each image's nearest neighbour is itself"
            );
        }
        print(args, &what, options.size, &report)
    }

    fn print(args: &KnnArgs, what: &str, size: u32, report: &Report) -> anyhow::Result<()> {
        if report.k < args.k {
            let (k, asked) = (report.k, args.k);
            note!("note: k = {k}, not {asked}: there are no more training samples");
        }
        if report.unknown > 0 {
            let samples = crate::console::plural(report.unknown as u64, "test sample");
            note!("note: {samples} of classes without a training sample count as wrong");
        }
        let mut stdout = crate::console::stdout();
        if args.json {
            let mut value = serde_json::to_value(report)?;
            value["weights"] = what.into();
            value["size"] = size.into();
            value["level"] = args.level.into();
            writeln!(stdout, "{value}")?;
            return Ok(());
        }
        let top5 = report.top5.map(|top5| format!(", top-5 {top5:.2} %")).unwrap_or_default();
        let on = if args.level == 5 { String::new() } else { format!(" on Res{}", args.level) };
        writeln!(
            stdout,
            "kNN top-1 {:.2} %{top5}{on}  ({what}; {} test samples against {}, {} classes, k = {}, \
             t = {}, images of {size} px)",
            report.top1,
            report.queries,
            report.memory,
            report.classes,
            report.k,
            report.temperature
        )?;
        Ok(())
    }

    /// The model to measure, the size of its images, and what to call it.
    fn model(args: &KnnArgs) -> anyhow::Result<(Model, u32, String)> {
        if args.run.is_file() {
            if args.init || args.key || args.checkpoint != "latest" {
                bail!(
                    "{} is a weights file: --init, --key and --checkpoint are for runs",
                    args.run.display()
                );
            }
            let backbone = weights::read_backbone(&args.run, args.init_prefix.as_deref())?;
            note!("{}: {}", args.run.display(), backbone.describe());
            let backbone = backbone.tensors;
            let shape = weights::shape(&backbone).with_context(|| {
                format!("{}: not the shape of a ResNet-18, 34, 50 or 101", args.run.display())
            })?;
            let size = if shape.stem == Stem::Cifar { 32 } else { 224 };
            let config = Config { model: shape, ..Config::default() };
            let mut model = Model::bare(&config, device(&config)?)?;
            model.start_from(&backbone).with_context(|| args.run.display().to_string())?;
            return Ok((model, size, args.run.display().to_string()));
        }
        if args.init_prefix.is_some() {
            bail!("{} is a run: --init-prefix is for weights files", args.run.display());
        }
        let config = config(args)?;
        let mut model = Model::new(&config, device(&config)?)?;
        let size = config.crop_size();
        if args.init {
            train::start_from(&mut model, &config.model)?;
            return Ok((model, size, format!("{} before training", args.run.display())));
        }
        let saved = checkpoint::open(&args.run, Some(&args.checkpoint))?;
        model.load(&saved.model_tensors()?)?;
        let encoder = if args.key { ", key encoder" } else { "" };
        let what = format!("{} after step {}{encoder}", args.run.display(), saved.state.step);
        Ok((model, size, what))
    }

    /// The run's config: with `--init` there need not be a checkpoint yet.
    fn config(args: &KnnArgs) -> anyhow::Result<Config> {
        if !args.init {
            return Ok(checkpoint::open(&args.run, Some(&args.checkpoint))?.state.config);
        }
        Ok(Config::of_run(&args.run)?)
    }

    /// Evaluation goes where there is a GPU unless the run was told to stay on the CPU: the figure
    /// is the same up to rounding.
    fn device(config: &Config) -> anyhow::Result<Device> {
        let wanted = match config.train.device {
            config::Device::Cpu => config::Device::Cpu,
            config::Device::Auto | config::Device::Cuda => config::Device::Auto,
        };
        Ok(device::find(wanted)?.device)
    }
}
