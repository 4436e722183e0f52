//! `detco data`.

use std::io::Write as _;
use std::path::PathBuf;

use anyhow::{Context, bail};
use detco_shards::files::write_atomically;
use serde_json::json;

use super::composites::CompositesArgs;
use crate::console::plural;
use crate::subset::{self, Pool, Source};

/// Prepare data for pre-training and evaluation.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub what: What,
}

/// What can be prepared.
#[derive(clap::Subcommand, Debug)]
pub enum What {
    /// Subsets of COCO annotations: 1, 2, 5 and 10 % of the labels.
    Subset(SubsetArgs),
    /// Composite scenes without labels, packed into shards: to pre-train for `detco eval detect --composites`.
    Composites(CompositesArgs),
}

/// Subsets of COCO annotations: 1, 2, 5 and 10 % of the labels, for semi-supervised fine-tuning
///
/// Writes a file of COCO annotations for each percentage and seed, and manifest.json with the SHA-256 of each. Images
/// are drawn by their ids, uniformly and without replacement, so the order of the file does not matter; of one seed
/// 1 % is part of 2 %. p % are the whole number of images below or at p/100 of them: 1182, 2365, 5914 and 11828 of
/// train2017's 118,287. Entries are copied byte for byte.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  detco data subset instances_train2017.json -o subsets
  detco data subset instances_train2017.json --percent 1,10 --seeds 3 --annotated-only -o subsets")]
pub struct SubsetArgs {
    /// COCO annotations (JSON), such as instances_train2017.json; held in memory once
    pub file: PathBuf,

    /// Percentages of the images
    #[arg(long, value_name = "P,…", value_delimiter = ',', default_value = "1,2,5,10", value_parser = percent)]
    pub percent: Vec<f64>,

    /// Number of subsets for each percentage, with the seeds 0, 1, …
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub seeds: u64,

    /// Draw from images with an annotation that is not a crowd, as detectron2 trains on them, in place of all
    #[arg(long)]
    pub annotated_only: bool,

    /// Folder for the files; made if need be
    #[arg(short, long, value_name = "DIR")]
    pub out: PathBuf,
}

fn percent(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(percent) if percent > 0.0 && percent <= 100.0 => Ok(percent),
        _ => Err("expected a number above 0 and up to 100".into()),
    }
}

/// Runs `detco data subset`; none for what `detco-train` does.
///
/// # Errors
/// The annotations cannot be read, or the subsets not written.
pub fn run(args: &Args) -> Option<anyhow::Result<()>> {
    match &args.what {
        What::Subset(args) => Some(subsets(args)),
        What::Composites(_) => None,
    }
}

/// Runs `detco data`, all of it.
///
/// # Errors
/// The data cannot be read or written.
#[cfg(feature = "train")]
pub fn run_all(args: &Args) -> anyhow::Result<()> {
    match &args.what {
        What::Subset(args) => subsets(args),
        What::Composites(args) => super::composites::run(args),
    }
}

fn subsets(args: &SubsetArgs) -> anyhow::Result<()> {
    let bytes = std::fs::read(&args.file)
        .with_context(|| format!("cannot read {}", args.file.display()))?;
    let source = Source::parse(&args.file, &bytes)?;
    let pool = if args.annotated_only { Pool::AnnotatedImages } else { Pool::AllImages };
    let from = if args.annotated_only { source.annotated() } else { source.images() };
    let mut percents = args.percent.clone();
    percents.sort_by(f64::total_cmp);
    percents.dedup();
    let sizes = percents.iter().map(|percent| subset::size(*percent, from));
    let sizes = sizes.collect::<Result<Vec<usize>, _>>()?;
    std::fs::create_dir_all(&args.out)
        .with_context(|| format!("cannot make the folder {}", args.out.display()))?;
    let stem = args.file.file_stem().and_then(|stem| stem.to_str()).unwrap_or("annotations");
    let name = |percent: f64, seed: u64| format!("{stem}.{percent}pct.seed{seed}.json");
    // A subset in place of the annotations themselves would be the end of them.
    let same = |file: &str| {
        let there = args.out.join(file).canonicalize();
        there.is_ok_and(|there| args.file.canonicalize().is_ok_and(|source| source == there))
    };
    let mut written = Vec::new();
    for seed in 0..args.seeds {
        let order = source.order(pool, seed);
        for (percent, size) in percents.iter().zip(&sizes) {
            let file = name(*percent, seed);
            if same(&file) {
                bail!("{}: the annotations themselves lie there: choose another -o", file);
            }
            let subset = source.subset(order.get(..*size).unwrap_or(&order));
            write_atomically(&args.out.join(&file), subset.json.as_bytes())?;
            written.push(json!({
                "file": file, "percent": percent, "seed": seed, "images": subset.images,
                "images_without_annotations": subset.unannotated, "annotations": subset.annotations,
                "sha256": subset::sha256(subset.json.as_bytes()),
            }));
        }
    }
    let manifest = json!({
        "source": {
            "file": args.file.file_name().map(|name| name.to_string_lossy().into_owned()),
            "bytes": bytes.len(), "sha256": subset::sha256(&bytes), "images": source.images(),
            "images_without_annotations": source.images() - source.annotated(),
            "annotations": source.annotations(),
        },
        "drawn_from": pool,
        "rule": "image ids sorted, shuffled by the seed, the first floor(percent / 100 * images) of them",
        "subsets": written,
    });
    let text = format!("{}\n", serde_json::to_string_pretty(&manifest)?);
    write_atomically(&args.out.join("manifest.json"), text.as_bytes())?;
    let mut out = crate::console::stdout();
    let without = source.images() - source.annotated();
    let which = if args.annotated_only {
        format!("{} without annotations left out", plural(without as u64, "image"))
    } else {
        format!("{} without annotations among them", plural(without as u64, "image"))
    };
    writeln!(
        out,
        "{}: {} of {} ({which}), in {}",
        args.out.display(),
        plural(written.len() as u64, "subset"),
        plural(from as u64, "image"),
        args.file.display()
    )?;
    for (percent, size) in percents.iter().zip(&sizes) {
        writeln!(out, "  {percent:>4} %  {}", plural(*size as u64, "image"))?;
    }
    Ok(())
}
