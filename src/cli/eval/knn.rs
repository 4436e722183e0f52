//! `detco eval knn`.

use super::{BackboneArgs, at_least_one, positive, workers};
use crate::cli::CacheArgs;

/// Weighted k-nearest-neighbour classification on frozen features: no training, minutes.
///
/// Features are a map of the backbone (--level), average-pooled, of unit length, of the centre of each
/// image. Each of a test image's k most similar training images votes for its class with weight exp(similarity / t)
/// (Wu et al., 2018; k and t as in MoCo's CIFAR notebook).
#[derive(clap::Args, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct KnnArgs {
    /// Whose backbone.
    #[command(flatten)]
    pub backbone: BackboneArgs,

    /// Labelled shards whose images vote: folders, globs, brace lists, tars, or URLs of those.
    #[arg(long, value_name = "SHARDS", num_args = 1.., required = true)]
    pub train: Vec<String>,

    /// Labelled shards to classify.
    #[arg(long, value_name = "SHARDS", num_args = 1.., required = true)]
    pub test: Vec<String>,

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

    /// Also measure it with statistics of batch normalisation that are computed anew, of at most 12,800
    /// training images: those of a DetCo backbone mix crops and patches.
    #[arg(long)]
    pub recompute_bn: bool,

    /// Print the result as JSON.
    #[arg(long)]
    pub json: bool,

    /// Where shards from URLs are kept.
    #[command(flatten)]
    pub cache: CacheArgs,
}

const EXAMPLES: &str = "\
Examples:
  detco eval knn runs/a --train shards/train --test shards/val
  detco eval knn runs/a --train shards/train --test shards/val --init   before training
  detco eval knn resnet50.pth --train shards/train --test shards/val    someone else's backbone";

#[cfg(feature = "train")]
pub(super) use self::measured::run;

#[cfg(feature = "train")]
mod measured {
    use std::io::Write;
    use std::ops::ControlFlow;

    use detco_shards::stream::ShardSet;
    use serde_json::{Map, Value};

    use super::KnnArgs;
    use crate::cli::eval::backbone::Backbone;
    use crate::cli::eval::{bar, labelled, of_sets};
    use crate::eval::features::{Look, recompute_bn};
    use crate::eval::knn::{self, KnnOptions, Report as Found};
    use crate::eval::report::{Reading, Report};

    pub(in crate::cli::eval) fn run(args: &KnnArgs) -> anyhow::Result<()> {
        let mut backbone = args.backbone.open()?;
        let train = labelled("train", &args.train, &args.cache)?;
        let test = labelled("test", &args.test, &args.cache)?;
        for note in knn::compare(&train, &test)?.notes() {
            note!("{note}");
        }
        let size = args.size.unwrap_or(backbone.size);
        let options = KnnOptions {
            level: args.level,
            k: args.k,
            temperature: args.t,
            look: Look { size, workers: args.workers, ..Look::default() },
            samples_max: args.samples,
            ..KnnOptions::default()
        };
        let bar = bar("features");
        let watch = &mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
            ControlFlow::Continue(())
        };
        let sha256 = backbone.digest()?;
        let mut measured = || {
            let found = knn::evaluate_watched(backbone.encoder(), &train, &test, &options, watch)?;
            if !args.recompute_bn {
                return Ok((found, None));
            }
            let look = &options.look;
            let images = recompute_bn(backbone.encoder_mut(), ("train", &train), look)?;
            let again = knn::evaluate_watched(backbone.encoder(), &train, &test, &options, watch)?;
            anyhow::Ok((found, Some((again, images))))
        };
        let measured = measured();
        bar.finish_and_clear();
        let (report, again) = measured?;
        if args.train == args.test {
            note!(
                "note: --train and --test are the same: each image's nearest neighbour is itself"
            );
        }
        let measured = Measured { sha256, report: &report, again: again.as_ref() };
        print(args, &backbone, (&train, &test), &options, measured)
    }

    /// What was found, and with statistics of so many images again.
    struct Measured<'a> {
        sha256: String,
        report: &'a Found,
        again: Option<&'a (Found, u64)>,
    }

    fn print(
        args: &KnnArgs,
        backbone: &Backbone,
        (train, test): (&ShardSet, &ShardSet),
        options: &KnnOptions,
        Measured { sha256, report: found, again }: Measured<'_>,
    ) -> anyhow::Result<()> {
        if found.k < args.k {
            let (k, asked) = (found.k, args.k);
            note!("note: k = {k}, not {asked}: there are no more training samples");
        }
        if found.unknown > 0 {
            let samples = crate::console::plural(found.unknown as u64, "test sample");
            note!("note: {samples} of classes without a training sample count as wrong");
        }
        let mut stdout = crate::console::stdout();
        let Backbone { what, .. } = backbone;
        let size = options.look.size;
        if args.json {
            let mut readings = vec![Reading::of_hits("top1", &found.hits)];
            readings.extend(found.top5.map(|top5| Reading::new("top5", top5)));
            let mut more = match serde_json::to_value(found)? {
                Value::Object(fields) => fields,
                _ => Map::new(),
            };
            more.insert("size".into(), size.into());
            more.insert("level".into(), args.level.into());
            if let Some((again, images)) = again {
                readings.push(Reading::of_hits("recomputed-bn/top1", &again.hits));
                let top5 = again.top5.map(|top5| Reading::new("recomputed-bn/top5", top5));
                readings.extend(top5);
                more.insert("recomputed_bn_images".into(), (*images).into());
            }
            let report = Report {
                protocol: "knn".into(),
                weights: what.clone(),
                sha256,
                settings: Map::from_iter([
                    ("k".into(), found.k.into()),
                    ("t".into(), found.temperature.into()),
                    ("level".into(), options.level.into()),
                    ("size".into(), size.into()),
                    ("share".into(), options.look.share().into()),
                ]),
                data: of_sets(&[("train", train, found.memory), ("test", test, found.queries)]),
                readings,
                more,
            };
            writeln!(stdout, "{}", serde_json::to_string(&report)?)?;
            return Ok(());
        }
        let top5 = found.top5.map(|top5| format!(", top-5 {top5:.2} %")).unwrap_or_default();
        let on = if args.level == 5 { String::new() } else { format!(" on Res{}", args.level) };
        writeln!(
            stdout,
            "kNN top-1 {:.2} %{top5}{on}  ({what}; {} test samples against {}, {} classes, k = {}, \
             t = {}, images of {size} px)",
            found.top1, found.queries, found.memory, found.classes, found.k, found.temperature
        )?;
        if let Some((again, images)) = again {
            let top1 = again.top1;
            writeln!(stdout, "kNN top-1 {top1:.2} % with statistics of {images} training images")?;
        }
        Ok(())
    }
}
