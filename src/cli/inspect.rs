//! `detco inspect`: what shards hold.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use detco_shards::decode::{Components, Format, Probe, probe};
use detco_shards::format::manifest::Manifest;
use detco_shards::format::{SampleFault, ShardError};
use detco_shards::stream::ShardSet;
use indicatif::{HumanBytes, HumanCount};
use serde::Serialize;

/// Show what a folder of shards holds
///
/// Counts come from the indexes and the manifest and cover everything; formats and pixel sizes come
/// from the headers of at most --headers images, spread evenly.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  detco inspect shards/train
  detco inspect 'other/train-{000000..000012}.tar'        # WebDataset shards of another program
  detco inspect s3://bucket/train --headers 100           # fetches the shards of 100 samples
  detco inspect shards/train --json | jq .classes")]
pub struct Args {
    /// Folder of shards, .tar file, glob or brace list; or URLs: a folder, .tar or brace list
    #[arg(required = true)]
    data: Vec<String>,

    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,

    /// Image headers to read
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    headers: u64,

    #[command(flatten)]
    cache: super::CacheArgs,
}

#[derive(Serialize)]
struct Found {
    shards: u64,
    samples: u64,
    bytes: u64,
    fingerprint: String,
    image_bytes: ImageBytes,
    classes: Vec<Class>,
    /// Bad samples, as far as the indexes show: those without an image, for example.
    bad_samples: u64,
    /// The first of them, with the reason.
    first_bad_sample: Option<String>,
    /// Samples whose label is not a number; they are not counted in a class.
    other_labels: u64,
    /// The first of them, with its label.
    first_other_label: Option<String>,
    headers_read: u64,
    /// The first image with an unreadable header, with the reason.
    first_unreadable: Option<String>,
    formats: BTreeMap<&'static str, u64>,
    short_side: BTreeMap<String, u64>,
    manifests: Vec<About>,
}

/// Sizes of the image files in bytes, and a histogram.
#[derive(Serialize)]
struct ImageBytes {
    smallest: u64,
    median: u64,
    mean: f64,
    largest: u64,
    up_to: BTreeMap<u64, u64>,
}

#[derive(Serialize)]
struct Class {
    number: u32,
    name: Option<String>,
    samples: u64,
}

#[derive(Serialize)]
struct About {
    path: PathBuf,
    options: serde_json::Value,
    oddities: BTreeMap<String, u64>,
    skipped: u64,
}

/// Samples by class number.
type Counts = BTreeMap<u32, u64>;

/// Counts of labels.
#[derive(Default)]
struct Labels {
    counts: Counts,
    others: u64,
    first_other: Option<String>,
}

/// Runs the command.
///
/// # Errors
///
/// The shards cannot be opened.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let found = inspect(args)?;
    if args.json {
        writeln!(crate::console::stdout(), "{}", serde_json::to_string_pretty(&found)?)?;
    } else {
        print(&found, &mut crate::console::stdout())?;
    }
    Ok(())
}

fn inspect(args: &Args) -> anyhow::Result<Found> {
    let set = ShardSet::open_with(&args.data, Some(&args.cache.remote()))
        .context("opening the shards")?;
    let bad_samples = set.bad_samples();
    let first_bad = set.first_bad();
    if bad_samples == set.len()
        && let Some(error) = first_bad
    {
        return Err(error.into());
    }
    let mut sizes: Vec<u64> = (0..set.len()).filter_map(|id| set.image_size(id)).collect();
    sizes.sort_unstable();
    let mut up_to = BTreeMap::new();
    for size in &sizes {
        *up_to.entry(size.next_power_of_two().max(1024)).or_default() += 1;
    }
    let image_bytes = ImageBytes {
        smallest: sizes.first().copied().unwrap_or(0),
        median: sizes.get(sizes.len() / 2).copied().unwrap_or(0),
        mean: sizes.iter().sum::<u64>() as f64 / sizes.len().max(1) as f64,
        largest: sizes.last().copied().unwrap_or(0),
        up_to,
    };

    let (mut formats, mut short_side) = (BTreeMap::new(), BTreeMap::new());
    let mut first_unreadable = None;
    let headers = args.headers.clamp(1, set.len());
    for number in 0..headers {
        // Spread evenly; at most `len - 1`, in 128 bits so that the product fits.
        let id = (u128::from(number) * u128::from(set.len()) / u128::from(headers)) as u64;
        let found = match set.sample(id) {
            Ok(sample) => {
                let found = probe(sample.jpeg());
                if let (Err(error), None) = (&found, &first_unreadable) {
                    let (shard, key) = (set.shards()[sample.shard].path().display(), sample.key);
                    let at = sample.offset;
                    first_unreadable =
                        Some(format!("{shard}: sample {key:?} at byte {at}: {error}"));
                }
                found.ok()
            }
            Err(error @ ShardError::Sample { .. }) => {
                first_unreadable.get_or_insert_with(|| error.to_string());
                None
            }
            Err(error) => return Err(error.into()),
        };
        let (format, short) = describe(found.as_ref());
        *formats.entry(format).or_default() += 1;
        if let Some(short) = short {
            *short_side.entry(bucket(short)).or_default() += 1;
        }
    }

    let (about, recorded) = manifests(&set)?;
    let labels = match recorded {
        Some(counts) => Labels { counts, ..Labels::default() },
        None => count_classes(&set)?,
    };
    let name = |number: u32| set.classes().get(number as usize).cloned();
    let classes = labels
        .counts
        .into_iter()
        .map(|(number, samples)| Class { number, name: name(number), samples })
        .collect();

    Ok(Found {
        shards: set.shards().len() as u64,
        samples: set.len(),
        bytes: set.shards().iter().map(|shard| shard.bytes()).sum(),
        fingerprint: format!("{:016x}", set.fingerprint()),
        image_bytes,
        classes,
        bad_samples,
        first_bad_sample: first_bad.map(|error| error.to_string()),
        other_labels: labels.others,
        first_other_label: labels.first_other,
        headers_read: headers,
        first_unreadable,
        formats,
        short_side,
        manifests: about,
    })
}

/// Samples by class, from the `.cls` member of each.
fn count_classes(set: &ShardSet) -> anyhow::Result<Labels> {
    let mut labels = Labels::default();
    for id in 0..set.len() {
        match set.class(id) {
            Ok(Some(class)) => *labels.counts.entry(class).or_default() += 1,
            Ok(None) => {}
            Err(error @ ShardError::Sample { fault: SampleFault::Class { .. }, .. }) => {
                labels.others += 1;
                labels.first_other.get_or_insert_with(|| error.to_string());
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(labels)
}

/// The manifests beside the shards; also their counts by class, if they cover exactly these shards.
fn manifests(set: &ShardSet) -> anyhow::Result<(Vec<About>, Option<Counts>)> {
    if set.is_remote() {
        let all = set.manifests().iter();
        return Ok(add_up(set, all.map(|(path, manifest)| (path.clone(), manifest.clone()))));
    }
    let mut folders: Vec<&Path> =
        set.shards().iter().filter_map(|shard| shard.path().parent()).collect();
    folders.sort_unstable();
    folders.dedup();
    let mut all = Vec::new();
    for folder in folders {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        all.extend(Manifest::all_in(folder)?);
    }
    Ok(add_up(set, all.into_iter()))
}

fn add_up(
    set: &ShardSet,
    manifests: impl Iterator<Item = (PathBuf, Manifest)>,
) -> (Vec<About>, Option<Counts>) {
    let (mut all, mut counts, mut samples) = (Vec::new(), Counts::new(), 0);
    for (path, manifest) in manifests {
        samples += manifest.samples;
        for (number, count) in (0..).zip(&manifest.class_samples) {
            *counts.entry(number).or_default() += count;
        }
        let Manifest { options, oddities, skipped, .. } = manifest;
        all.push(About { path, options, oddities, skipped });
    }
    (all, (samples == set.len()).then_some(counts))
}

/// The name of the format, and the shorter side in pixels if the header is readable.
fn describe(header: Option<&Probe>) -> (&'static str, Option<u32>) {
    let Some(found) = header else { return ("unreadable", None) };
    let word = match (found.format, found.components, found.progressive) {
        (Format::Png, ..) => "PNG",
        (Format::Jpeg, Components::Ycc, false) => "JPEG",
        (Format::Jpeg, Components::Ycc, true) => "JPEG, progressive",
        (Format::Jpeg, Components::Gray, false) => "JPEG, gray",
        (Format::Jpeg, Components::Gray, true) => "JPEG, gray, progressive",
        (Format::Jpeg, Components::Rgb, false) => "JPEG, RGB",
        (Format::Jpeg, Components::Rgb, true) => "JPEG, RGB, progressive",
        (Format::Jpeg, Components::Cmyk | Components::Ycck, false) => "JPEG, CMYK",
        (Format::Jpeg, Components::Cmyk | Components::Ycck, true) => "JPEG, CMYK, progressive",
    };
    (word, Some(found.width.min(found.height)))
}

/// The bucket of a shorter side, with edges that matter for crops of 224 pixels and for small images.
fn bucket(short: u32) -> String {
    const EDGES: [u32; 7] = [32, 64, 128, 224, 256, 512, 1024];
    match EDGES.iter().find(|edge| short <= **edge) {
        Some(edge) => format!("up to {edge:>5}"),
        None => "up to 65535".to_owned(),
    }
}

fn print(found: &Found, out: &mut impl Write) -> std::io::Result<()> {
    row(out, "shards", HumanCount(found.shards).to_string())?;
    row(out, "samples", HumanCount(found.samples).to_string())?;
    row(out, "bytes", HumanBytes(found.bytes).to_string())?;
    row(out, "fingerprint", found.fingerprint.clone())?;
    let sizes = &found.image_bytes;
    let [small, median, large] = [sizes.smallest, sizes.median, sizes.largest].map(HumanBytes);
    row(out, "image files", format!("{small} to {large}, median {median}"))?;
    bars(
        out,
        sizes.up_to.iter().map(|(edge, count)| (format!("up to {}", HumanBytes(*edge)), *count)),
    )?;
    row(out, "formats", format!("by {} headers", HumanCount(found.headers_read)))?;
    bars(out, found.formats.iter().map(|(name, count)| ((*name).to_owned(), *count)))?;
    if let Some(first) = &found.first_unreadable {
        row(
            out,
            "unreadable",
            format!("train stops at these, or replaces them. The first: {first}"),
        )?;
    }
    row(out, "shorter side", "in pixels".to_owned())?;
    bars(out, found.short_side.iter().map(|(name, count)| (name.clone(), *count)))?;
    let classes = &found.classes;
    if let (Some(least), Some(most)) = (
        classes.iter().map(|class| class.samples).min(),
        classes.iter().map(|class| class.samples).max(),
    ) {
        let count = HumanCount(classes.len() as u64);
        row(out, "classes", format!("{count}, of {least} to {most} samples"))?;
        for class in classes.iter().take(10) {
            let name = class.name.as_deref().unwrap_or("(no name)");
            writeln!(out, "  {:>6}  {name}: {}", class.number, HumanCount(class.samples))?;
        }
        if classes.len() > 10 {
            writeln!(out, "          and {} more (--json lists them)", classes.len() - 10)?;
        }
    } else {
        row(out, "classes", "none".to_owned())?;
    }
    if let Some(first) = &found.first_bad_sample {
        let count = HumanCount(found.bad_samples);
        row(
            out,
            "bad samples",
            format!(
                "{count}, which end training unless data.on_bad_sample = \"skip\". The first: {first}"
            ),
        )?;
    }
    if let Some(first) = &found.first_other_label {
        let count = HumanCount(found.other_labels);
        row(out, "other labels", format!("{count}; training needs none. The first: {first}"))?;
    }
    for about in &found.manifests {
        row(out, "manifest", about.path.display().to_string())?;
        writeln!(out, "  options   {}", about.options)?;
        for (name, count) in &about.oddities {
            writeln!(out, "  {:>8}  {}", HumanCount(*count).to_string(), name.replace('_', " "))?;
        }
        writeln!(out, "  {:>8}  left out", HumanCount(about.skipped).to_string())?;
    }
    Ok(())
}

fn row(out: &mut impl Write, name: &str, value: String) -> std::io::Result<()> {
    writeln!(out, "{name:<14} {value}")
}

fn bars(out: &mut impl Write, rows: impl Iterator<Item = (String, u64)>) -> std::io::Result<()> {
    let rows: Vec<_> = rows.collect();
    let most = rows.iter().map(|(_, count)| *count).max().unwrap_or(1).max(1);
    for (name, count) in rows {
        let bar = "#".repeat(usize::try_from(count * 30 / most).unwrap_or(0));
        writeln!(out, "  {name:<24} {:>10}  {bar}", HumanCount(count).to_string())?;
    }
    Ok(())
}
