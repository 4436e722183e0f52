//! COCO's average precision and recall of boxes.

use serde::Serialize;

use super::{
    Box4, Detection, Object, OfCategory, THRESHOLDS, Truth, by_score, grouped, mean, thresholds,
};

/// Detections of an image and category that are looked at, at most; recall is told for fewer as well.
const COUNTS: [usize; 3] = [1, 10, 100];
/// Points of recall at which precision is read: 0, 0.01, … 1.
const RECALLS: usize = 101;
/// Areas in pixels, both ends included: all; small, to 32²; medium, to 96²; large.
const AREAS: [(f64, f64); 4] = [(0.0, 1e10), (0.0, 1024.0), (1024.0, 9216.0), (9216.0, 1e10)];

/// The twelve numbers, in percent; none where there is nothing to detect.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Coco {
    /// Mean over the thresholds 0.50 to 0.95 and over categories.
    pub ap: Option<f64>,
    /// At the threshold 0.50.
    pub ap50: Option<f64>,
    /// At the threshold 0.75.
    pub ap75: Option<f64>,
    /// Of objects up to 32² pixels.
    pub ap_small: Option<f64>,
    /// Of objects of 32² to 96² pixels.
    pub ap_medium: Option<f64>,
    /// Of objects from 96² pixels.
    pub ap_large: Option<f64>,
    /// Average recall with one detection an image and category.
    pub ar_1: Option<f64>,
    /// With ten.
    pub ar_10: Option<f64>,
    /// With a hundred.
    pub ar_100: Option<f64>,
    /// With a hundred, of small objects.
    pub ar_small: Option<f64>,
    /// Of medium ones.
    pub ar_medium: Option<f64>,
    /// Of large ones.
    pub ar_large: Option<f64>,
    /// Each category by itself.
    pub categories: Vec<OfCategory>,
}

/// Precision at [`RECALLS`], and the recall at the end, for each threshold; none where there is nothing to detect.
type Curves = Option<[([f64; RECALLS], f64); THRESHOLDS]>;

/// Evaluates detections.
pub fn evaluate(truth: &Truth, found: &[Detection]) -> Coco {
    let objects = grouped(truth.objects.iter().map(|object| (object.category, object.image)));
    let detections = grouped(found.iter().map(|one| (one.category, one.image)));
    let mut curves: Vec<[[Curves; 3]; 4]> = Vec::with_capacity(truth.categories.len());
    for category in 0..truth.categories.len() {
        let mut images = Vec::new();
        for image in 0..truth.images.len() {
            let of = |groups: &std::collections::HashMap<_, Vec<usize>>| {
                groups.get(&(category, image)).cloned().unwrap_or_default()
            };
            let there: Vec<&Object> = of(&objects).iter().map(|i| &truth.objects[*i]).collect();
            let said: Vec<&Detection> = of(&detections).iter().map(|i| &found[*i]).collect();
            if !there.is_empty() || !said.is_empty() {
                images.push(Image::new(&there, &said));
            }
        }
        curves.push(AREAS.map(|area| {
            let matched: Vec<Matched> = images.iter().map(|image| image.matched(area)).collect();
            COUNTS.map(|count| accumulate(&matched, count))
        }));
    }
    summarise(truth, &curves)
}

/// One image's objects and detections of one category, the best detections first.
struct Image {
    scores: Vec<f64>,
    areas: Vec<f64>,
    /// Of each object: its area, and whether it is ignored whatever its area.
    objects: Vec<(f64, bool)>,
    /// `[detection][object]`.
    overlaps: Vec<Vec<f64>>,
}

/// What became of an image's detections, for objects of some area.
struct Matched {
    scores: Vec<f64>,
    /// For each threshold and detection: whether it met an object, and whether it is ignored.
    outcomes: [Vec<(bool, bool)>; THRESHOLDS],
    /// Objects that count.
    count: usize,
}

impl Image {
    fn new(objects: &[&Object], detections: &[&Detection]) -> Image {
        let scores: Vec<f64> = detections.iter().map(|one| one.score).collect();
        let mut order = by_score(&scores);
        order.truncate(COUNTS[2]);
        let best: Vec<&Detection> = order.iter().map(|i| detections[*i]).collect();
        let overlaps = |one: &&Detection| {
            objects
                .iter()
                .map(|object| overlap(one.bounds, object.bounds, object.is_ignored))
                .collect()
        };
        Image {
            scores: best.iter().map(|one| one.score).collect(),
            areas: best.iter().map(|one| one.bounds[2] * one.bounds[3]).collect(),
            objects: objects.iter().map(|object| (object.area, object.is_ignored)).collect(),
            overlaps: best.iter().map(overlaps).collect(),
        }
    }

    /// Gives each detection, the best first, the free object that it overlaps most; objects that count come
    /// before those that are ignored, and a crowd has room for many.
    fn matched(&self, (low, high): (f64, f64)) -> Matched {
        let outside = |area: f64| area < low || area > high;
        let ignored = |i: usize| self.objects[i].1 || outside(self.objects[i].0);
        let mut order: Vec<usize> = (0..self.objects.len()).collect();
        order.sort_by_key(|i| ignored(*i));
        let outcomes = thresholds().map(|threshold| {
            let mut taken = vec![false; self.objects.len()];
            let outcome = |(one, overlaps): (usize, &Vec<f64>)| {
                let (mut most, mut met) = (threshold.min(1.0 - 1e-10), None);
                for &i in &order {
                    let (_, is_crowd) = self.objects[i];
                    if taken[i] && !is_crowd {
                        continue;
                    }
                    if met.is_some_and(|met| !ignored(met)) && ignored(i) {
                        break;
                    }
                    if overlaps[i] >= most {
                        (most, met) = (overlaps[i], Some(i));
                    }
                }
                match met {
                    Some(i) => {
                        taken[i] = true;
                        (true, ignored(i))
                    }
                    None => (false, outside(self.areas[one])),
                }
            };
            self.overlaps.iter().enumerate().map(outcome).collect()
        });
        let count = order.iter().filter(|i| !ignored(**i)).count();
        Matched { scores: self.scores.clone(), outcomes, count }
    }
}

/// Intersection over union; over the detection's own area where the object is a crowd.
fn overlap(found: Box4, there: Box4, is_crowd: bool) -> f64 {
    let along = |axis: usize| {
        (found[axis + 2] + found[axis]).min(there[axis + 2] + there[axis])
            - found[axis].max(there[axis])
    };
    let (width, height) = (along(0), along(1));
    if width <= 0.0 || height <= 0.0 {
        return 0.0;
    }
    let (shared, own) = (width * height, found[2] * found[3]);
    shared / if is_crowd { own } else { own + there[2] * there[3] - shared }
}

/// The curves of all images together, with so many detections an image.
fn accumulate(images: &[Matched], count: usize) -> Curves {
    let there: usize = images.iter().map(|image| image.count).sum();
    if there == 0 {
        return None;
    }
    let all = || images.iter().flat_map(|image| image.scores.iter().take(count));
    let order = by_score(&all().copied().collect::<Vec<_>>());
    Some(std::array::from_fn(|threshold| {
        let outcomes = images.iter().flat_map(|image| image.outcomes[threshold].iter().take(count));
        let outcomes: Vec<(bool, bool)> = outcomes.copied().collect();
        let (mut right, mut wrong) = (0.0, 0.0);
        let (mut recall, mut precision) = (Vec::new(), Vec::new());
        for &i in &order {
            match outcomes[i] {
                (_, true) => {}
                (true, false) => right += 1.0,
                (false, false) => wrong += 1.0,
            }
            recall.push(right / there as f64);
            precision.push(right / (wrong + right + f64::EPSILON));
        }
        for i in (1..precision.len()).rev() {
            precision[i - 1] = precision[i - 1].max(precision[i]);
        }
        let at = |point: usize| {
            let wanted = if point == RECALLS - 1 { 1.0 } else { point as f64 * 0.01 };
            let first = recall.partition_point(|recall| *recall < wanted);
            precision.get(first).copied().unwrap_or(0.0)
        };
        (std::array::from_fn(at), recall.last().copied().unwrap_or(0.0))
    }))
}

fn summarise(truth: &Truth, curves: &[[[Curves; 3]; 4]]) -> Coco {
    let (all, most) = (0, 2);
    let precisions = |of: &Curves, only: Option<usize>| -> Vec<f64> {
        let thresholds = of.iter().flat_map(|curves| curves.iter().enumerate());
        let wanted = thresholds.filter(|(threshold, _)| only.is_none_or(|only| only == *threshold));
        wanted.flat_map(|(_, (precision, _))| *precision).collect()
    };
    let percent = |value: Option<f64>| value.map(|value| 100.0 * value);
    let ap = |area: usize, only: Option<usize>| {
        percent(mean(curves.iter().flat_map(|of| precisions(&of[area][most], only))))
    };
    let ar = |area: usize, count: usize| {
        let recalls = |of: &Curves| of.iter().flatten().map(|(_, recall)| *recall).collect();
        percent(mean(curves.iter().flat_map(|of| -> Vec<f64> { recalls(&of[area][count]) })))
    };
    let of_category = |(of, (_, name)): (&[[Curves; 3]; 4], &(i64, String))| OfCategory {
        name: name.clone(),
        ap: percent(mean(precisions(&of[all][most], None))),
        ap50: percent(mean(precisions(&of[all][most], Some(0)))),
    };
    Coco {
        ap: ap(all, None),
        ap50: ap(all, Some(0)),
        ap75: ap(all, Some(5)),
        ap_small: ap(1, None),
        ap_medium: ap(2, None),
        ap_large: ap(3, None),
        ar_1: ar(all, 0),
        ar_10: ar(all, 1),
        ar_100: ar(all, most),
        ar_small: ar(1, most),
        ar_medium: ar(2, most),
        ar_large: ar(3, most),
        categories: curves.iter().zip(&truth.categories).map(of_category).collect(),
    }
}
