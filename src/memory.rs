//! What a training step will need, by arithmetic on shapes: no pass is made.
//!
//! Exact for what is held from step to step; for activations, what libtorch's layers keep for their
//! backward passes; for what comes and goes within a layer, an estimate.

#[cfg(test)]
mod tests;

use std::fmt;

use detco_shards::device::{self as pipeline, Number, batches_held};
use detco_shards::pipeline::Views;
use tch::Device;

use crate::config::{self, Config};
use crate::device;
use crate::feed::Way;
use crate::method::{self, Design, HeadDesign, Logits, PassDesign, Reads};
use crate::model::Norms;
use crate::shapes;

/// What CUDA, cuDNN and cuBLAS take for themselves: an allowance, not measured.
const CUDA_LIBRARIES: i64 = 1536 << 20;

/// What nvJPEG's decoders and the view kernels' scratch take beside the batches: an allowance, not
/// measured.
const NVJPEG: i64 = 1024 << 20;

/// libtorch and this program themselves, on a CPU: measured, 190 MB.
const LIBRARIES: i64 = 190_000_000;

/// Bytes by what they are for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Needs(Vec<(&'static str, i64)>);

impl Needs {
    /// Of one of `ranks` ranks that train by this config on `device`, with views that come this way.
    pub fn of(config: &Config, ranks: usize, device: Device, way: Way) -> Needs {
        let on_gpu = device.is_cuda() && device::channels_last(config, device);
        let norms = if on_gpu { Norms::Kernels } else { Norms::Libtorch };
        Needs::normalised_by(norms, config, ranks, device, way)
    }

    fn normalised_by(
        norms: Norms,
        config: &Config,
        ranks: usize,
        device: Device,
        way: Way,
    ) -> Needs {
        let bf16 = device::in_bf16(&config.train, device);
        let design = config.design();
        let parameters = wide(shapes::parameters(&config.model, &design)) * 4;
        let encoder = wide(shapes::encoder_bytes(&config.model, &design));
        let samples = wide(config.train.batch) / ranks as i128;
        let rows = samples / wide(config.train.accumulate);
        let (mut again, mut cells) = (0, 0);
        let number = if bf16 { 2 } else { 4 };
        let mut passes = Vec::new();
        for pass in &design.passes {
            let (edge, images) = (edge_of(config, pass), wide(pass.images));
            let last = design.last_level(&pass.scope);
            let mut layers = Layer::of_image(&config.model, edge, last, norms);
            for layer in &mut layers {
                layer.kept = (layer.kept * number + layer.bits / 8) * rows * images;
                layer.workspace *= rows * images * number;
            }
            let rows_of = |head: &HeadDesign| shapes::rows(&config.model, head, pass.images, edge);
            let heads: i64 =
                design.heads_of(&pass.scope).map(|head| head.kept(rows_of(head))).sum();
            // What a head made of each cell of a map meets what the teacher made of all samples.
            for head in design.heads_of(&pass.scope).filter(|head| head.reads == Reads::Cells) {
                let has_teacher = design.teacher.is_some() && head.in_teacher;
                let both = rows + if has_teacher { samples } else { 0 };
                cells += both * wide(rows_of(head) * head.width);
            }
            let of_heads: i64 = design.heads_of(&pass.scope).map(HeadDesign::parameters).sum();
            let (kept, gradients) = (rows * wide(heads) * number, wide(of_heads) * 4);
            // A gradient that is added to one that is there already is a tensor of its own for a moment.
            let matrices = design.heads_of(&pass.scope).flat_map(HeadDesign::layers);
            let largest = matrices.map(method::Layer::parameters).max().unwrap_or(0);
            let adds = config.train.accumulate > 1 || ranks > 1;
            let workspace = if adds { wide(largest) * 4 } else { 0 };
            layers.push(Layer { kept, gradients, workspace, ..Layer::default() });
            passes.push(layers);
            // Images that the method makes of the views. Those that are shuffled for a teacher are gone before the
            // student's activations come.
            let made = if pass.is_made { 1 } else { 0 };
            again += made * samples * images * wide(3 * edge * edge) * number;
        }
        let raw = samples * config.training_views().bytes() as i128; // a byte a number
        let views = raw * number;
        let (batch, pipeline) = match way {
            // The views and what is made of them; the bytes of two batches on their way.
            Way::Copied if device.is_cuda() => (views + again + 2 * raw, 0),
            // On a CPU the pipeline's slabs lie in the same memory.
            Way::Copied => (views + again, batches_held(config.data.batches_ahead) as i128 * raw),
            // What is made of them alone: the views are the pipeline's.
            Way::Lent => (again, circulating(config, samples, bf16)),
        };
        let Logits { each, all, pairs, once } = design.logits;
        let scored = if design.is_coupled { samples } else { rows };
        let batch_of_all = wide(config.train.batch);
        let of_batch = batch_of_all * wide(all) + batch_of_all.pow(2) * wide(pairs);
        let logits = (scored * wide(each) + of_batch + wide(once) + cells) * 4;
        // Those of a micro-batch before, and buckets of those that travel, are there from the beginning.
        let gradients = if config.train.accumulate > 1 || ranks > 1 { parameters } else { 0 };
        let (activations, workspace) = backward(&passes, parameters, gradients);
        let largest = passes.iter().flatten().map(|layer| layer.workspace).max().unwrap_or(0);
        // Activations are gone when weights change: LARS makes gradients of its own, tensor by tensor.
        let update = match config.optim.optimizer {
            config::Optimizer::Lars => parameters + largest_tensor(&config.model, &design),
            config::Optimizer::Sgd => 0,
        };
        let workspace = workspace.max(update - activations);
        let weights = if bf16 { parameters / 2 } else { 0 }; // as they were cast
        let workspace = match device.is_cuda() {
            // cuDNN works in memory of its own, by the size of the layer: an allowance for the largest one.
            true => wide(CUDA_LIBRARIES) + largest.max(workspace),
            false => workspace,
        };
        let parts = [
            ("query encoder", encoder),
            ("gradients", parameters),
            ("averaging", if ranks > 1 { parameters } else { 0 }), // what travels, beside the gradients
            ("momentum", parameters),
            ("key encoder", wide(shapes::teacher_bytes(&config.model, &design))),
            ("queues", wide(shapes::queue_bytes(&design))),
            ("batch", batch),
            ("data pipeline", pipeline),
            ("activations", weights + activations),
            ("logits", logits),
            ("workspace", workspace),
            ("libraries", if device.is_cuda() { 0 } else { wide(LIBRARIES) }),
        ];
        let narrow = |bytes: i128| i64::try_from(bytes).unwrap_or(i64::MAX);
        Needs(parts.into_iter().map(|(name, bytes)| (name, narrow(bytes))).collect())
    }

    /// All of them, in bytes.
    pub fn sum(&self) -> i64 {
        self.0.iter().fold(0, |sum: i64, (_, bytes)| sum.saturating_add(*bytes))
    }

    /// One of them, in bytes; 0 if there is none of that name.
    pub fn part(&self, name: &str) -> i64 {
        self.0.iter().filter(|(known, _)| *known == name).map(|(_, bytes)| bytes).sum()
    }
}

impl fmt::Display for Needs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, bytes) in self.0.iter().chain([&("sum", self.sum())]) {
            writeln!(f, "  {name:<16}{:>10.1} MB", *bytes as f64 / 1e6)?;
        }
        Ok(())
    }
}

/// What the device pipeline holds: the views and images of all batches that circulate.
fn circulating(config: &Config, samples: i128, bf16: bool) -> i128 {
    let views = Views::Recipe(config.training_views());
    let number = if bf16 { Number::Bf16 } else { Number::F32 };
    let of_sample = pipeline::bytes(&views.layout(1), number);
    let batches = batches_held(config.data.batches_ahead) as i128;
    batches * samples * of_sample as i128 + wide(NVJPEG)
}

/// The least `train.accumulate` whose needs fit into `free` bytes; none if none does.
pub fn accumulate_for(
    config: &Config,
    ranks: usize,
    device: Device,
    way: Way,
    free: i64,
) -> Option<i64> {
    let (mut config, groups) = (config.clone(), config.model.bn_splits / ranks as i64);
    (1..=groups).filter(|parts| groups % parts == 0).find(|parts| {
        config.train.accumulate = *parts;
        Needs::of(&config, ranks, device, way).sum() <= free
    })
}

/// Products of a config's numbers, each within its bound, fit 128 bits.
fn wide(number: i64) -> i128 {
    i128::from(number)
}

/// What backward passes through these layers, in the order of their forward passes, hold when they hold most:
/// activations beyond the `parameters` bytes of all gradients, and a layer's workspace. Where no gradient is there
/// when they begin (`gradients` is 0), those of a layer come when its activations go, which are the fewer of both
/// in the last stages. Where gradients are there, those of the last of several passes wait for the first's, to be
/// added to them together.
fn backward(passes: &[Vec<Layer>], parameters: i128, gradients: i128) -> (i128, i128) {
    let mut left: i128 = passes.iter().flatten().map(|layer| layer.kept).sum();
    // The last pass is the first to go back, and makes the gradients; what it does not reach has its own.
    let first = passes.last().map_or(&[][..], Vec::as_slice);
    let of_first: i128 = first.iter().map(|layer| layer.gradients).sum();
    let mut there = gradients.max(parameters - of_first);
    let wait = gradients > 0 && passes.len() > 1;
    let bound = if wait { parameters + of_first } else { parameters };
    let mut most = (0, 0);
    for (number, pass) in passes.iter().enumerate().rev() {
        for layer in pass.iter().rev() {
            if number + 1 == passes.len() {
                there = bound.min(there + layer.gradients);
            } else if wait && number == 0 {
                there = parameters.max(there - layer.gradients);
            }
            let waiting = (there - parameters).max(0);
            let activations = (left + there - waiting - parameters).max(0);
            let workspace = layer.workspace + waiting;
            if activations + workspace > most.0 + most.1 {
                most = (activations, workspace);
            }
            left -= layer.kept;
        }
    }
    most
}

/// What a layer takes of a backward pass.
#[derive(Clone, Copy, Debug, Default)]
struct Layer {
    /// Kept for it from the forward pass: elements of maps of an image, then bytes.
    kept: i128,
    /// Bits beside the maps: where a window's largest value lay, and what a ReLU let through where our
    /// kernels normalise. libtorch looks at the map for that.
    bits: i128,
    /// While it runs: gradients of what it made and of what it read, and one map between. As `kept`.
    workspace: i128,
    /// Bytes of its parameters' gradients.
    gradients: i128,
}

impl Layer {
    /// The layers that an image of this edge goes through, up to the `last` stage that has a head.
    fn of_image(model: &config::Model, edge: i64, last: u8, norms: Norms) -> Vec<Layer> {
        let net = shapes::ResNet::of(model);
        let image = Layer { kept: wide(3 * edge * edge), ..Layer::default() };
        let mut layers = vec![image, Layer::of_conv(&net.stem, edge)];
        let elements = net.stem.elements(edge);
        let mut at = net.edge_behind_stem(edge);
        if net.pools {
            let pooled = net.stem.to * at * at;
            let bits = pooled * if norms == Norms::Kernels { 4 } else { 64 };
            layers.push(Layer { bits: wide(bits), ..Layer::of_map(pooled) });
        }
        // Our kernels pool on the way.
        if !net.pools || norms == Norms::Libtorch {
            layers.push(Layer::behind_relu(elements, norms));
        }
        for block in net.stages[..usize::from(last) - 1].iter().flatten() {
            // A convolution's output is kept by the normalisation after it, and what that makes by the ReLU and the
            // next convolution; the shortcut's last output is only added.
            let from = at;
            for conv in &block.convs {
                layers.push(Layer::of_conv(conv, at));
                layers.push(Layer::behind_relu(conv.elements(at), norms));
                at = conv.edge(at);
            }
            if let Some(conv) = &block.downsample {
                layers.push(Layer::of_conv(conv, from));
            }
        }
        layers
    }

    fn of_map(elements: i64) -> Layer {
        let kept = wide(elements);
        Layer { kept, workspace: 3 * kept, ..Layer::default() }
    }

    /// A convolution of a map of this edge, and the normalisation behind it.
    fn of_conv(conv: &shapes::Conv, edge: i64) -> Layer {
        let gradients = wide(conv.parameters()) * 4;
        Layer { gradients, ..Layer::of_map(conv.elements(edge)) }
    }

    fn behind_relu(elements: i64, norms: Norms) -> Layer {
        let bits = if norms == Norms::Kernels { wide(elements) } else { 0 };
        Layer { bits, ..Layer::of_map(elements) }
    }
}

/// Bytes of the largest kernel or matrix.
fn largest_tensor(model: &config::Model, design: &Design) -> i128 {
    let net = shapes::ResNet::of(model);
    let kernels = net.convs().map(shapes::Conv::weights);
    let matrices = design.heads.iter().flat_map(HeadDesign::layers).map(method::Layer::parameters);
    wide(kernels.chain(matrices).max().unwrap_or(0)) * 4
}

/// Edge of a pass's images.
fn edge_of(config: &Config, pass: &PassDesign) -> i64 {
    config.views.group(&pass.group).map_or(0, |group| i64::from(group.images().1))
}
