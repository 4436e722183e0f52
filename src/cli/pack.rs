//! `detco pack`: a folder or a tar of images to shards.

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::ValueEnum;
use detco_shards::format::manifest::Part;
use detco_shards::pack::{self, Job, OnError, Options, Progress, Resize, ShardSize, Summary};
use indicatif::{HumanBytes, HumanCount, HumanDuration, ProgressBar, ProgressStyle};

use crate::config::Bytes;
use crate::console::plural;

/// Pack a folder of images into shards
///
/// SOURCE is a folder of class folders, a flat folder, a tar of images, ImageNet's tar of tars, or a
/// folder of tars: class tars, or WebDataset shards. Tars are read without unpacking and mean what `tar -x`
/// would unpack: links are followed, later members replace earlier ones. OUT becomes a folder of WebDataset
/// shards (000000.tar, ...), each with an index (.idx, as DALI reads it), and a manifest.json with counts,
/// checksums, class names and these options.
///
/// The class of an image is, in a folder, the first folder below SOURCE (an empty folder is a class too); in
/// a tar, the folder of the image, or its .cls member if most images have one; in a folder or a tar of class
/// tars, the name of the class tar. Classes are numbered in the order of their names as text, as ImageFolder
/// numbers them; numbers in .cls members are kept. --classes and --labels replace this.
///
/// Every image of a sample is packed, under its path without extension. Of two that differ only in the
/// extension, the JPEG gets the plain key.
///
/// JPEGs keep their bytes unless --resize-short or --upright is given; other formats become JPEGs of quality
/// 95. A JPEG whose header shows that training would refuse it is refused here; --check also decodes it, which
/// finds damaged pixels. The same input and options give the same bytes, on any machine and with any number of
/// workers. See `detco guide data`.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  detco pack ILSVRC/train shards/train
  detco pack ILSVRC2012_img_train.tar shards/train --on-error skip
  detco pack photos shards --check --on-error skip         # damaged images are left out
  detco pack photos shards --resize-short 256 --quality 90 --shard-size 256MiB
  detco pack ILSVRC/train shards/train --resume           # after a kill or a full disk
  detco pack ILSVRC/train /net/shards --part 2/4          # on the second of four machines
  detco pack ILSVRC/val shards/val --labels val.txt --classes shards/train

Killed at any moment, OUT holds whole shards and temp files only; --resume goes on and gives the
same bytes as an uninterrupted run. What was left out is listed in OUT/skipped.jsonl.")]
pub struct Args {
    /// Folder, tar, folder of tars or tar of tars with the images
    source: PathBuf,

    /// Folder to write; created if it does not exist
    out: PathBuf,

    /// Samples per shard, or bytes of images with a unit (256MiB, 1GB)
    #[arg(long, value_name = "N|BYTES", default_value = "1000", value_parser = shard_size)]
    shard_size: ShardSize,

    /// Keep the sorted order instead of shuffling across shards
    #[arg(long)]
    no_shuffle: bool,

    /// Seed of the shuffle
    #[arg(long, default_value_t = 0, conflicts_with = "no_shuffle")]
    seed: u64,

    /// Re-encode images whose shorter side is longer than N pixels
    #[arg(long, value_name = "N")]
    resize_short: Option<u32>,

    /// JPEG quality of re-encoded images
    #[arg(long, value_name = "Q", default_value_t = 95, requires = "resize_short")]
    quality: u8,

    /// Decode every image once, to find now what training would refuse
    #[arg(long)]
    check: bool,

    /// Turn images upright by their EXIF orientation: they become new JPEGs, of quality 95 if they are
    /// not resized. By default the orientation is ignored, here and in training, as torchvision's
    /// ImageFolder ignores it
    #[arg(long)]
    upright: bool,

    /// Number the classes as in FROM: a folder of shards, its manifest.json, or a text file with one name
    /// per line
    #[arg(long, value_name = "FROM")]
    classes: Option<PathBuf>,

    /// Read the labels from a text file: one per line in the order of the images' names, or NAME LABEL
    #[arg(long, value_name = "FILE")]
    labels: Option<PathBuf>,

    /// Pack only the K-th of N parts; the parts that N machines write into one folder are one data set
    #[arg(long, value_name = "K/N", default_value = "1/1", value_parser = part)]
    part: Part,

    /// Threads [default: one per core]
    #[arg(long)]
    workers: Option<usize>,

    /// What to do with a file that cannot be packed
    #[arg(long, value_enum, default_value_t = Policy::Fail)]
    on_error: Policy,

    /// Continue an interrupted packing
    #[arg(long)]
    resume: bool,
}

#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
enum Policy {
    /// Stop with an error that names it
    Fail,
    /// Leave it out and list it in skipped.jsonl
    Skip,
}

/// Runs the command.
///
/// # Errors
///
/// Whatever keeps the source from being packed.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let classes = args.classes.as_deref().map(pack::class_names).transpose();
    let classes = classes.context("reading --classes")?;
    let job = Job {
        source: args.source.clone(),
        out: args.out.clone(),
        options: Options {
            shard_size: args.shard_size,
            shuffle: (!args.no_shuffle).then_some(args.seed),
            resize: args.resize_short.map(|short| Resize { short, quality: args.quality }),
            on_error: match args.on_error {
                Policy::Fail => OnError::Fail,
                Policy::Skip => OnError::Skip,
            },
            check: args.check,
            upright: args.upright,

            classes,
            labels: args.labels.clone(),
        },
        part: args.part,
        workers: args.workers.unwrap_or(cores).max(1),
        resume: args.resume,
    };
    let start = Instant::now();
    let progress = Progress { notice: Some(|text| note!("note: {text}")), ..Progress::default() };
    let summary = watched(&job, &progress)
        .with_context(|| format!("packing {} into {}", job.source.display(), job.out.display()))?;
    Ok(report(&job, &summary, &progress, start.elapsed())?)
}

/// Packs, with a progress bar on a terminal.
fn watched(job: &Job, progress: &Progress) -> Result<Summary, pack::PackError> {
    if !std::io::stderr().is_terminal() {
        return pack::run(job, progress);
    }
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let painter = std::thread::Builder::new().spawn_scoped(scope, || paint(progress, &over));
        let result = pack::run(job, progress);
        over.store(true, Ordering::Relaxed);
        // Where no thread could be started nothing is painted.
        if let Ok(painter) = painter {
            painter.thread().unpark();
        }
        result
    })
}

fn paint(progress: &Progress, over: &AtomicBool) {
    const PERIOD: Duration = Duration::from_millis(100);
    let bar = ProgressBar::no_length();
    let style = |template: &str| {
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
    };
    bar.set_style(style("{spinner} {msg}"));
    let mut started = None;
    while !over.load(Ordering::Relaxed) {
        let total = progress.total.load(Ordering::Relaxed);
        if total == 0 {
            let listed = progress.scanned.load(Ordering::Relaxed);
            bar.set_message(format!("{} images listed", HumanCount(listed)));
        } else {
            let start = *started.get_or_insert_with(|| {
                bar.set_style(style("{wide_bar} {percent:>3}%  {msg}"));
                bar.set_length(total);
                Instant::now()
            });
            let images = progress.images.load(Ordering::Relaxed);
            let fresh = images.saturating_sub(progress.resumed.load(Ordering::Relaxed));
            let seconds = start.elapsed().as_secs_f64().max(1e-3);
            let rate = fresh as f64 / seconds;
            let bytes = progress.bytes.load(Ordering::Relaxed) as f64 / seconds / 1e6;
            let left = (total.saturating_sub(images)) as f64 / rate.max(1e-3);
            let left = HumanDuration(Duration::from_secs_f64(left.min(1e9)));
            bar.set_position(images);
            bar.set_message(format!("{rate:.0} images/s  {bytes:.1} MB/s  {left:#} left"));
        }
        bar.tick();
        std::thread::park_timeout(PERIOD);
    }
    bar.finish_and_clear();
}

fn report(
    job: &Job,
    summary: &Summary,
    progress: &Progress,
    took: Duration,
) -> std::io::Result<()> {
    let mut out = crate::console::stdout();
    let seconds = took.as_secs_f64();
    let images = progress.images.load(Ordering::Relaxed);
    let fresh = images.saturating_sub(progress.resumed.load(Ordering::Relaxed));
    let bytes = progress.bytes.load(Ordering::Relaxed);
    let classes = match summary.classes {
        0 => String::new(),
        1 => ", 1 class".to_owned(),
        more => format!(", {more} classes"),
    };
    writeln!(
        out,
        "{}: {} in {}, {}{classes}; {seconds:.1} s, {:.0} images/s, {:.1} MB/s",
        job.out.display(),
        plural(summary.samples, "sample"),
        plural(summary.shards, "shard"),
        HumanBytes(summary.bytes),
        fresh as f64 / seconds,
        bytes as f64 / seconds / 1e6,
    )?;
    for (name, count) in &summary.oddities {
        writeln!(out, "  {:>8}  {}", HumanCount(*count).to_string(), name.replace('_', " "))?;
    }
    if summary.skipped > 0 {
        let list = job.out.join(job.part.file_name("skipped", "jsonl"));
        let images = match summary.faults {
            0 => String::new(),
            faults => format!(", {} of them images by name", HumanCount(faults)),
        };
        writeln!(
            out,
            "  {:>8}  left out{images}: {}",
            HumanCount(summary.skipped).to_string(),
            list.display()
        )?;
    }
    Ok(())
}

/// `1000`, `256MiB`, `1GB`.
fn shard_size(text: &str) -> Result<ShardSize, String> {
    if let Ok(samples) = text.parse() {
        return Ok(ShardSize::Samples(samples));
    }
    Ok(ShardSize::Bytes(text.parse::<Bytes>()?.0))
}

/// `2/4`.
fn part(text: &str) -> Result<Part, String> {
    let numbers = text
        .split_once('/')
        .and_then(|(number, of)| Some(Part { number: number.parse().ok()?, of: of.parse().ok()? }));
    numbers
        .filter(|part| (1..=part.of).contains(&part.number))
        .ok_or_else(|| "K/N with K from 1 to N".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_samples_or_bytes() {
        assert_eq!(shard_size("1000"), Ok(ShardSize::Samples(1000)));
        assert_eq!(shard_size("256MiB"), Ok(ShardSize::Bytes(256 << 20)));
        assert_eq!(shard_size("1gb"), Ok(ShardSize::Bytes(1_000_000_000)));
        for wrong in ["", "MiB", "-1", "1.5GB", "7 apples", "99999999999999GiB"] {
            assert!(shard_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn parts_lie_between_one_and_all() {
        assert_eq!(part("2/4"), Ok(Part { number: 2, of: 4 }));
        for wrong in ["", "0/4", "5/4", "1", "a/b", "1/0"] {
            assert!(part(wrong).is_err(), "{wrong}");
        }
    }
}
