//! `detco eval detect`.

use std::path::PathBuf;

use super::{BackboneArgs, positive, workers};
use crate::cli::composites::{CompositeArgs, scene_size};

/// A small detector on a backbone's maps: what the backbone is worth for detection, in minutes.
///
/// The detector has one grid of stride 8, 64 channels, focal and GIoU loss. It is trained once a seed on maps of
/// training scenes, from a backbone that stays as it is unless --fine-tune trains it too; its detections in test scenes
/// are measured as COCO does. Random initialisations of the same architecture are measured too, for they differ from
/// each other by more than seeds of the detector do. Finished readings are kept and not measured again.
#[derive(clap::Args, Debug)]
#[command(after_long_help = EXAMPLES)]
#[command(group(clap::ArgGroup::new("scenes_of").required(true).args(["composites", "coco", "voc"])))]
pub struct DetectArgs {
    /// Whose backbone.
    #[command(flatten)]
    pub backbone: BackboneArgs,

    /// Composite scenes: small labelled pictures pasted on photos.
    #[arg(long, requires = "objects", requires = "photos")]
    pub composites: bool,

    /// What composite scenes are made of.
    #[command(flatten)]
    pub material: CompositeArgs,

    /// COCO's annotations and the folder of their images.
    #[arg(long, num_args = 2, value_names = ["JSON", "IMAGES"])]
    pub coco: Option<Vec<PathBuf>>,

    /// The same for testing [default: every fifth image of --coco].
    #[arg(long, num_args = 2, value_names = ["JSON", "IMAGES"], requires = "coco",
          conflicts_with_all = ["composites", "voc"])]
    pub test_coco: Option<Vec<PathBuf>>,

    /// A folder of PASCAL VOC such as VOCdevkit/VOC2007.
    #[arg(long, value_name = "DIR")]
    pub voc: Option<PathBuf>,

    /// For VOC: the lists of ImageSets/Main to train and to test on.
    #[arg(long, num_args = 2, value_names = ["TRAIN", "TEST"], default_values = ["trainval", "test"],
          conflicts_with_all = ["composites", "coco"])]
    pub voc_splits: Vec<String>,

    /// Levels that the detector reads together, from 2 for Res2 to 5 for Res5.
    #[arg(long, value_name = "L,L", value_delimiter = ',', default_value = "2,3,4,5",
          value_parser = clap::value_parser!(u8).range(2..=5))]
    pub levels: Vec<u8>,

    /// Also a detector on each of these levels alone.
    #[arg(long)]
    pub each_level: bool,

    /// Train a copy of the backbone with the detector, from each seed anew, in place of the frozen maps.
    #[arg(long)]
    pub fine_tune: bool,

    /// Largest learning rate of a backbone that is fine-tuned.
    #[arg(long, value_name = "LR", default_value_t = 3e-4, value_parser = positive,
          requires = "fine_tune")]
    pub backbone_lr: f64,

    /// Percent of the training scenes to learn from; a reading each.
    #[arg(long, value_name = "P,P", value_delimiter = ',', default_value = "100",
          value_parser = percent)]
    pub percent: Vec<f64>,

    /// Number of seeds of the detector, from 0.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub seeds: u64,

    /// Number of random initialisations to compare with, one detector each.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u64).range(5..=1000))]
    pub inits: u64,

    /// Edge of a scene in pixels; a multiple of 32 [default: 128 for composites, 256 for photographs].
    #[arg(long, value_name = "PIXELS", value_parser = scene_size)]
    pub size: Option<u32>,

    /// Training scenes, evenly spaced over the images of --coco or --voc.
    #[arg(long, value_name = "N", default_value_t = 4000, value_parser = clap::value_parser!(u32).range(1..))]
    pub scenes: u32,

    /// Test scenes, evenly spaced likewise.
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    pub test_scenes: u32,

    /// Updates of the detector.
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    pub steps: u32,

    /// Scenes an update.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub batch: u32,

    /// Largest learning rate of the detector (AdamW, 50 steps of warm-up, cosine).
    #[arg(long, value_name = "LR", default_value_t = 3e-3, value_parser = positive)]
    pub lr: f64,

    /// Channels of the detector; a multiple of 8.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = width)]
    pub width: u32,

    /// A control: each training scene gets another one's boxes, so that nothing can be learned but where boxes lie.
    #[arg(long)]
    pub shuffled_boxes: bool,

    /// Write the detections of the first reading's first seed here, in COCO's format of results, and what there is to
    /// detect beside it (FILE.truth.json), for `detco eval ap`.
    #[arg(long, value_name = "FILE.json")]
    pub detections: Option<PathBuf>,

    /// Where finished readings are kept [default: detect in the cache folder].
    #[arg(long, value_name = "DIR")]
    pub keep: Option<PathBuf>,

    /// Threads that make scenes; 0 means one per core.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = workers)]
    pub workers: usize,

    /// Also measure it with statistics of batch normalisation that are computed anew, of at most 10,000
    /// training scenes: those of a DetCo backbone mix crops and patches.
    #[arg(long)]
    pub recompute_bn: bool,

    /// Print the result as JSON, for `detco eval compare`.
    #[arg(long)]
    pub json: bool,
}

const EXAMPLES: &str = "\
Examples:
  detco eval detect runs/a --composites --objects cifar/train --test-objects cifar/test --photos photos
  detco eval detect runs/a --composites --objects cifar/train --photos photos --each-level --json > a.json
  detco eval detect runs/a --composites --objects cifar/train --photos photos --fine-tune --percent 1,10,100
  detco eval detect resnet50.pth --voc VOCdevkit/VOC2007
  detco eval detect runs/a --coco instances_train2017.json train2017 --test-coco instances_val2017.json val2017";

fn percent(text: &str) -> Result<f64, String> {
    let found = text.parse::<f64>().ok().filter(|percent| *percent > 0.0 && *percent <= 100.0);
    found.ok_or_else(|| "expected a number above 0, at most 100".to_owned())
}

fn width(text: &str) -> Result<u32, String> {
    let found = text.parse().ok().filter(|width| (8..=1024).contains(width) && width % 8 == 0);
    found.ok_or_else(|| "expected a multiple of 8 from 8 to 1024".to_owned())
}

#[cfg(feature = "train")]
pub(super) use self::measured::run;

#[cfg(feature = "train")]
mod measured {
    use std::io::Write as _;
    use std::path::PathBuf;
    use std::sync::Mutex;

    use serde_json::{Map, Value, json};

    use super::DetectArgs;
    use crate::cli::check_folder;
    use crate::cli::eval::bar;
    use crate::config::cache_folder;
    use crate::console::plural;
    use crate::eval::detect::annotated::Annotated;
    use crate::eval::detect::files::write_detections;
    use crate::eval::detect::fit::Training;
    use crate::eval::detect::keep::Keep;
    use crate::eval::detect::run::{Bench, Distance, Found, Options, Progress, Subject, distances};
    use crate::eval::detect::sources::Source;
    use crate::eval::features::device_of;
    use crate::eval::report::{Reading, Report, Spread};

    pub(in crate::cli::eval) fn run(args: &DetectArgs) -> anyhow::Result<()> {
        if let Some(file) = &args.detections {
            check_folder(file)?;
        }
        if let (false, Some(flag)) = (args.composites, args.material.given()) {
            anyhow::bail!("{flag} is for --composites");
        }
        let mut backbone = args.backbone.open()?;
        let options = options(args);
        let source = source(args, options.workers)?;
        let folder = || cache_folder().join("detect");
        let keep = Keep::within(&args.keep.clone().unwrap_or_else(folder));
        let bar = bar("");
        if let Ok(style) =
            indicatif::ProgressStyle::with_template("{msg}  {bar:24} {pos}/{len}  left {eta}")
        {
            bar.set_style(style.progress_chars("━╸ "));
        }
        let shown = Mutex::new(String::new());
        let watch = |progress: Progress<'_>| {
            let mut shown = shown.lock().unwrap_or_else(|poison| poison.into_inner());
            if *shown != progress.what {
                progress.what.clone_into(&mut shown);
                bar.reset();
                bar.set_length(progress.total);
                bar.set_message(shown.clone());
            }
            bar.set_position(progress.done);
        };
        let mut measured =
            || -> anyhow::Result<_> {
                let bench = Bench::new(source.as_ref(), &options, &keep, &watch)?;
                let sha256 = backbone.digest()?;
                let encoder = backbone.encoder();
                let device = device_of(encoder);
                let subject = Subject { what: "backbone", encoder, config: &backbone.config };
                let mut found = bench.measure(subject, &options.seeds)?;
                let random = bench.random(&backbone.config, device)?;
                let written = match &args.detections {
                    Some(file) => Some(write_detections(file, &bench.detections(subject)?)?),
                    None => None,
                };
                let mut scenes = None;
                if args.recompute_bn {
                    scenes = Some(bench.recompute_bn(backbone.encoder_mut())?);
                    let (encoder, config) = (backbone.encoder(), &backbone.config);
                    let subject = Subject { what: "recomputed statistics", encoder, config };
                    let again = bench.measure(subject, &options.seeds)?.into_iter();
                    found.extend(again.map(|found| Found {
                        name: format!("recomputed-bn/{}", found.name),
                        ..found
                    }));
                }
                Ok((found, random, bench.data().clone(), sha256, written, scenes))
            };
        let measured = measured();
        bar.finish_and_clear();
        let (found, random, data, sha256, written, scenes) = measured?;
        if let (Some(file), Some(truth)) = (&args.detections, written) {
            note!("{}: detections; {}: what there is", file.display(), truth.display());
        }
        let above = distances(&found, &random);
        let mut more = Map::from_iter([("random_inits".to_owned(), json!(above))]);
        more.extend(scenes.map(|scenes| ("recomputed_bn_scenes".to_owned(), json!(scenes))));
        let reading = if args.fine_tune { "fine-tuned" } else { "frozen" };
        let report = Report {
            protocol: format!("detect-{}-{reading}", source.name()),
            weights: backbone.what.clone(),
            sha256,
            settings: settings(&options),
            data,
            readings: readings(&found),
            more,
        };
        if args.json {
            writeln!(crate::console::stdout(), "{}", serde_json::to_value(&report)?)?;
            return Ok(());
        }
        print(&report, &found, &above, &options)
    }

    fn options(args: &DetectArgs) -> Options {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut levels = args.levels.clone();
        levels.sort_unstable();
        levels.dedup();
        let mut groups = vec![levels.clone()];
        if args.each_level && levels.len() > 1 {
            groups.extend(levels.iter().map(|level| vec![*level]));
        }
        Options {
            scenes: args.scenes as usize,
            test_scenes: args.test_scenes as usize,
            groups,
            percents: args.percent.clone(),
            seeds: (0..args.seeds).collect(),
            inits: args.inits,
            training: Training {
                width: i64::from(args.width),
                steps: args.steps,
                batch: args.batch as usize,
                lr: args.lr,
                backbone_lr: args.fine_tune.then_some(args.backbone_lr),
                ..Training::default()
            },
            shuffled_boxes: args.shuffled_boxes,
            workers: if args.workers == 0 { cores } else { args.workers },
        }
    }

    fn source(args: &DetectArgs, workers: usize) -> anyhow::Result<Box<dyn Source>> {
        let pair = |given: &Option<Vec<PathBuf>>| match given.as_deref() {
            Some([json, images]) => Some((json.clone(), images.clone())),
            _ => None,
        };
        let photographs = args.size.unwrap_or(256);
        if let Some((json, images)) = pair(&args.coco) {
            let test = pair(&args.test_coco);
            let test = test.as_ref().map(|(json, images)| (json.as_path(), images.as_path()));
            return Ok(Box::new(Annotated::coco((&json, &images), test, photographs)?));
        }
        if let (Some(folder), [train, test]) = (&args.voc, &args.voc_splits[..]) {
            return Ok(Box::new(Annotated::voc(folder, [train, test], photographs)?));
        }
        Ok(Box::new(args.material.read(args.size.unwrap_or(128), workers)?))
    }

    fn settings(options: &Options) -> Map<String, Value> {
        let pairs = [
            ("levels", json!(options.groups)),
            ("percent", json!(options.percents)),
            ("seeds", json!(options.seeds)),
            ("training", json!(options.training)),
            ("shuffled_boxes", json!(options.shuffled_boxes)),
        ];
        pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    fn readings(found: &[Found]) -> Vec<Reading> {
        let of = |found: &Found| {
            let names = found.scores.first().map(|scores| scores.named());
            let names = names.into_iter().flatten().enumerate();
            let reading = |(score, (name, _)): (usize, (&str, _))| {
                let samples = found.samples(score)?;
                Some(Reading::of_seeds(format!("{}/{name}", found.name), samples))
            };
            names.filter_map(reading).collect::<Vec<_>>()
        };
        found.iter().flat_map(of).collect()
    }

    fn print(
        report: &Report,
        found: &[Found],
        above: &[Distance],
        options: &Options,
    ) -> anyhow::Result<()> {
        let mut out = crate::console::stdout();
        let seeds = plural(options.seeds.len() as u64, "seed");
        writeln!(out, "{}  ({}, {seeds})", report.weights, report.protocol)?;
        for found in found {
            writeln!(out, "{}", found.name)?;
            for name in ["AP50", "AP", "AP75", "agnostic-AP50", "agnostic-AP"] {
                let full = format!("{}/{name}", found.name);
                let Some(reading) = report.readings.iter().find(|one| one.name == full) else {
                    continue;
                };
                let sd = Spread::of(&reading.samples)
                    .sd
                    .map_or(String::new(), |sd| format!(" ± {sd:.2}"));
                let within = reading
                    .interval
                    .map_or(String::new(), |[low, high]| format!(" (95 % {low:.2} to {high:.2})"));
                write!(out, "  {name:<14} {:6.2}{sd}{within}", reading.value)?;
                if let Some(distance) = above.iter().find(|one| one.name == full) {
                    let inits = plural(distance.samples.len() as u64, "random init");
                    let sd = distance.random_sd.map_or(String::new(), |sd| format!(" ± {sd:.2}"));
                    let times = distance
                        .deviations
                        .map_or(String::new(), |times| format!(", {times:.1} of their sd"));
                    let Distance { random, above, .. } = distance;
                    write!(out, "; {inits} {random:.2}{sd}: {above:+.2}{times}")?;
                }
                writeln!(out)?;
            }
        }
        writeln!(
            out,
            "intervals are of the detector's seeds alone; other pre-training seeds vary too"
        )?;
        Ok(())
    }
}
