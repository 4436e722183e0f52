//! SGD with momentum and weight decay, and its state.
//!
//! The arithmetic of `torch.optim.SGD` without Nesterov or dampening:
//! `d = grad + decay * p`, `buffer = momentum * buffer + d`, `p = p - lr * buffer`.

use tch::Tensor;

use crate::model::{self, ModelError};

/// SGD over named parameters.
#[derive(Debug)]
pub struct Sgd {
    parameters: Vec<(String, Tensor)>,
    buffers: Vec<Tensor>,
    momentum: f64,
    weight_decay: f64,
}

impl Sgd {
    /// Momentum buffers start at zero, which makes the first step the plain gradient, as torch's.
    pub fn new(parameters: Vec<(String, Tensor)>, momentum: f64, weight_decay: f64) -> Sgd {
        let buffers = parameters.iter().map(|(_, p)| p.detach().zeros_like()).collect();
        Sgd { parameters, buffers, momentum, weight_decay }
    }

    /// Forgets the gradients of the last step.
    pub fn zero_grad(&mut self) {
        self.parameters.iter_mut().for_each(|(_, parameter)| parameter.zero_grad());
    }

    /// Gradients of the last backward pass, sharing memory with the parameters' own. A parameter
    /// that took no part has none.
    pub fn gradients(&self) -> Vec<Tensor> {
        self.parameters.iter().map(|(_, p)| p.grad()).filter(Tensor::defined).collect()
    }

    /// Euclidean length of all gradients together, a scalar.
    pub fn gradient_norm(&self) -> Tensor {
        let norms: Vec<Tensor> = self.gradients().iter().map(Tensor::norm).collect();
        Tensor::stack(&norms, 0).norm()
    }

    /// One update. Gradients are left as they are; parameters without one are not touched, nor
    /// decayed.
    pub fn step(&mut self, lr: f64) {
        tch::no_grad(|| {
            for ((_, parameter), buffer) in self.parameters.iter_mut().zip(&mut self.buffers) {
                let grad = parameter.grad();
                if !grad.defined() {
                    continue;
                }
                // addcmul is libtorch's one-pass `a + b * c`; the scalars ride along as tensors.
                let scalar = |value: f64| {
                    Tensor::from(value).to_kind(parameter.kind()).to_device(parameter.device())
                };
                let (decay, minus_lr) = (scalar(self.weight_decay), scalar(-lr));
                let d = grad.addcmul(parameter, &decay);
                let _ = buffer.g_mul_scalar_(self.momentum).g_add_(&d);
                let _ = parameter.addcmul_(buffer, &minus_lr);
            }
        });
    }

    /// Momentum buffers under their parameters' names, sharing memory with the optimizer's.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let named = self.parameters.iter().zip(&self.buffers);
        named.map(|((name, _), buffer)| (name.clone(), buffer.shallow_clone())).collect()
    }

    /// Takes over the buffers of another run.
    ///
    /// # Errors
    /// When a buffer is missing, unexpected, there twice, or of another shape or type.
    pub fn load(&mut self, tensors: &[(String, Tensor)]) -> Result<(), ModelError> {
        let own = self.tensors();
        model::copy_all(&own, &model::check(&own, tensors)?);
        Ok(())
    }
}
