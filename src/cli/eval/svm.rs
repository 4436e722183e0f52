//! `detco eval svm`.

use super::voc::VocArgs;

/// Support vector machines on PASCAL VOC 2007, a class each: the published protocol, step by step.
///
/// Images are squashed to 224 pixels, maps pooled to about 9,000 numbers, rows normalised. Of each class the cost
/// with the best 3-fold cross-validation is chosen, and average precision (the area, not 11 points) measured on test;
/// mAP is their mean. The machines are at their exact minimum, where published ones end near it.
///
/// As published, images that show a class only as a difficult object count as negative in training and are left
/// out in the test; `--difficult ignore` leaves them out of both.
#[derive(clap::Args, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct SvmArgs {
    /// Options shared with `detco eval lowshot`.
    #[command(flatten)]
    pub voc: VocArgs,

    /// Images that show a class only as a difficult object, in training.
    #[arg(long, value_name = "HOW", default_value = "as-published")]
    pub difficult: Difficult,
}

/// What becomes of difficult images in training.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difficult {
    /// They count as negative.
    AsPublished,
    /// They are left out.
    Ignore,
}

const EXAMPLES: &str = "\
Examples:
  detco eval svm runs/a --voc VOCdevkit/VOC2007
  detco eval svm runs/a --voc VOCdevkit/VOC2007 --init                before training
  detco eval svm resnet50.pth --voc VOCdevkit/VOC2007 --levels 2,3,4,5 --json > resnet50.json";

#[cfg(feature = "train")]
pub(super) use self::measured::{named, run};

#[cfg(feature = "train")]
mod measured {
    use std::io::Write as _;
    use std::ops::ControlFlow;

    use anyhow::Context;
    use serde_json::json;

    use super::{Difficult, SvmArgs};
    use crate::cli::eval::bar;
    use crate::cli::eval::voc::{Prepared, prepare, settings};
    use crate::eval::report::{Reading, Report};
    use crate::eval::svm::protocol::Set;
    use crate::eval::svm::{self, OfClass, Settings, SvmError};

    const FOLDS: usize = 3;

    pub(in crate::cli::eval) fn run(args: &SvmArgs) -> anyhow::Result<()> {
        let prepared = prepare(&args.voc)?;
        let difficult = match args.difficult {
            Difficult::AsPublished => svm::Difficult::AsPublished,
            Difficult::Ignore => svm::Difficult::Ignore,
        };
        let chosen = Settings { costs: args.voc.costs.list(), folds: FOLDS, difficult };
        let mut found = Vec::with_capacity(prepared.rows.len());
        for (level, train, test) in &prepared.rows {
            let bar = bar(&format!("Res{level}"));
            let train_set = Set { rows: train, labels: &prepared.train.labels };
            let test_set = Set { rows: test, labels: &prepared.test.labels };
            let classes = svm::evaluate(&train_set, &test_set, &chosen, &mut |stage| {
                bar.set_length(stage.total as u64);
                bar.set_position(stage.done as u64);
                ControlFlow::Continue(())
            });
            let classes = classes
                .map_err(|error| named(error, &prepared.train.classes))?
                .context("stopped")?;
            bar.finish_and_clear();
            found.push((*level, train.size()[1], classes));
        }
        let report = report(args, &prepared, &chosen, &found);
        let mut out = crate::console::stdout();
        if args.voc.json {
            writeln!(out, "{}", serde_json::to_string(&report)?)?;
            return Ok(());
        }
        print(&mut out, &report, &prepared, &found)
    }

    /// The error, with the name of the class that it tells of by its place.
    pub(in crate::cli::eval) fn named(error: SvmError, classes: &[String]) -> anyhow::Error {
        let place = match &error {
            SvmError::Class { class, .. }
            | SvmError::NoTest { class }
            | SvmError::TooFew { class, .. } => Some(*class),
            _ => None,
        };
        let name = place.and_then(|place| Some((place, classes.get(place)?)));
        let error = anyhow::Error::new(error);
        match name {
            Some((place, name)) => error.context(format!("{name}, which is class {place}")),
            None => error,
        }
    }

    fn mean(classes: &[OfClass]) -> f64 {
        classes.iter().map(|class| class.ap).sum::<f64>() / classes.len().max(1) as f64
    }

    type Found = (u8, i64, Vec<OfClass>);

    fn report(args: &SvmArgs, prepared: &Prepared, chosen: &Settings, found: &[Found]) -> Report {
        let mut settings = settings(&args.voc);
        let difficult = match args.difficult {
            Difficult::AsPublished => "negative in training, left out in the test",
            Difficult::Ignore => "left out in training and in the test",
        };
        settings.insert("folds".into(), json!(chosen.folds));
        settings.insert("difficult".into(), json!(difficult));
        settings.insert("ap".into(), json!("costs chosen by the step sum, tested by the area"));
        let protocol = match args.difficult {
            Difficult::AsPublished => format!("svm-{}", args.voc.costs.name()),
            Difficult::Ignore => "svm-custom".to_owned(),
        };
        let reading = |(level, _, classes): &Found| Reading {
            name: format!("res{level}/mAP"),
            value: mean(classes),
            interval: None,
            samples: classes.iter().map(|class| class.ap).collect(),
        };
        let level = |(level, dims, classes): &Found| {
            let class = |(class, name): (&OfClass, &String)| {
                json!({
                    "class": name, "ap": class.ap, "cost": class.cost,
                    "positives": class.positives, "cross_validation": class.curve,
                })
            };
            let classes: Vec<_> = classes.iter().zip(&prepared.train.classes).map(class).collect();
            json!({ "level": level, "features": dims, "classes": classes })
        };
        let levels = found.iter().map(level).collect();
        Report {
            protocol,
            weights: prepared.what.clone(),
            sha256: prepared.sha256.clone(),
            settings,
            data: prepared.data.clone(),
            readings: found.iter().map(reading).collect(),
            more: [("levels".to_owned(), levels)].into_iter().collect(),
        }
    }

    fn print(
        out: &mut impl std::io::Write,
        report: &Report,
        prepared: &Prepared,
        found: &[Found],
    ) -> anyhow::Result<()> {
        let width = prepared.train.classes.iter().map(|name| name.chars().count()).max();
        let width = width.unwrap_or(0);
        for (level, dims, classes) in found {
            writeln!(
                out,
                "Res{level} mAP {:.2} %  ({}; {}; {dims} features, {} trainval and {} test images)",
                mean(classes),
                report.weights,
                report.protocol,
                prepared.train.images.len(),
                prepared.test.images.len()
            )?;
            for (class, name) in classes.iter().zip(&prepared.train.classes) {
                writeln!(out, "  {name:<width$}  AP {:>6.2}  C {}", class.ap, class.cost)?;
            }
        }
        writeln!(out, "backbone SHA-256 {}, the same before and after", report.sha256)?;
        Ok(())
    }
}
