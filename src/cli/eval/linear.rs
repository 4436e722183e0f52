//! `detco eval linear`.

use std::path::PathBuf;

use super::features::Pooling;
use super::{BackboneArgs, at_least_one, positive, workers};
use crate::cli::CacheArgs;

/// Linear classification on frozen features: ImageNet's protocols.
///
/// The backbone stays as it is: its digest is taken before and after. Protocols:
///   moco    Res5, average-pooled; SGD on crops and flips, batch 256, 100 epochs, rates divided by ten after 60 and 80
///           (MoCo's main_lincls.py, which the paper's table uses, with learning rate 30);
///   levels  each of Res2 to Res5, about 9,000 numbers, batch-normalised; SGD at 0.01, 90 epochs (OpenSelfSup);
///   cached  features of image centres, made once, then logistic regression to its minimum: minutes, no crops.
/// All learning rates are trained side by side on one pass of the backbone, and the one to report is chosen on a
/// twentieth of the training set that is held out; costs of `cached` on a tenth, after which all of it is used.
#[derive(clap::Args, Debug)]
#[command(after_long_help = EXAMPLES, verbatim_doc_comment)]
pub struct LinearArgs {
    /// Whose backbone.
    #[command(flatten)]
    pub backbone: BackboneArgs,

    /// How to train the classifier.
    #[arg(long, value_name = "NAME", default_value = "cached")]
    pub protocol: Protocol,

    /// Labelled shards to train it on: folders, globs, brace lists, tars, or URLs of those.
    #[arg(long, value_name = "SHARDS", num_args = 1.., required = true)]
    pub train: Vec<String>,

    /// Labelled shards to classify.
    #[arg(long, value_name = "SHARDS", num_args = 1.., required = true)]
    pub test: Vec<String>,

    /// Levels, from 2 for Res2 to 5 for Res5 [default: 5; protocol levels: all].
    #[arg(long, value_name = "L,L", value_delimiter = ',', value_parser = clap::value_parser!(u8).range(2..=5))]
    pub levels: Option<Vec<u8>>,

    /// How a map becomes a row [default: average; protocol levels: grid].
    #[arg(long, value_name = "HOW")]
    pub pool: Option<Pooling>,

    /// Learning rates for a batch of 256 [default: 0.1,0.3,1,3,10,30,100; protocol levels: 0.01].
    #[arg(long, value_name = "R,R", value_delimiter = ',', value_parser = positive)]
    pub rates: Option<Vec<f64>>,

    /// Costs C of protocol cached, as scikit-learn's [default: 1e-6 to 1e5 in decades].
    #[arg(long, value_name = "C,C", value_delimiter = ',', value_parser = positive)]
    pub costs: Option<Vec<f64>>,

    /// Passes over the training set [default: the protocol's]; milestones move with them.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub epochs: Option<u32>,

    /// Samples of an update; learning rates are scaled by it.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = at_least_one)]
    pub batch: usize,

    /// Edge of the images in pixels [default: the run's global crops; for a file 224, or 32 with a
    /// CIFAR stem].
    #[arg(long, value_name = "PIXELS", value_parser = clap::value_parser!(u32).range(8..=4096))]
    pub size: Option<u32>,

    /// Protocol cached: at most this many samples of each set, evenly spaced; 0 means all.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub samples: u64,

    /// Draws the classifiers' weights, the order and the crops.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,

    /// Folder to keep what is trained in after each epoch: the same command goes on from there.
    #[arg(long, value_name = "FOLDER")]
    pub state: Option<PathBuf>,

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

/// How the classifier is trained.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// MoCo's: SGD on crops of Res5's features.
    Moco,
    /// OpenSelfSup's: each level, batch-normalised.
    Levels,
    /// Logistic regression on features that are made once.
    Cached,
}

const EXAMPLES: &str = "\
Examples:
  detco eval linear runs/a --train shards/train --test shards/val                       minutes
  detco eval linear runs/a --train shards/train --test shards/val --protocol moco --state probe
  detco eval linear runs/a --train shards/train --test shards/val --levels 2,3,4,5";

#[cfg(feature = "train")]
pub(super) use self::measured::run;

#[cfg(feature = "train")]
mod measured {
    use std::io::Write as _;

    use anyhow::bail;
    use serde_json::{Map, Value, json};

    use super::{LinearArgs, Protocol};
    use crate::cli::eval::backbone::Backbone;
    use crate::cli::eval::{bar, labelled, of_sets};
    use crate::eval::features::{LEVELS, Look, Pool, recompute_bn};
    use crate::eval::linear::{self, How, LinearOptions, Outcome, Sets, Sgd};
    use crate::eval::report::{Reading, Report};

    const RATES: [f64; 7] = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0];

    pub(in crate::cli::eval) fn run(args: &LinearArgs) -> anyhow::Result<()> {
        refuse_foreign(args)?;
        let mut backbone = args.backbone.open()?;
        let train = labelled("train", &args.train, &args.cache)?;
        let test = labelled("test", &args.test, &args.cache)?;
        let sets = Sets::new(train, test)?;
        for note in sets.classes.notes() {
            note!("{note}");
        }
        if args.train == args.test {
            note!(
                "note: --train and --test are the same: the classifier has seen what it is measured on"
            );
        }
        let options = options(args, backbone.size);
        let bar = bar("");
        let measure = |backbone: &Backbone, options: &LinearOptions| {
            let watch = &mut |what: &str, done, total| {
                bar.set_prefix(what.to_owned());
                bar.set_length(total);
                bar.set_position(done);
            };
            let before = backbone.digest()?;
            let outcomes = linear::evaluate(backbone.encoder(), &sets, options, watch)?;
            if backbone.digest()? != before {
                bail!(
                    "the backbone's tensors changed while it was measured: this is a fault of the program"
                );
            }
            Ok(outcomes)
        };
        let mut measured = || -> anyhow::Result<_> {
            let (sha256, outcomes) = (backbone.digest()?, measure(&backbone, &options)?);
            if !args.recompute_bn {
                return Ok((sha256, outcomes, None));
            }
            let set = ("train", &sets.train);
            let images = recompute_bn(backbone.encoder_mut(), set, &options.look)?;
            let again = measure(&backbone, &apart(&options))?;
            Ok((sha256, outcomes, Some((again, images))))
        };
        let measured = measured();
        bar.finish_and_clear();
        let (sha256, outcomes, again) = measured?;
        let measured = Measured { sha256, outcomes: &outcomes, again: again.as_ref() };
        print(args, &backbone, &sets, &options, &measured)
    }

    /// The same options, with what is kept in a folder of its own.
    fn apart(options: &LinearOptions) -> LinearOptions {
        let mut options = options.clone();
        if let How::Sgd(Sgd { state: Some(state), .. }) = &mut options.how {
            state.push("recomputed-bn");
        }
        options
    }

    /// What was found, and with statistics of so many images again.
    struct Measured<'a> {
        sha256: String,
        outcomes: &'a [Outcome],
        again: Option<&'a (Vec<Outcome>, u64)>,
    }

    /// Flags that the protocol does not have.
    fn refuse_foreign(args: &LinearArgs) -> anyhow::Result<()> {
        let is_cached = args.protocol == Protocol::Cached;
        let given = [
            ("--rates", args.rates.is_some(), !is_cached),
            ("--epochs", args.epochs.is_some(), !is_cached),
            ("--state", args.state.is_some(), !is_cached),
            ("--costs", args.costs.is_some(), is_cached),
            ("--samples", args.samples > 0, is_cached),
        ];
        match given.iter().find(|(_, given, fits)| *given && !fits) {
            Some((flag, ..)) if is_cached => bail!("{flag} is for the protocols moco and levels"),
            Some((flag, ..)) => bail!("{flag} is for the protocol cached"),
            None => Ok(()),
        }
    }

    fn options(args: &LinearArgs, size: u32) -> LinearOptions {
        let is_levels = args.protocol == Protocol::Levels;
        let mut levels =
            args.levels.clone().unwrap_or(if is_levels { LEVELS.to_vec() } else { vec![5] });
        levels.sort_unstable();
        levels.dedup();
        let how = match args.protocol {
            Protocol::Cached => {
                let mut costs: Vec<f64> = args.costs.clone().unwrap_or_else(linear::usual_costs);
                costs.sort_by(f64::total_cmp);
                costs.dedup();
                How::Cached { costs }
            }
            Protocol::Moco | Protocol::Levels => {
                let usual = if is_levels { 90 } else { 100 };
                let epochs = args.epochs.unwrap_or(usual);
                let at =
                    |of: u32| (u64::from(of) * u64::from(epochs)).div_ceil(u64::from(usual)) as u32;
                let milestones = if is_levels { [30, 60] } else { [60, 80] };
                let usual = || if is_levels { vec![0.01] } else { RATES.to_vec() };
                let mut rates = args.rates.clone().unwrap_or_else(usual);
                rates.sort_by(f64::total_cmp);
                rates.dedup();
                How::Sgd(Sgd {
                    rates,
                    batch: args.batch as u64,
                    epochs,
                    milestones: milestones.map(at).to_vec(),
                    nesterov: is_levels,
                    weight_decay: if is_levels { 1e-4 } else { 0.0 },
                    norm: is_levels,
                    colours: is_levels,
                    each_epoch: !is_levels,
                    state: args.state.clone(),
                })
            }
        };
        LinearOptions {
            how,
            levels,
            pool: args.pool.map_or(if is_levels { Pool::Grid } else { Pool::Average }, Pool::from),
            look: Look {
                size: args.size.unwrap_or(size),
                workers: args.workers,
                ..Look::default()
            },
            samples_max: args.samples,
            seed: args.seed,
        }
    }

    fn name(protocol: Protocol) -> &'static str {
        match protocol {
            Protocol::Moco => "moco",
            Protocol::Levels => "levels",
            Protocol::Cached => "cached",
        }
    }

    fn settings(options: &LinearOptions) -> Map<String, Value> {
        let mut settings = Map::from_iter([
            ("levels".into(), json!(options.levels)),
            ("pool".into(), json!(options.pool.name())),
            ("size".into(), json!(options.look.size)),
            ("share".into(), json!(options.look.share())),
        ]);
        match &options.how {
            How::Cached { costs } => {
                settings.insert("costs".into(), json!(costs));
            }
            How::Sgd(sgd) => settings.extend([
                ("rates".into(), json!(sgd.rates)),
                ("batch".into(), json!(sgd.batch)),
                ("epochs".into(), json!(sgd.epochs)),
                ("milestones".into(), json!(sgd.milestones)),
                ("seed".into(), json!(options.seed)),
            ]),
        }
        settings
    }

    fn print(
        args: &LinearArgs,
        backbone: &Backbone,
        sets: &Sets,
        options: &LinearOptions,
        measured: &Measured<'_>,
    ) -> anyhow::Result<()> {
        let Measured { sha256, outcomes, again } = measured;
        let mut out = crate::console::stdout();
        let protocol = name(args.protocol);
        let part = |len: u64| match args.samples {
            0 => len,
            most => most.min(len),
        };
        let samples = part(sets.train.len());
        if args.json {
            let mut readings = Vec::new();
            let mut tried = Map::new();
            for outcome in *outcomes {
                let level = format!("res{}", outcome.level);
                readings.push(Reading::of_hits(format!("{level}/top1"), &outcome.hits));
                readings
                    .extend(outcome.top5.map(|top5| Reading::new(format!("{level}/top5"), top5)));
                tried.insert(
                    level,
                    json!({
                        "width": outcome.width,
                        "chosen": outcome.tried[outcome.chosen].value,
                        "tried": outcome.tried,
                        "best": outcome.best.map(|(top1, epoch)| json!({"top1": top1, "epoch": epoch})),
                    }),
                );
            }
            let mut more = Map::from_iter([("levels".into(), Value::Object(tried))]);
            if let Some((again, images)) = again {
                for outcome in again {
                    let name = format!("recomputed-bn/res{}/top1", outcome.level);
                    readings.push(Reading::of_hits(name, &outcome.hits));
                }
                more.insert("recomputed_bn_images".into(), (*images).into());
            }
            let tests = outcomes.first().map_or(0, |outcome| outcome.hits.len());
            let report = Report {
                protocol: format!("linear-{protocol}"),
                weights: backbone.what.clone(),
                sha256: sha256.clone(),
                settings: settings(options),
                data: of_sets(&[
                    ("train", &sets.train, samples as usize),
                    ("test", &sets.test, tests),
                ]),
                readings,
                more,
            };
            writeln!(out, "{}", serde_json::to_string(&report)?)?;
            return Ok(());
        }
        for outcome in *outcomes {
            let Reading { value, interval, .. } = Reading::of_hits("", &outcome.hits);
            let [low, high] = interval.unwrap_or([value; 2]);
            let top5 = outcome.top5.map(|top5| format!(", top-5 {top5:.2} %")).unwrap_or_default();
            let chosen = &outcome.tried[outcome.chosen];
            let (what, held) = match options.how {
                How::Cached { .. } => ("C", "a tenth"),
                How::Sgd(_) => ("learning rate", "a twentieth"),
            };
            let on = match chosen.held_out {
                Some(top1) => format!(", chosen on {held} of train ({top1:.2} % there)"),
                None => String::new(),
            };
            let best = match outcome.best {
                Some((top1, epoch)) => {
                    format!(
                        " after the last epoch; best {top1:.2} % after epoch {epoch}, chosen on the test set"
                    )
                }
                None => String::new(),
            };
            writeln!(
                out,
                "linear ({protocol}) Res{} top-1 {value:.2} % [{low:.2}, {high:.2}]{top5}{best}  ({}; {} test samples, \
                 {samples} training samples of {} numbers; {what} {}{on}; images of {} px)",
                outcome.level,
                backbone.what,
                outcome.hits.len(),
                outcome.width,
                chosen.value,
                options.look.size
            )?;
            if let (How::Sgd(_), true) = (&options.how, outcome.tried.len() > 1) {
                for tried in &outcome.tried {
                    writeln!(
                        out,
                        "  learning rate {:<6} top-1 {:>6.2} %, held out {:>6.2} %, last loss {:.3}",
                        tried.value,
                        tried.top1.unwrap_or(f64::NAN),
                        tried.held_out.unwrap_or(f64::NAN),
                        tried.loss
                    )?;
                }
            }
        }
        if let Some((again, images)) = again {
            for outcome in again {
                let (level, top1) = (outcome.level, Reading::of_hits("", &outcome.hits).value);
                writeln!(
                    out,
                    "linear ({protocol}) Res{level} top-1 {top1:.2} % with statistics of {images} training images"
                )?;
            }
        }
        Ok(())
    }
}
