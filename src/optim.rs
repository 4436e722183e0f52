//! SGD with momentum and weight decay, and its state.
//!
//! The arithmetic of `torch.optim.SGD` without Nesterov or dampening:
//! `d = grad + decay * p`, `buffer = momentum * buffer + d`, `p = p - lr * buffer`.

use tch::Tensor;

use crate::model::{self, ModelError};
use crate::shim::ShimError;
use crate::shim::step::{self as shim, Rates};

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

    /// Forgets the gradients of the last step: the next backward pass makes new ones, which costs
    /// nothing, where zeros would have to be written and added to.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn zero_grad(&mut self) -> Result<(), ShimError> {
        let tensors: Vec<Tensor> = self.parameters.iter().map(|(_, p)| p.shallow_clone()).collect();
        shim::forget_gradients(&tensors)
    }

    /// Gradients of the last backward pass, sharing memory with the parameters' own. A parameter
    /// that took no part has none.
    pub fn gradients(&self) -> Vec<Tensor> {
        self.parameters.iter().map(|(_, p)| p.grad()).filter(Tensor::defined).collect()
    }

    /// Euclidean length of all gradients together, a scalar.
    ///
    /// # Errors
    /// When there is none.
    pub fn gradient_norm(&self) -> Result<Tensor, ShimError> {
        shim::length(&self.gradients())
    }

    /// One update. Gradients are left as they are; parameters without one are not touched, nor
    /// decayed. Where `skip`, one float on the parameters' device, is 1, nothing changes: whether to
    /// skip is decided on the device, and the host need not wait for it.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn step(&mut self, lr: f64, skip: Option<&Tensor>) -> Result<(), ShimError> {
        let (mut parameters, mut gradients, mut buffers) = (Vec::new(), Vec::new(), Vec::new());
        for ((_, parameter), buffer) in self.parameters.iter().zip(&self.buffers) {
            let gradient = parameter.grad();
            if gradient.defined() {
                parameters.push(parameter.shallow_clone());
                gradients.push(gradient);
                buffers.push(buffer.shallow_clone());
            }
        }
        let rates = Rates { decay: self.weight_decay, momentum: self.momentum, learning: lr };
        shim::sgd(&parameters, &gradients, &buffers, rates, skip)
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
