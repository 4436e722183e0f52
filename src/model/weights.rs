//! Named tensors and their first values.
//!
//! Never touches libtorch's generator: its state is global, so another thread could change a run.
//! Every tensor is drawn from the run's seed and its own name.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use crate::draws::Draws;

/// First value of a tensor; the rules of torchvision's ResNet and torch's `nn.Linear`.
#[derive(Clone, Copy, Debug)]
pub(super) enum Init {
    /// N(0, 2 / (out * kh * kw)): He et al., 2015, fan out.
    Convolution,
    /// U(±1/sqrt(`fan_in`)): weight and bias of `nn.Linear`.
    Linear { fan_in: i64 },
    /// One value everywhere.
    Constant(f64),
    /// A counter of type int64.
    Zero,
}

#[derive(Debug)]
enum Source<'a> {
    Draw(u64),
    Copy(&'a HashMap<String, Tensor>),
}

/// Collects the tensors of an encoder while its layers are made.
#[derive(Debug)]
pub(super) struct Builder<'a> {
    source: Source<'a>,
    device: Device,
    /// Trained tensors, in order of creation.
    pub(super) parameters: Vec<(String, Tensor)>,
    /// The others.
    pub(super) buffers: Vec<(String, Tensor)>,
    /// Batch normalisations so far.
    pub(super) norms: usize,
}

impl<'a> Builder<'a> {
    /// Draws, for an encoder that is trained by gradient.
    pub(super) fn draw(seed: u64, device: Device) -> Builder<'a> {
        Builder::new(Source::Draw(seed), device)
    }

    /// Copies, for an encoder without gradients.
    pub(super) fn copy(from: &'a HashMap<String, Tensor>, device: Device) -> Builder<'a> {
        Builder::new(Source::Copy(from), device)
    }

    fn new(source: Source<'a>, device: Device) -> Builder<'a> {
        Builder { source, device, parameters: Vec::new(), buffers: Vec::new(), norms: 0 }
    }

    pub(super) fn parameter(&mut self, name: String, shape: &[i64], init: Init) -> Tensor {
        let trained = matches!(self.source, Source::Draw(_));
        let tensor = self.tensor(&name, shape, init).set_requires_grad(trained);
        self.parameters.push((name, tensor.shallow_clone()));
        tensor
    }

    pub(super) fn buffer(&mut self, name: String, shape: &[i64], init: Init) -> Tensor {
        let tensor = self.tensor(&name, shape, init);
        self.buffers.push((name, tensor.shallow_clone()));
        tensor
    }

    fn tensor(&self, name: &str, shape: &[i64], init: Init) -> Tensor {
        let seed = match self.source {
            Source::Draw(seed) => seed,
            Source::Copy(from) => return from[name].detach().copy(),
        };
        let float = (Kind::Float, Device::Cpu);
        let value = match init {
            Init::Convolution => {
                let fan_out = shape[0] * shape[2..].iter().product::<i64>();
                Draws::new(seed, name, 0).normal(shape, (2.0 / fan_out as f64).sqrt())
            }
            Init::Linear { fan_in } => {
                Draws::new(seed, name, 0).uniform(shape, 1.0 / (fan_in as f64).sqrt())
            }
            Init::Constant(value) => Tensor::full(shape, value, float),
            Init::Zero => Tensor::zeros(shape, (Kind::Int64, Device::Cpu)),
        };
        value.to_device(self.device)
    }
}
