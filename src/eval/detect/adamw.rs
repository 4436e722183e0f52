//! AdamW (Loshchilov & Hutter, ICLR 2019), with the arithmetic of `torch.optim.AdamW`.

use tch::Tensor;

use crate::shim::{ShimError, step as shim};

/// torch's.
const BETAS: [f64; 2] = [0.9, 0.999];
/// torch's.
const EPS: f64 = 1e-8;

/// The optimizer and its moments.
#[derive(Debug)]
pub struct AdamW {
    parameters: Vec<Tensor>,
    moments: Vec<[Tensor; 2]>,
    decay: f64,
    steps: i32,
}

impl AdamW {
    /// Moments start at zero. Every parameter is decayed by `decay` times the learning rate a step.
    pub fn new(parameters: impl IntoIterator<Item = Tensor>, decay: f64) -> AdamW {
        let parameters: Vec<Tensor> = parameters.into_iter().collect();
        let zeros = |parameter: &Tensor| [(); 2].map(|()| parameter.detach().zeros_like());
        let moments = parameters.iter().map(zeros).collect();
        AdamW { parameters, moments, decay, steps: 0 }
    }

    /// Forgets the gradients of the last step.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn zero_grad(&mut self) -> Result<(), ShimError> {
        shim::forget_gradients(&self.parameters)
    }

    /// One update by the gradients of the last backward pass. A parameter without one is left as it is.
    pub fn step(&mut self, lr: f64) {
        self.steps += 1;
        let [first, second] = BETAS.map(|beta| 1.0 - beta.powi(self.steps));
        tch::no_grad(|| {
            for (parameter, [mean, square]) in self.parameters.iter_mut().zip(&mut self.moments) {
                let gradient = parameter.grad();
                if !gradient.defined() {
                    continue;
                }
                let _ = parameter.g_mul_scalar_(1.0 - lr * self.decay);
                let _ = mean.lerp_(&gradient, 1.0 - BETAS[0]);
                let _ = square.g_mul_scalar_(BETAS[1]);
                let _ = square.addcmul_(&gradient, &(&gradient * (1.0 - BETAS[1])));
                let root = square.sqrt() / second.sqrt() + EPS;
                let _ = parameter.g_sub_(&(&*mean / root * (lr / first)));
            }
        });
    }
}
