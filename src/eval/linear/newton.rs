//! Multinomial logistic regression to its minimum, by Newton's method with conjugate gradients.
//!
//! The objective is scikit-learn's (`LogisticRegression`, l2): the mean cross-entropy plus |W|²/(2 C n), where the
//! biases are free. It is convex, and strictly so in W; the solver ends where its gradient is small. Float64 throughout:
//! rows are widened block by block.

use tch::{Device, Kind, Tensor};

use crate::shim::ShimError;

/// Rows that are widened together.
const BLOCK: i64 = 8192;
/// Steps of conjugate gradients within one of Newton's.
const INNER_MAX: usize = 200;

/// Rows and classes to fit.
#[derive(Debug)]
pub struct Problem<'a> {
    /// `[n, d]`, any floating type.
    pub rows: &'a Tensor,
    /// `[n]`, int64 below `count`.
    pub classes: &'a Tensor,
    /// Number of classes.
    pub count: i64,
    /// scikit-learn's C: the larger, the weaker the penalty.
    pub cost: f64,
}

/// When to end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Until {
    /// The largest element of the gradient, of the mean objective.
    pub gradient: f64,
    /// Newton steps at most.
    pub steps: usize,
}

/// A fitted classifier.
#[derive(Debug)]
pub struct Fitted {
    /// `[count, d + 1]`, float64: weights, and the bias last.
    pub theta: Tensor,
    /// The objective there.
    pub objective: f64,
    /// The largest element of its gradient.
    pub gradient: f64,
    /// Newton steps taken.
    pub steps: usize,
}

/// The objective's value, gradient and what its curvature needs.
struct Place {
    objective: f64,
    gradient: Tensor,
    probabilities: Vec<Tensor>,
}

impl Problem<'_> {
    fn options(&self) -> (Kind, Device) {
        (Kind::Double, self.rows.device())
    }

    fn n(&self) -> f64 {
        self.rows.size()[0] as f64
    }

    /// λ of λ/2 |W|² beside the mean cross-entropy.
    fn penalty(&self) -> f64 {
        1.0 / (self.cost * self.n())
    }

    /// Blocks of rows with a column of ones, `[m, d + 1]`, and where each begins.
    fn blocks(&self) -> Result<impl Iterator<Item = Result<(i64, Tensor), ShimError>>, ShimError> {
        let (n, options) = (self.rows.size()[0], self.options());
        let starts = (0..n).step_by(BLOCK as usize);
        Ok(starts.map(move |start| {
            let m = BLOCK.min(n - start);
            let rows = self.rows.f_narrow(0, start, m)?.f_to_kind(Kind::Double)?;
            let ones = Tensor::f_ones([m, 1], options)?;
            Ok((start, Tensor::f_cat(&[rows, ones], 1)?))
        }))
    }

    /// Theta with its biases as zeros: what is penalised.
    fn penalised(theta: &Tensor) -> Result<Tensor, ShimError> {
        let copy = theta.f_detach_copy()?;
        let _ = copy.f_narrow(1, copy.size()[1] - 1, 1)?.f_zero_()?;
        Ok(copy)
    }

    fn objective(&self, theta: &Tensor) -> Result<f64, ShimError> {
        let mut sum = 0.0;
        for block in self.blocks()? {
            let (start, rows) = block?;
            let classes = self.classes.f_narrow(0, start, rows.size()[0])?.f_unsqueeze(1)?;
            let log_p = rows.f_matmul(&theta.f_transpose(0, 1)?)?.f_log_softmax(1, None)?;
            sum -= f64::try_from(log_p.f_gather(1, &classes, false)?.f_sum(None)?)?;
        }
        let weights = Problem::penalised(theta)?;
        let square = f64::try_from(weights.f_mul(&weights)?.f_sum(None)?)?;
        Ok(sum / self.n() + 0.5 * self.penalty() * square)
    }

    fn place(&self, theta: &Tensor) -> Result<Place, ShimError> {
        let mut gradient = Problem::penalised(theta)?.f_mul_scalar(self.penalty())?;
        let mut probabilities = Vec::new();
        for block in self.blocks()? {
            let (start, rows) = block?;
            let m = rows.size()[0];
            let classes = self.classes.f_narrow(0, start, m)?.f_unsqueeze(1)?;
            let p = rows.f_matmul(&theta.f_transpose(0, 1)?)?.f_softmax(1, None)?;
            let ones = Tensor::f_full([m, 1], -1.0, self.options())?;
            let difference = p.f_scatter_add(1, &classes, &ones)?;
            let of_block = difference.f_transpose(0, 1)?.f_matmul(&rows)?.f_div_scalar(self.n())?;
            gradient = gradient.f_add(&of_block)?;
            probabilities.push(p);
        }
        Ok(Place { objective: self.objective(theta)?, gradient, probabilities })
    }

    /// The curvature along `v`: for each row P (x V') less its mean under P, times x, and the penalty's.
    fn curvature(&self, place: &Place, v: &Tensor) -> Result<Tensor, ShimError> {
        let mut sum = Problem::penalised(v)?.f_mul_scalar(self.penalty())?;
        for (block, p) in self.blocks()?.zip(&place.probabilities) {
            let (_, rows) = block?;
            let weighted = rows.f_matmul(&v.f_transpose(0, 1)?)?.f_mul(p)?;
            let mean = weighted.f_sum_dim_intlist(1, true, None)?;
            let spread = weighted.f_sub(&p.f_mul(&mean)?)?;
            sum = sum.f_add(&spread.f_transpose(0, 1)?.f_matmul(&rows)?.f_div_scalar(self.n())?)?;
        }
        Ok(sum)
    }

    /// Newton's direction by conjugate gradients, to a part of the gradient that shrinks with it.
    fn direction(&self, place: &Place) -> Result<Tensor, ShimError> {
        let length = |t: &Tensor| -> Result<f64, ShimError> { Ok(f64::try_from(t.f_norm()?)?) };
        let goal = length(&place.gradient)?;
        let goal = goal * goal.sqrt().min(0.5);
        let mut x = place.gradient.f_zeros_like()?;
        let mut residual = place.gradient.f_neg()?;
        let mut along = residual.f_detach_copy()?;
        let mut square = length(&residual)?.powi(2);
        for _ in 0..INNER_MAX {
            let curved = self.curvature(place, &along)?;
            let bend = f64::try_from(along.f_mul(&curved)?.f_sum(None)?)?;
            // Along the biases' common shift the objective is flat.
            if bend <= f64::EPSILON * square {
                break;
            }
            let step = square / bend;
            x = x.f_add(&along.f_mul_scalar(step)?)?;
            residual = residual.f_sub(&curved.f_mul_scalar(step)?)?;
            let before = std::mem::replace(&mut square, length(&residual)?.powi(2));
            if square.sqrt() <= goal {
                break;
            }
            along = residual.f_add(&along.f_mul_scalar(square / before)?)?;
        }
        Ok(x)
    }

    /// Fits, from `start` or from zeros.
    ///
    /// # Errors
    /// When libtorch fails, as where memory ends.
    pub fn fit(&self, start: Option<&Tensor>, until: Until) -> Result<Fitted, ShimError> {
        let d = self.rows.size()[1];
        let mut theta = match start {
            Some(start) => start.f_detach_copy()?,
            None => Tensor::f_zeros([self.count, d + 1], self.options())?,
        };
        let mut steps = 0;
        loop {
            let place = self.place(&theta)?;
            let gradient = f64::try_from(place.gradient.f_abs()?.f_max()?)?;
            let done = |theta| Fitted { theta, objective: place.objective, gradient, steps };
            if gradient <= until.gradient || steps >= until.steps {
                return Ok(done(theta));
            }
            let direction = self.direction(&place)?;
            let slope = f64::try_from(place.gradient.f_mul(&direction)?.f_sum(None)?)?;
            // Armijo's rule. Where rounding hides any descent this is the minimum, as far as float64 knows it.
            let mut size = 1.0;
            let moved = loop {
                let moved = theta.f_add(&direction.f_mul_scalar(size)?)?;
                if self.objective(&moved)? <= place.objective + 1e-4 * size * slope {
                    break Some(moved);
                }
                size *= 0.5;
                if size < 1e-10 {
                    break None;
                }
            };
            match moved {
                Some(moved) => theta = moved,
                None => return Ok(done(theta)),
            }
            steps += 1;
        }
    }
}

impl Fitted {
    /// Logits `[m, count]` of rows `[m, d]`, float64.
    ///
    /// # Errors
    /// When libtorch fails, as where memory ends.
    pub fn logits(&self, rows: &Tensor) -> Result<Tensor, ShimError> {
        let d = self.theta.size()[1] - 1;
        let (weight, bias) = (self.theta.f_narrow(1, 0, d)?, self.theta.f_narrow(1, d, 1)?);
        let rows = rows.f_to_kind(Kind::Double)?;
        Ok(rows.f_matmul(&weight.f_transpose(0, 1)?)?.f_add(&bias.f_transpose(0, 1)?)?)
    }
}
