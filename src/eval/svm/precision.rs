//! Average precision of decision values, by two definitions.

use crate::eval::ap::Year;

/// As scikit-learn's `average_precision_score` has it: the sum over thresholds of the recall gained there times the
/// precision. Samples of equal value come in together. None without a positive sample.
pub fn step_sum(values: &[f64], is_positive: &[bool]) -> Option<f64> {
    let order = falling(values);
    let positives = is_positive.iter().filter(|one| **one).count();
    let (mut seen, mut right, mut sum) = (0_usize, 0_usize, 0.0);
    for group in order.chunk_by(|a, b| values[*a] == values[*b]) {
        let gained = group.iter().filter(|at| is_positive[**at]).count();
        seen += group.len();
        right += gained;
        sum += gained as f64 * right as f64 / seen as f64;
    }
    (positives > 0).then(|| sum / positives as f64)
}

/// As PASCAL VOC has it from 2010 on: the area below the curve of precision over recall, made monotone from the
/// right. Of samples of equal value the first comes first. None without a positive sample.
pub fn interpolated(values: &[f64], is_positive: &[bool]) -> Option<f64> {
    let positives = is_positive.iter().filter(|one| **one).count();
    let mut right = 0.0;
    let point = |(seen, at): (usize, usize)| {
        right += f64::from(u8::from(is_positive[at]));
        (right / positives as f64, right / (seen + 1) as f64)
    };
    let curve: Vec<(f64, f64)> = falling(values).into_iter().enumerate().map(point).collect();
    (positives > 0).then(|| Year::Voc10.average(&curve))
}

/// Positions in the order of falling values; equal ones stay in order.
fn falling(values: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    // -0 is 0.
    order.sort_by(|a, b| (values[*b] + 0.0).total_cmp(&(values[*a] + 0.0)));
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_definitions_differ() {
        let is_positive = [false, true, true, false, true];
        let values = [0.9, 0.8, 0.7, 0.2, 0.1];
        // Precisions at the positives: 1/2, 2/3, 3/5.
        let step = step_sum(&values, &is_positive).unwrap();
        assert!((step - (1.0 / 2.0 + 2.0 / 3.0 + 3.0 / 5.0) / 3.0).abs() < 1e-12, "{step}");
        let area = interpolated(&values, &is_positive).unwrap();
        assert!((area - (2.0 / 3.0 + 2.0 / 3.0 + 3.0 / 5.0) / 3.0).abs() < 1e-12, "{area}");
        // All equal: one threshold, and the order of samples.
        assert_eq!(step_sum(&[1.0; 5], &is_positive), Some(0.6));
        assert!((interpolated(&[1.0; 5], &is_positive).unwrap() - area).abs() < 1e-12);
        assert_eq!(step_sum(&values, &[false; 5]), None);
        assert_eq!(interpolated(&values, &[false; 5]), None);
    }
}
