//! PASCAL VOC's average precision.

use serde::{Deserialize, Serialize};

use super::{Box4, Detection, OfCategory, THRESHOLDS, Truth, by_score, grouped, mean};

/// How the curve of precision over recall becomes one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Year {
    /// The kit of 2007: the mean of the highest precisions from eleven recalls on, 0, 0.1, … 1.
    Voc07,
    /// The kit of 2010 and later: the area below the curve made monotone.
    Voc10,
}

/// The result, in percent.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Voc {
    /// Which kit's definition.
    pub year: Year,
    /// Mean over the thresholds 0.50 to 0.95 and over categories, as detectron2 tells it.
    pub ap: Option<f64>,
    /// At the threshold 0.5: VOC's own number, mAP.
    pub ap50: Option<f64>,
    /// At the threshold 0.75.
    pub ap75: Option<f64>,
    /// Each category by itself.
    pub categories: Vec<OfCategory>,
}

/// Evaluates detections. A detection meets the object that it overlaps most, and is wrong if another one met it
/// before; one that meets a difficult object does not count. Boxes hold the pixels at both of their ends.
pub fn evaluate(truth: &Truth, found: &[Detection], year: Year) -> Voc {
    let objects = grouped(truth.objects.iter().map(|object| (object.category, object.image)));
    let of_category = |category: usize| -> [Option<f64>; THRESHOLDS] {
        let of = |object: &&super::Object| object.category == category && !object.is_ignored;
        let there = truth.objects.iter().filter(of).count();
        let mut mine: Vec<&Detection> =
            found.iter().filter(|one| one.category == category).collect();
        let order = by_score(&mine.iter().map(|one| one.score).collect::<Vec<_>>());
        mine = order.iter().map(|i| mine[*i]).collect();
        // The object that each overlaps most, and by how much.
        let best: Vec<Option<(usize, f64)>> = mine
            .iter()
            .map(|one| {
                let candidates = objects.get(&(category, one.image))?;
                let overlaps =
                    candidates.iter().map(|i| (*i, overlap(one.bounds, truth.objects[*i].bounds)));
                // The first of equal ones.
                overlaps.reduce(|a, b| if b.1 > a.1 { b } else { a })
            })
            .collect();
        std::array::from_fn(|threshold| {
            // detectron2 counts in percent: 50, 55, … 95.
            let threshold = (50 + 5 * threshold) as f64 / 100.0;
            let mut taken = std::collections::HashSet::new();
            let (mut right, mut wrong) = (0.0, 0.0);
            let mut curve = Vec::with_capacity(best.len());
            for met in &best {
                match met {
                    Some((object, overlap)) if *overlap > threshold => {
                        if truth.objects[*object].is_ignored {
                        } else if taken.insert(*object) {
                            right += 1.0;
                        } else {
                            wrong += 1.0;
                        }
                    }
                    _ => wrong += 1.0,
                }
                let recall = right / there as f64;
                curve.push((recall, right / f64::max(right + wrong, f64::EPSILON)));
            }
            (there > 0).then(|| year.average(&curve))
        })
    };
    let all: Vec<[Option<f64>; THRESHOLDS]> =
        (0..truth.categories.len()).map(of_category).collect();
    let percent = |value: Option<f64>| value.map(|value| 100.0 * value);
    let at = |threshold: usize| percent(mean(all.iter().filter_map(|of| of[threshold])));
    let one = |(of, (_, name)): (&[Option<f64>; THRESHOLDS], &(i64, String))| OfCategory {
        name: name.clone(),
        ap: percent(mean(of.iter().flatten().copied())),
        ap50: percent(of[0]),
    };
    Voc {
        year,
        ap: percent(mean(all.iter().flatten().flatten().copied())),
        ap50: at(0),
        ap75: at(5),
        categories: all.iter().zip(&truth.categories).map(one).collect(),
    }
}

impl Year {
    /// Of a curve of (recall, precision), recall rising.
    pub(in crate::eval) fn average(self, curve: &[(f64, f64)]) -> f64 {
        match self {
            Year::Voc07 => {
                let from = |point: i32| {
                    let from = f64::from(point) * 0.1;
                    let reached = curve.iter().filter(|(recall, _)| *recall >= from);
                    reached.map(|(_, precision)| *precision).fold(0.0, f64::max)
                };
                (0..=10).map(|point| from(point) / 11.0).sum()
            }
            Year::Voc10 => {
                let (mut area, mut best, mut right) = (0.0, 0.0f64, None);
                for (recall, precision) in curve.iter().rev() {
                    if let Some(right) = right {
                        area += (right - recall) * best;
                    }
                    best = best.max(*precision);
                    right = Some(*recall);
                }
                area + right.unwrap_or(0.0) * best
            }
        }
    }
}

/// Intersection over union of boxes that hold the pixels at both of their ends: one pixel wider and higher.
fn overlap(a: Box4, b: Box4) -> f64 {
    let end = |of: Box4, axis: usize| of[axis] + of[axis + 2];
    let along = |axis: usize| end(a, axis).min(end(b, axis)) - a[axis].max(b[axis]) + 1.0;
    let shared = along(0).max(0.0) * along(1).max(0.0);
    let area = |of: Box4| (of[2] + 1.0) * (of[3] + 1.0);
    shared / (area(a) + area(b) - shared)
}
