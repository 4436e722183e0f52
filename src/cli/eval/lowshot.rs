//! `detco eval lowshot`.

use std::path::PathBuf;

use super::voc::VocArgs;

/// Low-shot classification on PASCAL VOC 2007: machines from k positive and 19 k negative images a class.
///
/// As `detco eval svm`, several trials for each k. Published figures use the one cost for all classes whose mean
/// over trials is best in the test itself; beside them stand those of a cost that nobody chose (`--fixed`).
/// Samples are drawn by seed, k, class and trial; `--samples` takes FAIR's published lists in their place.
#[derive(clap::Args, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct LowshotArgs {
    /// Options shared with `detco eval svm`.
    #[command(flatten)]
    pub voc: VocArgs,

    /// Positive images a class.
    #[arg(
        long, value_name = "K,…", value_delimiter = ',', default_value = "1,2,4,8,16,32,64,96",
        value_parser = clap::value_parser!(u16).range(1..)
    )]
    pub k: Vec<u16>,

    /// Trials of each k.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub trials: u16,

    /// Seed of the trials' samples.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,

    /// Folder of FAIR's lists, train_targets_sample1_k1.json and so on: image, class, and 1, 0 or -1 (left out).
    #[arg(long, value_name = "DIR", conflicts_with = "seed")]
    pub samples: Option<PathBuf>,

    /// Cost of the figures that no test chose; 1 is scikit-learn's default.
    #[arg(long, value_name = "C", default_value_t = 1.0, value_parser = super::positive)]
    pub fixed: f64,
}

const EXAMPLES: &str = "\
Examples:
  detco eval lowshot runs/a --voc VOCdevkit/VOC2007
  detco eval lowshot runs/a --voc VOCdevkit/VOC2007 --k 1,4,16 --trials 10
  detco eval lowshot runs/a --voc VOCdevkit/VOC2007 --samples low_shot_train";

#[cfg(feature = "train")]
pub(super) use self::measured::run;

#[cfg(feature = "train")]
mod measured {
    use std::io::Write as _;
    use std::ops::ControlFlow;

    use anyhow::Context;
    use serde_json::json;

    use super::LowshotArgs;
    use crate::cli::eval::bar;
    use crate::cli::eval::svm::named;
    use crate::cli::eval::voc::{Prepared, prepare, settings};
    use crate::eval::report::{Reading, Report};
    use crate::eval::svm::lowshot::{self, OfShots, Settings, Spread, Trial};
    use crate::eval::svm::protocol::Set;
    use crate::eval::voc::Split;

    pub(in crate::cli::eval) fn run(args: &LowshotArgs) -> anyhow::Result<()> {
        // Labels first: what cannot be drawn is said before features are made.
        let train = Split::read(&args.voc.voc, "trainval")?;
        let trials = trials(args, &train)?;
        let prepared = prepare(&args.voc)?;
        let chosen = Settings { costs: args.voc.costs.list(), fixed: args.fixed };
        let mut found = Vec::with_capacity(prepared.rows.len());
        for (level, train, test) in &prepared.rows {
            let bar = bar(&format!("Res{level}"));
            let test = Set { rows: test, labels: &prepared.test.labels };
            let shots = lowshot::evaluate(train, &trials, &test, &chosen, &mut |stage| {
                bar.set_length(stage.total as u64);
                bar.set_position(stage.done as u64);
                ControlFlow::Continue(())
            });
            let shots =
                shots.map_err(|error| named(error, &prepared.train.classes))?.context("stopped")?;
            bar.finish_and_clear();
            found.push((*level, shots));
        }
        let report = report(args, &prepared, &found);
        let mut out = crate::console::stdout();
        if args.voc.json {
            writeln!(out, "{}", serde_json::to_string(&report)?)?;
            return Ok(());
        }
        print(&mut out, args, &report, &found)
    }

    /// The samples of each k's trials.
    fn trials(args: &LowshotArgs, train: &Split) -> anyhow::Result<Vec<(usize, Vec<Trial>)>> {
        let mut shots = args.k.clone();
        shots.sort_unstable();
        shots.dedup();
        let of = |k: usize| {
            let one = |trial: u16| match &args.samples {
                Some(folder) => {
                    let name = format!("train_targets_sample{}_k{k}.json", trial + 1);
                    Ok(train.targets(&folder.join(name))?)
                }
                None => {
                    let drawn = lowshot::draw(&train.labels, k, args.seed, trial.into());
                    drawn.map_err(|error| named(error, &train.classes))
                }
            };
            let trials = (0..args.trials).map(one).collect::<anyhow::Result<Vec<Trial>>>()?;
            Ok((k, trials))
        };
        shots.into_iter().map(|k| of(k.into())).collect()
    }

    type Found = (u8, Vec<OfShots>);

    fn report(args: &LowshotArgs, prepared: &Prepared, found: &[Found]) -> Report {
        let mut settings = settings(&args.voc);
        let samples = match &args.samples {
            Some(folder) => {
                json!(folder.file_name().map(|name| name.to_string_lossy().into_owned()))
            }
            None => json!({ "seed": args.seed }),
        };
        settings.insert("samples".into(), samples);
        settings.insert("trials".into(), json!(args.trials));
        settings.insert("fixed".into(), json!(args.fixed));
        settings.insert("difficult".into(), json!("left out in training and in the test"));
        let reading = |name: String, of: &Spread| Reading::of_seeds(name, of.trials.clone());
        let readings = found.iter().flat_map(|(level, shots)| {
            shots.iter().flat_map(move |of| {
                [
                    reading(format!("res{level}/k{}/test", of.k), &of.test),
                    reading(format!("res{level}/k{}/fixed", of.k), &of.fixed),
                ]
            })
        });
        let level = |(level, shots): &Found| json!({ "level": level, "shots": shots });
        let levels = found.iter().map(level).collect();
        Report {
            protocol: format!("lowshot-{}", args.voc.costs.name()),
            weights: prepared.what.clone(),
            sha256: prepared.sha256.clone(),
            settings,
            data: prepared.data.clone(),
            readings: readings.collect(),
            more: [("levels".to_owned(), levels)].into_iter().collect(),
        }
    }

    fn print(
        out: &mut impl std::io::Write,
        args: &LowshotArgs,
        report: &Report,
        found: &[Found],
    ) -> anyhow::Result<()> {
        let spread = |of: &Spread| {
            format!("{:>6.2} {:>6.2} {:>6.2} {:>5.2}", of.mean, of.min, of.max, of.std)
        };
        for (level, shots) in found {
            writeln!(
                out,
                "Res{level} mAP in % over {} trials  ({}; {})",
                args.trials, report.weights, report.protocol
            )?;
            writeln!(
                out,
                "    k  C chosen in the test, as published      C = {}\n       {:>6} {:>6} {:>6} {:>5} {:>12}   \
                 {:>6} {:>6} {:>6} {:>5}",
                args.fixed, "mean", "min", "max", "std", "C", "mean", "min", "max", "std"
            )?;
            for of in shots {
                let (test, fixed) = (spread(&of.test), spread(&of.fixed));
                writeln!(out, "  {:>3}  {test} {:>12}   {fixed}", of.k, of.test.cost)?;
            }
        }
        writeln!(out, "backbone SHA-256 {}, the same before and after", report.sha256)?;
        Ok(())
    }
}
