//! SGD with momentum and weight decay, LARS, and their state.
//!
//! The arithmetic of `torch.optim.SGD` without dampening: `d = grad + decay * p`,
//! `buffer = momentum * buffer + d`, `p = p - lr * buffer`; with Nesterov's momentum
//! `p = p - lr * (d + momentum * buffer)`. LARS (You et al., 2017) multiplies each tensor's `d` by
//! `trust * |p| / |d|` before it enters the buffer, as BYOL's code does.

use tch::Tensor;

use crate::config::{Optim, Optimizer};
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
    nesterov: bool,
    /// Whether vectors are decayed and adapted as matrices are.
    with_vectors: bool,
    /// LARS's coefficient.
    trust: Option<f64>,
}

impl Sgd {
    /// As a configuration has it.
    pub fn of(parameters: Vec<(String, Tensor)>, optim: &Optim) -> Sgd {
        let sgd = Sgd::new(parameters, optim.momentum, optim.weight_decay);
        let trust = (optim.optimizer == Optimizer::Lars).then_some(optim.trust);
        Sgd { nesterov: optim.nesterov, with_vectors: optim.decay_vectors, trust, ..sgd }
    }

    /// Momentum buffers start at zero, which makes the first step the plain gradient, as torch's.
    pub fn new(parameters: Vec<(String, Tensor)>, momentum: f64, weight_decay: f64) -> Sgd {
        let buffers = parameters.iter().map(|(_, p)| p.detach().zeros_like()).collect();
        let (nesterov, with_vectors, trust) = (false, true, None);
        Sgd { parameters, buffers, momentum, weight_decay, nesterov, with_vectors, trust }
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

    /// Forgets the gradients of the parameters with such names: the next update leaves these alone.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn forget(&mut self, such: impl Fn(&str) -> bool) -> Result<(), ShimError> {
        let named = self.parameters.iter().filter(|(name, _)| such(name));
        shim::forget_gradients(&named.map(|(_, p)| p.shallow_clone()).collect::<Vec<_>>())
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
        let all = self.parameters.iter().zip(&self.buffers);
        let found = all.map(|((_, parameter), buffer)| (parameter, parameter.grad(), buffer));
        let found = found.filter(|(_, gradient, _)| gradient.defined());
        // Those that are decayed and adapted, and those that are not.
        let (whole, bare): (Vec<_>, Vec<_>) =
            found.partition(|(parameter, ..)| self.with_vectors || parameter.dim() > 1);
        for (group, is_whole) in [(whole, true), (bare, false)] {
            let (mut parameters, mut gradients, mut buffers) = (Vec::new(), Vec::new(), Vec::new());
            for (parameter, gradient, buffer) in group {
                gradients.push(match self.trust.filter(|_| is_whole) {
                    Some(trust) => adapted(parameter, &gradient, self.weight_decay, trust),
                    None => gradient,
                });
                parameters.push(parameter.shallow_clone());
                buffers.push(buffer.shallow_clone());
            }
            let is_decayed = is_whole && self.trust.is_none();
            let decay = if is_decayed { self.weight_decay } else { 0.0 };
            let (momentum, nesterov) = (self.momentum, self.nesterov);
            let rates = Rates { decay, momentum, learning: lr, nesterov };
            shim::sgd(&parameters, &gradients, &buffers, rates, skip)?;
        }
        Ok(())
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

/// LARS's gradient of a tensor: decayed, and scaled to a share of the tensor's length. Where one of both lengths is
/// zero, it is not scaled. Nothing waits for the device.
fn adapted(parameter: &Tensor, gradient: &Tensor, decay: f64, trust: f64) -> Tensor {
    tch::no_grad(|| {
        let gradient = gradient + parameter * decay;
        let (ours, theirs) = (parameter.norm(), gradient.norm());
        let both = (&ours * &theirs).gt(0.0);
        let ratio = (&ours * trust / theirs).where_self(&both, &ours.ones_like());
        gradient * ratio
    })
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::config::Config;

    /// Two steps of a matrix, a vector and a matrix of zeros, by hand.
    #[test]
    fn lars_scales_matrices_and_leaves_vectors_alone() {
        let of = (Kind::Double, Device::Cpu);
        let leaf = |values: &[f64], shape: &[i64]| {
            Tensor::from_slice(values).view(shape).set_requires_grad(true)
        };
        let (matrix, vector) = (leaf(&[3.0, 0.0, 0.0, 4.0], &[2, 2]), leaf(&[1.0, 2.0], &[2]));
        let zeros = Tensor::zeros([2, 2], of).set_requires_grad(true);
        let named = [("m", &matrix), ("v", &vector), ("z", &zeros)];
        let named = named.map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone()));
        let config = Config::load("simclr-r50", &["optim.weight_decay=0.5".into()]).unwrap();
        let mut sgd = Sgd::of(named.into(), &config.optim);
        let gradient = |values: &[f64], shape: &[i64]| Tensor::from_slice(values).view(shape);
        let (g, gv) = (gradient(&[0.0, 6.0, 8.0, 0.0], &[2, 2]), gradient(&[0.5, -0.5], &[2]));
        let (mut m, mut v, mut z) =
            (matrix.detach().copy(), vector.detach().copy(), zeros.detach().copy());
        let (mut bm, mut bv, mut bz) = (m.zeros_like(), v.zeros_like(), z.zeros_like());
        let length = |t: &Tensor| t.square().sum(None).sqrt().double_value(&[]);
        for lr in [0.1, 0.05] {
            sgd.zero_grad().unwrap();
            ((&matrix * &g).sum(None) + (&vector * &gv).sum(None) + zeros.sum(None)).backward();
            sgd.step(lr, None).unwrap();
            let d = &g + &m * 0.5;
            bm = &bm * 0.9 + &d * (0.001 * length(&m) / length(&d));
            bv = &bv * 0.9 + &gv;
            let d = z.ones_like() + &z * 0.5;
            let ratio = if length(&z) > 0.0 { 0.001 * length(&z) / length(&d) } else { 1.0 };
            bz = &bz * 0.9 + d * ratio;
            (m, v, z) = (&m - &bm * lr, &v - &bv * lr, &z - &bz * lr);
            for (found, expected) in [(&matrix, &m), (&vector, &v), (&zeros, &z)] {
                let off = (found.detach() - expected).abs().max().double_value(&[]);
                assert!(off < 1e-12, "{off:e}");
            }
        }
    }

    #[test]
    fn nesterov_looks_ahead_and_vectors_may_keep_their_length() {
        let sets = ["optim.nesterov=true", "optim.decay_vectors=false", "optim.weight_decay=0.5"];
        let config = Config::load("detco-r50", &sets.map(String::from)).unwrap();
        let leaf = |shape: &[i64]| {
            Tensor::ones(shape, (Kind::Double, Device::Cpu)).set_requires_grad(true)
        };
        let (matrix, vector) = (leaf(&[1, 1]), leaf(&[1]));
        let named = vec![
            ("m".to_owned(), matrix.shallow_clone()),
            ("v".to_owned(), vector.shallow_clone()),
        ];
        let mut sgd = Sgd::of(named, &config.optim);
        (&matrix.sum(None) * 2.0 + &vector.sum(None) * 2.0).backward();
        sgd.step(0.1, None).unwrap();
        // d = 2 + 0.5, buffer = d, p - lr (d + 0.9 d); without decay d = 2.
        let value = |t: &Tensor| t.sum(None).double_value(&[]);
        assert!((value(&matrix) - (1.0 - 0.1 * 2.5 * 1.9)).abs() < 1e-12);
        assert!((value(&vector) - (1.0 - 0.1 * 2.0 * 1.9)).abs() < 1e-12);
    }
}
