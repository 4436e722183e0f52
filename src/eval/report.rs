//! What an evaluation found, in one shape for all of them: printed with `--json`, read by `detco eval compare`.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use thiserror::Error;

/// z of a two-sided interval of 95 %.
const Z: f64 = 1.959_963_984_540_054;

/// What one command measured of one backbone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Name of the protocol. Figures of two protocols are not compared.
    pub protocol: String,
    /// What was measured, for people.
    pub weights: String,
    /// SHA-256 of the backbone's tensors ([`crate::eval::digest`]).
    pub sha256: String,
    /// Everything that changes a figure. Figures of other settings are not compared.
    pub settings: Map<String, Value>,
    /// What it was measured on: counts, splits.
    pub data: Map<String, Value>,
    /// The figures.
    pub readings: Vec<Reading>,
    /// What this command has beside.
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

/// One figure.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reading {
    /// Its name: `top1`, `res5/mAP`.
    pub name: String,
    /// Its value, in percent.
    pub value: f64,
    /// Where it lies with 95 % confidence, in percent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<[f64; 2]>,
    /// The parts whose mean it is, in an order that two reports share: one a class, a seed or a test sample, in
    /// percent. Empty where it has none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub samples: Vec<f64>,
}

impl Reading {
    /// A figure alone.
    pub fn new(name: impl Into<String>, value: f64) -> Reading {
        Reading { name: name.into(), value, interval: None, samples: Vec::new() }
    }

    /// The share of test samples that are right, with Wilson's interval (Wilson, 1927, eq. 4).
    pub fn of_hits(name: impl Into<String>, hits: &[bool]) -> Reading {
        let n = hits.len() as f64;
        let right = hits.iter().filter(|hit| **hit).count() as f64;
        let samples = hits.iter().map(|hit| if *hit { 100.0 } else { 0.0 }).collect();
        let interval = (!hits.is_empty()).then(|| wilson(right, n));
        Reading { name: name.into(), value: 100.0 * right / n, interval, samples }
    }

    /// The mean of figures of several seeds, with Student's interval.
    pub fn of_seeds(name: impl Into<String>, samples: Vec<f64>) -> Reading {
        let Spread { mean, half, .. } = Spread::of(&samples);
        let interval = half.map(|half| [mean - half, mean + half]);
        Reading { name: name.into(), value: mean, interval, samples }
    }
}

/// Wilson's interval of `right` hits of `n`, in percent.
fn wilson(right: f64, n: f64) -> [f64; 2] {
    let p = right / n;
    let centre = p + Z * Z / (2.0 * n);
    let half = Z * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    let scale = 100.0 / (1.0 + Z * Z / n);
    [(centre - half) * scale, (centre + half) * scale]
}

/// A mean, how much single values differ, and half of the mean's interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// Mean.
    pub mean: f64,
    /// Standard deviation of the values (over n - 1); none of fewer than two.
    pub sd: Option<f64>,
    /// Half of Student's 95 % interval of the mean; none of fewer than two values.
    pub half: Option<f64>,
}

impl Spread {
    /// Of values that were drawn alike.
    pub fn of(values: &[f64]) -> Spread {
        let n = values.len();
        let mean = values.iter().sum::<f64>() / n as f64;
        let square = |value: &f64| (value - mean) * (value - mean);
        let sd =
            (n > 1).then(|| (values.iter().map(square).sum::<f64>() / (n as f64 - 1.0)).sqrt());
        let half = sd.map(|sd| student(n - 1) * sd / (n as f64).sqrt());
        Spread { mean, sd, half }
    }
}

/// The 97.5 % quantile of Student's t for `freedom` degrees, at least 1: exact to 1e-3 (Cornish-Fisher's expansion,
/// Abramowitz and Stegun 26.7.5, from 10 on; tables below).
fn student(freedom: usize) -> f64 {
    const TABLE: [f64; 9] = [
        12.706_205, 4.302_653, 3.182_446, 2.776_445, 2.570_582, 2.446_912, 2.364_624, 2.306_004,
        2.262_157,
    ];
    if let Some(value) = TABLE.get(freedom.saturating_sub(1)) {
        return *value;
    }
    let (v, z) = (freedom as f64, Z);
    let first = (z.powi(3) + z) / 4.0;
    let second = (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / 96.0;
    let third = (3.0 * z.powi(7) + 19.0 * z.powi(5) + 17.0 * z.powi(3) - 15.0 * z) / 384.0;
    z + first / v + second / (v * v) + third / v.powi(3)
}

/// Why two reports are not compared, or one cannot be read.
#[derive(Debug, Error)]
pub enum ReportError {
    /// No file, or not to be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Not a report.
    #[error("{path} is no report of `detco eval … --json`: {source}")]
    Format {
        /// The file.
        path: String,
        /// What is wrong, and where.
        source: serde_json::Error,
    },
    /// Figures of two kinds.
    #[error(
        "{path} was measured by the protocol {found}, the first report by {expected}: such figures are not compared"
    )]
    Protocol {
        /// The file.
        path: String,
        /// Its protocol.
        found: String,
        /// The first one's.
        expected: String,
    },
    /// Figures of other settings or data.
    #[error(
        "{path}: {what} is {found}, in the first report {expected}: such figures are not compared"
    )]
    Unlike {
        /// The file.
        path: String,
        /// `settings.size`, `data.test`.
        what: String,
        /// Its value.
        found: String,
        /// The first one's.
        expected: String,
    },
}

impl Report {
    /// Reads one.
    ///
    /// # Errors
    /// [`ReportError::Read`], [`ReportError::Format`].
    pub fn read(path: &Path) -> Result<Report, ReportError> {
        let shown = || path.display().to_string();
        let text = std::fs::read_to_string(path)
            .map_err(|source| ReportError::Read { path: shown(), source })?;
        serde_json::from_str(&text).map_err(|source| ReportError::Format { path: shown(), source })
    }

    /// Whether another report's figures can be held against these; `path` names it.
    ///
    /// # Errors
    /// [`ReportError::Protocol`], [`ReportError::Unlike`].
    pub fn check_like(&self, other: &Report, path: &str) -> Result<(), ReportError> {
        if other.protocol != self.protocol {
            return Err(ReportError::Protocol {
                path: path.to_owned(),
                found: other.protocol.clone(),
                expected: self.protocol.clone(),
            });
        }
        let unlike = |table: &str, ours: &Map<String, Value>, theirs: &Map<String, Value>| {
            let keys = ours.keys().chain(theirs.keys());
            let key = keys.into_iter().find(|key| ours.get(*key) != theirs.get(*key))?;
            let shown = |value: Option<&Value>| value.map_or("missing".into(), Value::to_string);
            Some(ReportError::Unlike {
                path: path.to_owned(),
                what: format!("{table}.{key}"),
                found: shown(theirs.get(key)),
                expected: shown(ours.get(key)),
            })
        };
        unlike("settings", &self.settings, &other.settings)
            .or_else(|| unlike("data", &self.data, &other.data))
            .map_or(Ok(()), Err)
    }
}

/// A figure of one report beside the same of another.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// Its name.
    pub name: String,
    /// The other's less the first's, in points.
    pub value: f64,
    /// Where it lies with 95 % confidence, from the differences of paired parts; none without parts.
    pub interval: Option<[f64; 2]>,
    /// Paired parts.
    pub pairs: usize,
}

/// `other` less `first`, for each figure that both have, in the first one's order.
pub fn differences(first: &Report, other: &Report) -> Vec<Difference> {
    let of = |reading: &Reading| {
        let found = other.readings.iter().find(|found| found.name == reading.name)?;
        let paired = found.samples.len() == reading.samples.len() && !found.samples.is_empty();
        let pairs: Vec<f64> = match paired {
            true => found.samples.iter().zip(&reading.samples).map(|(b, a)| b - a).collect(),
            false => Vec::new(),
        };
        let value = found.value - reading.value;
        let half = if pairs.len() > 1 { Spread::of(&pairs).half } else { None };
        let interval = half.map(|half| [value - half, value + half]);
        Some(Difference { name: reading.name.clone(), value, interval, pairs: pairs.len() })
    };
    first.readings.iter().filter_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn students_quantiles_are_the_tables() {
        // scipy.stats.t.ppf(0.975, v).
        let table = [
            (1, 12.70620),
            (4, 2.77645),
            (9, 2.26216),
            (10, 2.22814),
            (14, 2.14479),
            (30, 2.04227),
            (1000, 1.96234),
        ];
        for (freedom, expected) in table {
            let found = student(freedom);
            assert!((found - expected).abs() < 2e-4, "{freedom}: {found}, expected {expected}");
        }
    }

    #[test]
    fn wilsons_interval_is_the_books() {
        // statsmodels.stats.proportion.proportion_confint(8, 10, method="wilson").
        let [low, high] = wilson(8.0, 10.0);
        assert!((low - 49.01625).abs() < 1e-4 && (high - 94.33178).abs() < 1e-4, "{low} {high}");
        let [low, high] = Reading::of_hits("top1", &[true; 20]).interval.unwrap();
        assert!(low > 80.0 && (high - 100.0).abs() < 1e-9, "{low} {high}");
    }

    fn report(value: f64, samples: &[f64]) -> Report {
        let reading = Reading { samples: samples.to_vec(), ..Reading::new("top1", value) };
        Report {
            protocol: "knn".into(),
            weights: "a".into(),
            sha256: "0".into(),
            settings: Map::from_iter([("k".into(), 200.into())]),
            data: Map::new(),
            readings: vec![reading],
            more: Map::new(),
        }
    }

    #[test]
    fn pairs_make_an_interval_and_unlike_reports_none() {
        let (first, other) = (report(2.0, &[1.0, 2.0, 3.0]), report(4.0, &[2.0, 4.0, 6.0]));
        first.check_like(&other, "b.json").unwrap();
        let [found] = &differences(&first, &other)[..] else { panic!("one figure") };
        // Differences 1, 2, 3: mean 2, standard deviation 1, t = 4.3027 with two degrees.
        let half = 4.302_653 / 3.0_f64.sqrt();
        assert_eq!((found.value, found.pairs), (2.0, 3));
        let [low, high] = found.interval.unwrap();
        assert!((low - (2.0 - half)).abs() < 1e-6 && (high - (2.0 + half)).abs() < 1e-6);
        let mut unlike = other.clone();
        unlike.settings.insert("k".into(), 20.into());
        let error = first.check_like(&unlike, "b.json").unwrap_err().to_string();
        assert!(error.contains("settings.k is 20, in the first report 200"), "{error}");
        unlike.protocol = "svm".into();
        assert!(first.check_like(&unlike, "b.json").is_err());
        let text = serde_json::to_string(&first).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), first);
    }
}
