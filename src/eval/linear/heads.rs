//! Linear classifiers of one level, one a learning rate, trained side by side on the same rows.
//!
//! All see a row at once, so that a sweep of learning rates costs one pass of the backbone. Their gradient is in closed
//! form: of the mean cross-entropy of logits x W' + b it is (softmax - one-hot)' x / n.

use tch::{Device, Kind, Tensor};

use crate::draws::Draws;
use crate::shim::ShimError;

/// How the heads of a level are trained.
#[derive(Clone, Debug, PartialEq)]
pub struct Training {
    /// Learning rates, one head each, as applied: scaled by the batch already.
    pub rates: Vec<f64>,
    /// SGD's momentum.
    pub momentum: f64,
    /// Whether it is Nesterov's.
    pub nesterov: bool,
    /// Weight decay, of biases too.
    pub weight_decay: f64,
    /// Whether rows are batch-normalised first, without a weight or bias (momentum 0.1, epsilon 1e-5).
    pub norm: bool,
}

/// Linear classifiers `[rates, classes, d]` with biases, their momentum, and the statistics of their rows.
#[derive(Debug)]
pub struct Heads {
    training: Training,
    classes: i64,
    weight: Tensor,
    bias: Tensor,
    momentum_of_weight: Tensor,
    momentum_of_bias: Tensor,
    mean: Tensor,
    variance: Tensor,
}

/// BatchNorm1d's defaults in torch.
const NORM_MOMENTUM: f64 = 0.1;
const NORM_EPSILON: f64 = 1e-5;

impl Heads {
    /// Draws weights from N(0, 0.01²), the same for every rate; biases are 0 (MoCo, `main_lincls.py`). `name` and
    /// `seed` say which draw it is.
    ///
    /// # Errors
    /// When libtorch fails, as where memory ends.
    pub fn draw(
        training: Training,
        (classes, d): (i64, i64),
        (seed, name): (u64, &str),
        (kind, device): (Kind, Device),
    ) -> Result<Heads, ShimError> {
        let rates = training.rates.len() as i64;
        let one = Draws::new(seed, name, 0).normal(&[1, classes, d], 0.01);
        let weight = one.f_to_kind(kind)?.f_to_device(device)?.f_repeat([rates, 1, 1])?;
        let zeros = |shape: &[i64]| Tensor::f_zeros(shape, (kind, device));
        Ok(Heads {
            classes,
            bias: zeros(&[rates, classes])?,
            momentum_of_weight: zeros(&[rates, classes, d])?,
            momentum_of_bias: zeros(&[rates, classes])?,
            mean: zeros(&[d])?,
            variance: Tensor::f_ones([d], (kind, device))?,
            weight,
            training,
        })
    }

    /// Numbers of a row, d.
    pub fn width(&self) -> i64 {
        self.weight.size()[2]
    }

    /// What a run needs to go on: names and tensors.
    pub fn tensors(&self) -> [(&'static str, &Tensor); 6] {
        [
            ("weight", &self.weight),
            ("bias", &self.bias),
            ("momentum.weight", &self.momentum_of_weight),
            ("momentum.bias", &self.momentum_of_bias),
            ("mean", &self.mean),
            ("variance", &self.variance),
        ]
    }

    /// Puts saved tensors in place of its own, in the order of [`Heads::tensors`].
    ///
    /// # Errors
    /// When their shapes are others.
    pub fn restore(&mut self, tensors: &[Tensor; 6]) -> Result<(), ShimError> {
        let own = [
            &mut self.weight,
            &mut self.bias,
            &mut self.momentum_of_weight,
            &mut self.momentum_of_bias,
            &mut self.mean,
            &mut self.variance,
        ];
        for (own, saved) in own.into_iter().zip(tensors) {
            own.f_copy_(saved)?;
        }
        Ok(())
    }

    /// Rows as the classifiers see them. In training the statistics are the batch's, and move the running ones.
    fn normalised(&mut self, rows: &Tensor, is_training: bool) -> Result<Tensor, ShimError> {
        let rows = rows.f_to_kind(self.weight.kind())?;
        if !self.training.norm {
            return Ok(rows);
        }
        let (mean, variance) = if is_training {
            let n = rows.size()[0] as f64;
            let mean = rows.f_mean_dim(&[0_i64][..], false, None)?;
            let variance = rows.f_var_dim(&[0_i64][..], false, false)?;
            let unbiased = variance.f_mul_scalar(n / (n - 1.0).max(1.0))?;
            let _ = self.mean.f_lerp_(&mean, NORM_MOMENTUM)?;
            let _ = self.variance.f_lerp_(&unbiased, NORM_MOMENTUM)?;
            (mean, variance)
        } else {
            (self.mean.shallow_clone(), self.variance.shallow_clone())
        };
        let scale = variance.f_add_scalar(NORM_EPSILON)?.f_rsqrt()?;
        Ok(rows.f_sub(&mean)?.f_mul(&scale)?)
    }

    /// Logits `[n, rates, classes]` of rows as the classifiers see them.
    fn logits_of(&self, rows: &Tensor) -> Result<Tensor, ShimError> {
        let flat = self.weight.f_flatten(0, 1)?;
        let logits = rows.f_matmul(&flat.f_transpose(0, 1)?)?.f_add(&self.bias.f_flatten(0, 1)?)?;
        Ok(logits.f_view([rows.size()[0], self.training.rates.len() as i64, self.classes])?)
    }

    /// Logits `[n, rates, classes]` of rows `[n, d]`, with running statistics.
    ///
    /// # Errors
    /// When libtorch fails, as where memory ends.
    pub fn logits(&mut self, rows: &Tensor) -> Result<Tensor, ShimError> {
        let rows = self.normalised(rows, false)?;
        self.logits_of(&rows)
    }

    /// One update of each head on rows `[n, d]` of these classes `[n]`, with its rate times `factor`. Returns each
    /// head's mean cross-entropy before it.
    ///
    /// # Errors
    /// When libtorch fails, as where memory ends.
    pub fn step(
        &mut self,
        rows: &Tensor,
        classes: &Tensor,
        factor: f64,
    ) -> Result<Vec<f64>, ShimError> {
        let rows = self.normalised(rows, true)?;
        let n = rows.size()[0];
        let log_p = self.logits_of(&rows)?.f_log_softmax(2, None)?;
        let rates = self.training.rates.len() as i64;
        let at = classes.f_view([n, 1, 1])?.f_expand([n, rates, 1], false)?;
        let losses =
            log_p.f_gather(2, &at, false)?.f_mean_dim(&[0_i64, 2][..], false, None)?.f_neg()?;
        let ones = Tensor::f_full([n, rates, 1], -1.0, (log_p.kind(), log_p.device()))?;
        let gradient = log_p.f_exp()?.f_scatter_add(2, &at, &ones)?.f_div_scalar(n as f64)?;
        let gradient = gradient.f_flatten(1, 2)?; // [n, rates * classes]
        let of_weight = gradient.f_transpose(0, 1)?.f_matmul(&rows)?.f_view_as(&self.weight)?;
        let of_bias = gradient.f_sum_dim_intlist(0, false, None)?.f_view_as(&self.bias)?;
        let Training { momentum, nesterov, weight_decay, .. } = self.training;
        let applied: Vec<f64> = self.training.rates.iter().map(|rate| rate * factor).collect();
        let applied =
            Tensor::from_slice(&applied).f_to_kind(log_p.kind())?.f_to_device(log_p.device())?;
        let all = [
            (
                &mut self.weight,
                &mut self.momentum_of_weight,
                of_weight,
                applied.f_view([-1, 1, 1])?,
            ),
            (&mut self.bias, &mut self.momentum_of_bias, of_bias, applied.f_view([-1, 1])?),
        ];
        for (value, buffer, gradient, rate) in all {
            let gradient = gradient.f_add(&value.f_mul_scalar(weight_decay)?)?;
            // torch's SGD begins with the first gradient itself, which from a buffer of zeros is the same.
            let _ = buffer.f_mul_scalar_(momentum)?.f_add_(&gradient)?;
            let moved = match nesterov {
                true => gradient.f_add(&buffer.f_mul_scalar(momentum)?)?,
                false => buffer.shallow_clone(),
            };
            let moved = moved.f_mul(&rate)?;
            let _ = value.f_sub_(&moved)?;
        }
        Ok(Vec::<f64>::try_from(losses.f_to_kind(Kind::Double)?)?)
    }
}
