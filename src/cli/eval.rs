//! `detco eval`.

mod ap;
mod attention;
mod backbone;
mod compare;
mod detect;
mod features;
mod knn;
mod linear;
mod lowshot;
#[cfg(feature = "train")]
mod sheet;
mod svm;
mod voc;

pub use ap::{ApArgs, Metric};
pub use attention::{AttentionArgs, Method, Shown};
pub use backbone::BackboneArgs;
pub use compare::CompareArgs;
pub use detect::DetectArgs;
pub use features::{FeaturesArgs, Pooling};
pub use knn::KnnArgs;
pub use linear::{LinearArgs, Protocol};
pub use lowshot::LowshotArgs;
pub use svm::{Difficult, SvmArgs};
pub use voc::{Costs, VocArgs};

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
    /// Linear classification on frozen features: ImageNet's protocols.
    Linear(LinearArgs),
    /// The features themselves, of any level, as a file.
    Features(FeaturesArgs),
    /// A small detector on a backbone's maps: what the backbone is worth for detection, in minutes.
    Detect(DetectArgs),
    /// Average precision of detections: COCO's twelve numbers, or PASCAL VOC's.
    Ap(ApArgs),
    /// Support vector machines on PASCAL VOC 2007: the published protocol.
    Svm(SvmArgs),
    /// The same from 1 to 96 images a class.
    Lowshot(LowshotArgs),
    /// A grid of pictures that shows where maps are large, with figures where there are boxes.
    Attention(AttentionArgs),
    /// Reports of these commands side by side, with paired differences.
    Compare(CompareArgs),
}

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
    const LIGHTER: &str = "--samples N and a smaller --size need less";
    const FEWER: &str = "fewer --levels need less";
    const SMALLER: &str = "a smaller --size needs less";
    match &args.how {
        How::Knn(args) => super::with_libtorch(LIGHTER, || knn::run(args)),
        How::Linear(args) => super::with_libtorch(LIGHTER, || linear::run(args)),
        How::Features(args) => super::with_libtorch(LIGHTER, || features::run(args)),
        How::Detect(args) => {
            super::with_libtorch("--scenes N and a smaller --size need less", || detect::run(args))
        }
        How::Ap(args) => ap::run(args),
        How::Svm(args) => super::with_libtorch(FEWER, || svm::run(args)),
        How::Lowshot(args) => super::with_libtorch(FEWER, || lowshot::run(args)),
        How::Attention(args) => super::with_libtorch(SMALLER, || attention::run(args)),
        How::Compare(args) => compare::run(args),
    }
}

/// A bar on standard error, where that is a terminal.
#[cfg(feature = "train")]
pub(in crate::cli) fn bar(what: &str) -> indicatif::ProgressBar {
    let bar = indicatif::ProgressBar::new(0);
    let template =
        format!("{{prefix}}{what} {{bar:24}} {{pos}}/{{len}}  {{per_sec}}  left {{eta}}");
    if let Ok(style) = indicatif::ProgressStyle::with_template(&template) {
        bar.set_style(style.progress_chars("━╸ "));
    }
    bar
}

/// Opens labelled shards for one of a command's flags.
#[cfg(feature = "train")]
fn labelled(
    flag: &str,
    spec: &[String],
    cache: &super::CacheArgs,
) -> anyhow::Result<std::sync::Arc<detco_shards::stream::ShardSet>> {
    use anyhow::Context as _;
    let open = || {
        let set = detco_shards::stream::ShardSet::open_with(spec, Some(&cache.remote()))?;
        set.one_numbering()?;
        set.first_bad().map_or(Ok(std::sync::Arc::new(set)), Err)
    };
    open().with_context(|| format!("--{flag}"))
}

/// What figures were measured on, for reports: of each set its name, itself, and the samples that were read.
#[cfg(feature = "train")]
fn of_sets(
    sets: &[(&str, &detco_shards::stream::ShardSet, usize)],
) -> serde_json::Map<String, serde_json::Value> {
    let of = |(name, set, samples): &(&str, &detco_shards::stream::ShardSet, usize)| {
        let fingerprint = format!("{:016x}", set.fingerprint());
        let value = serde_json::json!({ "samples": samples, "fingerprint": fingerprint });
        ((*name).to_owned(), value)
    };
    sets.iter().map(of).collect()
}
