//! Encoders and queues: backbone, heads, normalisation, negative keys.
//!
//! Pure: tensors in, tensors out. No rank, no clock, no disk, no global random state. A forward
//! pass changes nothing; what batch normalisation saw comes back as [`Moments`], and whoever runs
//! the step decides whether it is kept ([`Encoder::settle`]).

mod encoder;
mod head;
mod norm;
mod resnet;
mod weights;

use std::collections::HashMap;

use tch::{Device, Kind, TchError, Tensor};
use thiserror::Error;

pub use encoder::Encoder;
pub use norm::{Moments, Norms};

use crate::config::Config;
use crate::device;
pub use crate::draws::Draws;
use crate::method::design::{Design, HeadDesign};
use crate::method::parts::queue::{self, Queues};
use crate::shapes;
use crate::shim::ShimError;
use crate::shim::step as shim;

/// Why a model could not be made or filled.
#[derive(Debug, Error)]
pub enum ModelError {
    /// libtorch cannot put tensors there.
    #[error("cannot use the device {device:?}: {source}")]
    Device {
        /// The device that was asked for.
        device: Device,
        /// What libtorch said.
        source: TchError,
    },
    /// More than the system gives.
    #[error(
        "no memory for the model: encoders and queues take {:.1} GB: lower model.width{}{lighter}",
        *bytes as f64 / 1e9, if lighter.is_empty() { "" } else { ", " }
    )]
    Memory {
        /// What it takes.
        bytes: i64,
        /// Keys of the method whose lower values take less.
        lighter: &'static str,
    },
    /// Tensors that the model has and the source does not.
    #[error("{} of {expected} tensors are missing: {}", names.len(), preview(names))]
    Missing {
        /// Their names.
        names: Vec<String>,
        /// How many the model has.
        expected: usize,
    },
    /// Tensors that the source has and the model does not.
    #[error("{} tensors have no place in this model: {}", names.len(), preview(names))]
    Unexpected {
        /// Their names.
        names: Vec<String>,
    },
    /// The same name twice.
    #[error("two tensors are named {name}")]
    Twice {
        /// The name.
        name: String,
    },
    /// A tensor of another shape.
    #[error("{name} has the shape {found:?}, expected {expected:?}")]
    Shape {
        /// Its name.
        name: String,
        /// The model's shape.
        expected: Vec<i64>,
        /// The source's shape.
        found: Vec<i64>,
    },
    /// A tensor of another element type.
    #[error("{name} holds {found:?}, expected {expected:?}")]
    Type {
        /// Its name.
        name: String,
        /// The model's element type.
        expected: Kind,
        /// The source's element type.
        found: Kind,
    },
    /// libtorch failed.
    #[error(transparent)]
    Shim(#[from] ShimError),
    /// A position outside the queue.
    #[error("the queue's pointer is {found}, expected 0 to below {length}")]
    Pointer {
        /// The pointer as found.
        found: i64,
        /// Length of the queues.
        length: i64,
    },
}

/// The first few names, so that an error of 300 names stays readable.
fn preview(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let mut text = names[..names.len().min(SHOWN)].join(", ");
    if names.len() > SHOWN {
        text.push_str(", …");
    }
    text
}

/// The encoder that is trained, the key encoder that follows it and queues, as far as the method has them.
#[derive(Debug)]
pub struct Model {
    /// What the method declares.
    pub design: Design,
    /// Trained by gradient: the student, whose outputs are queries.
    pub query: Encoder,
    /// Starts as a copy of `query` and follows it; never has gradients.
    pub key: Option<Encoder>,
    /// Negative keys of each head.
    pub queues: Queues,
}

impl Model {
    /// Draws weights and queues from `config.seed`; the key encoder is a copy of the query encoder
    /// (MoCo, section 3.2). Every tensor is drawn on the CPU from the seed and its own name, so
    /// device, thread count and order of construction do not matter.
    ///
    /// # Errors
    /// When libtorch cannot use `device`.
    pub fn new(config: &Config, device: Device) -> Result<Model, ModelError> {
        Model::of(config, config.design(), device)
    }

    /// A backbone alone, without heads, for evaluation.
    ///
    /// # Errors
    /// As [`Model::new`].
    pub fn bare(config: &Config, device: Device) -> Result<Model, ModelError> {
        Model::of(config, Design::default(), device)
    }

    fn of(config: &Config, design: Design, device: Device) -> Result<Model, ModelError> {
        let probe = Tensor::zeros([1], (Kind::Float, Device::Cpu));
        // tch's other calls would panic where this one says why.
        drop(probe.f_to_device(device).map_err(|source| ModelError::Device { device, source })?);
        has_room(config, &design, device)?;
        let mut query = Encoder::draw(&config.model, &design, config.seed, device);
        let copy = || Encoder::copy(&config.model, &design.of_teacher(), &query, device);
        let mut key = design.teacher.is_some().then(copy);
        let queues = draw_queues(&design, config.seed, device);
        for encoder in [&mut query].into_iter().chain(&mut key) {
            encoder.in_bf16 = device::in_bf16(&config.train, device);
            if device::channels_last(config, device) {
                encoder.put_channels_last()?;
            }
        }
        let mut model = Model { design, query, key, queues };
        if device::has_kernels(config, device) {
            model.normalise_by(Norms::Kernels);
        }
        Ok(model)
    }

    /// The encoders, the trained one first.
    pub fn encoders(&self) -> impl Iterator<Item = &Encoder> {
        [&self.query].into_iter().chain(&self.key)
    }

    /// The encoders, the trained one first.
    pub fn encoders_mut(&mut self) -> impl Iterator<Item = &mut Encoder> {
        [&mut self.query].into_iter().chain(&mut self.key)
    }

    /// Changes who normalises groups of channels-last maps: libtorch on a CPU, on a GPU the kernels
    /// where they load. A CPU has the kernels too, to test them; they are slow there.
    pub fn normalise_by(&mut self, norms: Norms) {
        self.encoders_mut().for_each(|encoder| encoder.norms = norms);
    }

    /// Changes the element type of everything that is not a counter. Training is in float32; in
    /// float64, two programs can be compared without ReLUs that rounding puts on the other side of
    /// zero. Comes before the optimizer, whose buffers take the parameters' type.
    pub fn convert(&mut self, kind: Kind) {
        self.encoders_mut().for_each(|encoder| encoder.convert(kind));
        self.queues.convert(kind);
    }

    /// One EMA step of every key parameter, `key = ema * key + (1 - ema) * query` (MoCo, eq. 2), in
    /// a few launches. Buffers are left alone: the key encoder's batch normalisation keeps its own
    /// running statistics.
    ///
    /// # Errors
    /// When libtorch fails, as where memory ends.
    pub fn follow(&mut self, ema: f64) -> Result<(), ShimError> {
        let Some(key) = &self.key else { return Ok(()) };
        let (ours, theirs) = common(key.parameters(), self.query.parameters());
        shim::lerp(&ours, &theirs, 1.0 - ema)
    }

    /// Sets the momentum of the next EMA steps, which [`Model::new`] takes from the method.
    pub fn set_ema(&mut self, ema: f64) {
        if let Some(teacher) = &mut self.design.teacher {
            teacher.ema = ema;
        }
    }

    /// Every tensor of the state: `query.…`, `key.…`, `queue.<head>` such as `queue.global.5` `[d, k]`,
    /// `queue.pointer`. Detached, sharing memory with the model (but for the pointer).
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let prefixed = |prefix: &'static str, encoder: &Encoder| {
            encoder.tensors().into_iter().map(move |(name, t)| (format!("{prefix}.{name}"), t))
        };
        let key = self.key.iter().flat_map(|key| prefixed("key", key));
        prefixed("query", &self.query).chain(key).chain(self.queues.tensors()).collect()
    }

    /// Takes over a state of exactly the tensors of [`Model::tensors`].
    ///
    /// # Errors
    /// When a tensor is missing, unexpected, there twice, or of another shape or type; then the
    /// model is as before.
    pub fn load(&mut self, tensors: &[(String, Tensor)]) -> Result<(), ModelError> {
        let own = self.tensors();
        let checked = check(&own, tensors)?;
        let pointer = checked
            .iter()
            .zip(&own)
            .find(|(_, (name, _))| name == queue::POINTER)
            .map_or(0, |(tensor, _)| tensor.int64_value(&[]));
        let length = self.queues.length();
        if !self.queues.is_empty() && !(0..length).contains(&pointer) {
            return Err(ModelError::Pointer { found: pointer, length });
        }
        self.queues.set_pointer(pointer);
        copy_all(&own, &checked);
        Ok(())
    }

    /// Starts both encoders' backbones from foreign weights under torchvision's names (no `fc`);
    /// heads and queues stay as drawn.
    ///
    /// # Errors
    /// As [`Model::load`]. A missing `num_batches_tracked` is no error: old files do not have it.
    pub fn start_from(&mut self, backbone: &[(String, Tensor)]) -> Result<(), ModelError> {
        let mut own = self.query.backbone_tensors();
        own.retain(|(name, _)| {
            !name.ends_with("num_batches_tracked") || backbone.iter().any(|(b, _)| b == name)
        });
        copy_all(&own, &check(&own, backbone)?);
        if let Some(key) = &self.key {
            let (ours, theirs) = common(key.tensors(), self.query.tensors());
            tch::no_grad(|| shim::copy(&ours, &theirs))?;
        }
        Ok(())
    }
}

/// The tensors of a key encoder, and those of the query encoder that they follow: it has heads that the other has not.
fn common(key: Vec<(String, Tensor)>, query: Vec<(String, Tensor)>) -> (Vec<Tensor>, Vec<Tensor>) {
    let mut query = query.into_iter();
    let pair = |(name, ours): (String, Tensor)| {
        query.find(|(theirs, _)| *theirs == name).map(|(_, theirs)| (ours, theirs))
    };
    key.into_iter().filter_map(pair).unzip()
}

/// Random directions for each head, until real keys have replaced them.
fn draw_queues(design: &Design, seed: u64, device: Device) -> Queues {
    let queue = |(name, width): (String, i64)| {
        let keys =
            Draws::new(seed, &format!("queue.{name}"), 0).normal(&[width, design.queue], 1.0);
        let lengths = keys.norm_scalaropt_dim(2, [0], true).clamp_min(1e-12);
        (name, (keys / lengths).to_device(device))
    };
    let of = |head: &HeadDesign| {
        let width = head.width;
        head.queue_names().into_iter().map(move |name| (name, width)).collect::<Vec<_>>()
    };
    let with_queue = design.heads.iter().filter(|_| design.queue > 0);
    Queues::new(with_queue.flat_map(of).map(queue).collect())
}

/// Whether the system gives a CPU as much memory as the model takes, all at once. Nothing of it is touched.
fn has_room(config: &Config, design: &Design, device: Device) -> Result<(), ModelError> {
    let bytes = shapes::model_bytes(&config.model, design);
    let room = Vec::<u8>::new().try_reserve_exact(usize::try_from(bytes).unwrap_or(usize::MAX));
    match room {
        Err(_) if device == Device::Cpu => {
            Err(ModelError::Memory { bytes, lighter: design.lighter })
        }
        _ => Ok(()),
    }
}

/// The `found` tensors in the order of `own`, if they are the same set.
pub(crate) fn check(
    own: &[(String, Tensor)],
    found: &[(String, Tensor)],
) -> Result<Vec<Tensor>, ModelError> {
    let mut by_name = HashMap::with_capacity(found.len());
    for (name, tensor) in found {
        if by_name.insert(name.as_str(), tensor).is_some() {
            return Err(ModelError::Twice { name: name.clone() });
        }
    }
    let missing: Vec<String> = own
        .iter()
        .filter(|(name, _)| !by_name.contains_key(name.as_str()))
        .map(|(name, _)| name.clone())
        .collect();
    if !missing.is_empty() {
        return Err(ModelError::Missing { names: missing, expected: own.len() });
    }
    let mut checked = Vec::with_capacity(own.len());
    for (name, own) in own {
        let Some(found) = by_name.remove(name.as_str()) else { continue };
        if own.size() != found.size() {
            let (name, expected, found) = (name.clone(), own.size(), found.size());
            return Err(ModelError::Shape { name, expected, found });
        }
        if own.kind() != found.kind() {
            let (name, expected, found) = (name.clone(), own.kind(), found.kind());
            return Err(ModelError::Type { name, expected, found });
        }
        checked.push(found.shallow_clone());
    }
    if !by_name.is_empty() {
        let mut names: Vec<String> = by_name.into_keys().map(str::to_string).collect();
        names.sort_unstable();
        return Err(ModelError::Unexpected { names });
    }
    Ok(checked)
}

/// Copies values into tensors of the same shapes, across devices if need be.
pub(crate) fn copy_all(into: &[(String, Tensor)], from: &[Tensor]) {
    tch::no_grad(|| {
        for ((_, into), from) in into.iter().zip(from) {
            into.shallow_clone().copy_(from);
        }
    });
}
