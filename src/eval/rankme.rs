//! RankMe: how many dimensions features really use (Garrido et al., "RankMe", ICML 2023, section 3, eq. 1 to 3).

use tch::{Kind, Tensor};

use crate::shim::ShimError;

/// The paper's constant beside each share.
const EPSILON: f64 = 1e-7;

/// The exponential of the entropy of the singular values of rows `[n, d]`, each divided by their sum: 1 where all rows
/// are multiples of one, min(n, d) where all directions are used alike. Needs no labels. Float64; it is made from the
/// d x d products of columns, so singular values below 1e-8 of the largest count as none.
///
/// # Errors
/// When libtorch fails, as where memory ends or a row is not finite.
pub fn rankme(rows: &Tensor) -> Result<f64, ShimError> {
    let d = rows.size()[1];
    let mut products = Tensor::f_zeros([d, d], (Kind::Double, rows.device()))?;
    for block in rows.f_split(8192, 0)? {
        let block = block.f_to_kind(Kind::Double)?;
        products = products.f_add(&block.f_transpose(0, 1)?.f_matmul(&block)?)?;
    }
    let squares = Vec::<f64>::try_from(products.f_linalg_eigvalsh("L")?)?;
    let largest = squares.iter().copied().fold(0.0, f64::max);
    let used = squares.into_iter().filter(|square| *square > 1e-16 * largest);
    let values: Vec<f64> = used.map(f64::sqrt).collect();
    let sum: f64 = values.iter().sum();
    let entropy = |value: &f64| {
        let share = value / sum + EPSILON;
        -share * share.ln()
    };
    Ok(values.iter().map(entropy).sum::<f64>().exp())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::kind::FLOAT_CPU;

    #[test]
    fn it_counts_directions() {
        let one = Tensor::randn([50, 1], FLOAT_CPU).matmul(&Tensor::randn([1, 8], FLOAT_CPU));
        assert!((rankme(&one).unwrap() - 1.0).abs() < 1e-4);
        let all = Tensor::eye(16, FLOAT_CPU) * 3.0;
        assert!((rankme(&all).unwrap() - 16.0).abs() < 1e-3);
        let half = all.narrow(0, 0, 8);
        assert!((rankme(&half).unwrap() - 8.0).abs() < 1e-3);
    }

    #[test]
    fn it_is_the_formula_on_libtorchs_singular_values() {
        let rows =
            Tensor::randn([300, 24], FLOAT_CPU) * Tensor::arange(24, FLOAT_CPU).exp2().reciprocal();
        let (_, values, _) = rows.to_kind(Kind::Double).svd(true, true);
        let values: Vec<f64> = Vec::try_from(values).unwrap_or_default();
        let sum: f64 = values.iter().sum();
        let shares = values.iter().map(|value| value / sum + EPSILON);
        let expected = shares.map(|share| -share * share.ln()).sum::<f64>().exp();
        let found = rankme(&rows).unwrap();
        assert!((found - expected).abs() < 1e-6 * expected, "{found}, expected {expected}");
    }
}
