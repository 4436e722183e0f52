//! The detector's losses.

use tch::{Kind, Reduction, Tensor};

/// Weight of the positive class (focal loss's α).
const ALPHA: f64 = 0.25;

/// Focal loss (Lin et al., equation 5) with α = 0.25 and γ = 2, summed over cells and classes: logits `[n, k, h, w]`,
/// classes `[n, h, w]`, -1 for none.
pub fn focal(logits: &Tensor, classes: &Tensor) -> Tensor {
    let positive = classes.ge(0).unsqueeze(1);
    let hot = classes.clamp_min(0).one_hot(logits.size()[1]).permute([0, 3, 1, 2]);
    let hot = (hot * positive).to_kind(logits.kind());
    let entropy = logits.binary_cross_entropy_with_logits(
        &hot,
        None::<&Tensor>,
        None::<&Tensor>,
        Reduction::None,
    );
    let score = logits.sigmoid();
    // 1 - p of the class that is right.
    let miss = &score + &hot - &score * &hot * 2.0;
    let weight = &hot * (2.0 * ALPHA - 1.0) + (1.0 - ALPHA);
    (weight * miss.square() * entropy).sum(None)
}

/// Generalised intersection over union of boxes that are given by the distances of their sides from a common point:
/// `[n, 4, …]` each (left, top, right, bottom), `[n, …]`.
pub fn giou(ours: &Tensor, theirs: &Tensor) -> Tensor {
    let side = |of: &Tensor, side: i64| of.select(1, side);
    let both = |of: &Tensor| {
        [side(of, 0) + side(of, 2), side(of, 1) + side(of, 3)] // width, height
    };
    let area = |of: &Tensor| {
        let [width, height] = both(of);
        width * height
    };
    let [shared, around] = [ours.minimum(theirs), ours.maximum(theirs)].map(|of| area(&of));
    let union = area(ours) + area(theirs) - &shared;
    shared / &union - (&around - &union) / &around
}

/// Focal loss and 1 - GIoU of the cells that have a class, each divided by the number of those cells (at least 1).
pub fn loss(logits: &Tensor, distances: &Tensor, classes: &Tensor, targets: &Tensor) -> Tensor {
    let positive = classes.ge(0).to_kind(Kind::Float);
    let count = positive.sum(None).clamp_min(1.0);
    let apart: Tensor = (1.0 - giou(distances, targets)) * &positive;
    let apart = apart.sum(None);
    (focal(logits, classes) + apart) / count
}
