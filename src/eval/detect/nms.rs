//! From scores and boxes of cells to detections.

/// Overlap above which the lower-scored of two boxes of a class is dropped.
pub const OVERLAP: f32 = 0.5;
/// Boxes of a scene that are looked at, by score, over all classes.
pub const CANDIDATES: usize = 400;
/// Detections of a scene.
pub const DETECTIONS: usize = 100;

/// A box with its score and class.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Left, top, right and bottom edge.
    pub corners: [f32; 4],
    /// Confidence.
    pub score: f32,
    /// Its class: boxes of other classes do not meet.
    pub class: usize,
}

/// Greedy non-maximum suppression within classes: from the highest score on (of equal ones, from the first), a box
/// drops those that overlap it by more than `overlap`. The positions that are kept, by score.
pub fn suppress(candidates: &[Candidate], overlap: f32) -> Vec<usize> {
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    order.sort_by(|a, b| candidates[*b].score.total_cmp(&candidates[*a].score));
    let mut kept: Vec<usize> = Vec::new();
    for at in order {
        let one = &candidates[at];
        let is_same = |other: &&usize| candidates[**other].class == one.class;
        let mut before = kept.iter().filter(is_same);
        if !before.any(|other| shared(candidates[*other].corners, one.corners) > overlap) {
            kept.push(at);
        }
    }
    kept
}

/// Intersection over union.
fn shared(a: [f32; 4], b: [f32; 4]) -> f32 {
    let area = |of: [f32; 4]| (of[2] - of[0]) * (of[3] - of[1]);
    let along = |axis: usize| (a[axis + 2].min(b[axis + 2]) - a[axis].max(b[axis])).max(0.0);
    let shared = along(0) * along(1);
    shared / (area(a) + area(b) - shared)
}

/// The detections of a scene: of `scores` `[classes, cells]` the 400 highest (of equal ones the first), suppressed at
/// 0.5, at most 100 of those. `corners` are the cells' boxes.
pub fn detections(scores: &[f32], corners: &[[f32; 4]]) -> Vec<Candidate> {
    let cells = corners.len().max(1);
    let mut order: Vec<usize> = (0..scores.len()).collect();
    let by_score = |a: &usize, b: &usize| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b));
    if order.len() > CANDIDATES {
        order.select_nth_unstable_by(CANDIDATES, by_score);
        order.truncate(CANDIDATES);
    }
    order.sort_unstable_by(by_score);
    let candidate = |at: usize| Candidate {
        corners: corners[at % cells],
        score: scores[at],
        class: at / cells,
    };
    let candidates: Vec<Candidate> = order.into_iter().map(candidate).collect();
    let kept = suppress(&candidates, OVERLAP);
    kept.into_iter().take(DETECTIONS).map(|at| candidates[at]).collect()
}
