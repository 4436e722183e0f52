//! Stratified folds, as scikit-learn's `StratifiedKFold` makes them without shuffling.

use super::SvmError;

/// The fold that each sample is held out in, of samples told apart by `is_positive`: each fold has its share of
/// both kinds, and of each kind the folds follow the order of samples.
///
/// Of counts that folds do not divide, scikit-learn deals the rest by sorting all samples by kind, the kind of the
/// first sample first, and counting every `folds`-th of them from the fold's number on.
///
/// # Errors
/// [`SvmError::Folds`] with fewer of a kind than folds.
pub fn stratified(is_positive: &[bool], folds: usize) -> Result<Vec<usize>, SvmError> {
    let positives = is_positive.iter().filter(|one| **one).count();
    let negatives = is_positive.len() - positives;
    if folds < 2 || positives < folds || negatives < folds {
        return Err(SvmError::Folds { folds, positives, negatives });
    }
    let first = is_positive.first().copied().unwrap_or(false);
    let firsts = if first { positives } else { negatives };
    // Positions fold, fold + folds, … of the sorted samples; those below `firsts` are of the first kind.
    let below = |end: usize, fold: usize| (end + folds - 1 - fold) / folds;
    let share = |fold: usize| {
        let of_first = below(firsts, fold);
        [of_first, below(is_positive.len(), fold) - of_first]
    };
    let dealt: [Vec<usize>; 2] = std::array::from_fn(|kind| {
        (0..folds).flat_map(|fold| std::iter::repeat_n(fold, share(fold)[kind])).collect()
    });
    let mut taken = [0, 0];
    let fold_of = |one: &bool| {
        let kind = usize::from(*one != first);
        taken[kind] += 1;
        dealt[kind][taken[kind] - 1]
    };
    Ok(is_positive.iter().map(fold_of).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folds_are_scikit_learns() {
        // StratifiedKFold(3) of scikit-learn 1.9.1.
        let of = |text: &str| {
            let samples: Vec<bool> = text.bytes().map(|byte| byte == b'1').collect();
            stratified(&samples, 3).unwrap()
        };
        assert_eq!(of("1010100"), [0, 0, 1, 0, 2, 1, 2]);
        assert_eq!(of("0001111000"), [0, 0, 1, 0, 0, 1, 2, 1, 2, 2]);
        assert_eq!(of("01101100100"), [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]);
    }

    #[test]
    fn too_few_of_a_kind_are_an_error() {
        let error = stratified(&[true, true, false, false, false], 3).unwrap_err();
        assert!(error.to_string().contains("2 with the class"), "{error}");
        assert!(stratified(&[], 3).is_err());
    }
}
