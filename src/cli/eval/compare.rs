//! `detco eval compare`.

use std::path::PathBuf;

/// Reports side by side, with the differences to the first and their intervals.
///
/// A report is what `detco eval … --json` prints. Reports of two protocols, settings or sets of data are not compared.
/// Where both hold the parts of a figure (test samples, seeds, classes), these are paired: the interval is that of
/// the mean of their differences (Student, 95 %). It tells chance in these parts, not in pre-training: that takes
/// several runs.
#[derive(clap::Args, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct CompareArgs {
    /// Reports; the first one is what the others are held against.
    #[arg(value_name = "REPORT.json", num_args = 2.., required = true)]
    pub reports: Vec<PathBuf>,

    /// Print a table in Markdown.
    #[arg(long, conflicts_with = "json")]
    pub markdown: bool,

    /// Print the result as JSON.
    #[arg(long)]
    pub json: bool,
}

const EXAMPLES: &str = "\
Examples:
  detco eval knn runs/moco --train shards/train --test shards/val --json > moco.json
  detco eval knn runs/detco --train shards/train --test shards/val --json > detco.json
  detco eval compare moco.json detco.json";

#[cfg(feature = "train")]
pub(super) use self::shown::run;

#[cfg(feature = "train")]
mod shown {
    use std::io::Write as _;

    use anyhow::Context as _;
    use serde_json::json;

    use super::CompareArgs;
    use crate::eval::report::{Difference, Report, differences};

    pub(in crate::cli::eval) fn run(args: &CompareArgs) -> anyhow::Result<()> {
        let reports: Vec<Report> =
            args.reports.iter().map(|path| Report::read(path)).collect::<Result<_, _>>()?;
        let (first, others) = reports.split_first().context("compare takes two reports or more")?;
        for (report, path) in others.iter().zip(&args.reports[1..]) {
            first.check_like(report, &path.display().to_string())?;
        }
        let found: Vec<(&Report, Vec<Difference>)> =
            others.iter().map(|other| (other, differences(first, other))).collect();
        if args.json {
            return print_json(first, &found);
        }
        let mut rows = vec![vec![first.protocol.clone(), first.weights.clone()]];
        rows[0].extend(found.iter().map(|(other, _)| other.weights.clone()));
        for reading in &first.readings {
            let mut row = vec![reading.name.clone(), value(reading.value, reading.interval)];
            row.extend(found.iter().map(|(other, differences)| {
                let theirs = other.readings.iter().find(|found| found.name == reading.name);
                let difference = differences.iter().find(|found| found.name == reading.name);
                theirs.zip(difference).map_or_else(
                    || "-".to_owned(),
                    |(theirs, difference)| {
                        format!("{} {}", value(theirs.value, theirs.interval), points(difference))
                    },
                )
            }));
            rows.push(row);
        }
        table(&rows, args.markdown)
    }

    fn value(value: f64, interval: Option<[f64; 2]>) -> String {
        match interval {
            Some([low, high]) => format!("{value:.2} [{low:.2}, {high:.2}]"),
            None => format!("{value:.2}"),
        }
    }

    fn points(difference: &Difference) -> String {
        match difference.interval {
            Some([low, high]) => format!("({:+.2} [{low:+.2}, {high:+.2}])", difference.value),
            None => format!("({:+.2})", difference.value),
        }
    }

    fn table(rows: &[Vec<String>], markdown: bool) -> anyhow::Result<()> {
        let mut out = crate::console::stdout();
        if markdown {
            for (i, row) in rows.iter().enumerate() {
                writeln!(out, "| {} |", row.join(" | "))?;
                if i == 0 {
                    writeln!(out, "|{}", " --- |".repeat(row.len()))?;
                }
            }
            return Ok(());
        }
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
        let widths: Vec<usize> = (0..rows[0].len()).filter_map(width).collect();
        for row in rows {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
            writeln!(out, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
        }
        Ok(())
    }

    fn print_json(first: &Report, found: &[(&Report, Vec<Difference>)]) -> anyhow::Result<()> {
        let others = found.iter().map(|(other, differences)| {
            json!({ "weights": other.weights, "sha256": other.sha256, "differences": differences })
        });
        let value = json!({
            "protocol": first.protocol,
            "first": { "weights": first.weights, "sha256": first.sha256 },
            "others": others.collect::<Vec<_>>(),
        });
        writeln!(crate::console::stdout(), "{value}")?;
        Ok(())
    }
}
