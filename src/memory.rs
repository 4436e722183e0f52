//! What a training step will need, by arithmetic on shapes: no pass is made.
//!
//! Exact for what is held from step to step; for activations, what libtorch's layers keep for their
//! backward passes; for what comes and goes within a layer, an estimate.

use std::fmt;

use detco_shards::device::{self as pipeline, Number, batches_held};
use detco_shards::pipeline::Views;
use tch::Device;

use crate::config::{self, Config};
use crate::device;
use crate::feed::Way;
use crate::method::PassDesign;
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
        let mut again = 0;
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
            let heads: i64 = design.heads_of(&pass.scope).map(|head| head.kept(pass.images)).sum();
            layers.push(Layer { kept: rows * wide(heads) * number, ..Layer::default() });
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
        let (each, pairs) = (wide(design.logits.each), wide(design.logits.pairs));
        let logits = (rows * each + wide(config.train.batch).pow(2) * pairs) * 4;
        // Those of a micro-batch before, and buckets of those that travel, are there from the beginning.
        let gradients = if config.train.accumulate > 1 || ranks > 1 { parameters } else { 0 };
        let (activations, workspace) = backward(&passes, parameters, gradients);
        let largest = passes.iter().flatten().map(|layer| layer.workspace).max().unwrap_or(0);
        // Activations are gone when weights change: LARS makes gradients of its own, tensor by tensor.
        let update = match config.optim.optimizer {
            config::Optimizer::Lars => parameters + largest_tensor(&config.model),
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
            ("key encoder", if design.teacher.is_some() { encoder } else { 0 }),
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
/// in the last stages.
fn backward(passes: &[Vec<Layer>], parameters: i128, gradients: i128) -> (i128, i128) {
    let mut left: i128 = passes.iter().flatten().map(|layer| layer.kept).sum();
    // The last pass is the first to go back, and makes the gradients; what it does not reach has its own.
    let first = passes.last().map_or(&[][..], Vec::as_slice);
    let of_first: i128 = first.iter().map(|layer| layer.gradients).sum();
    let mut there = gradients.max(parameters - of_first);
    let mut most = (0, 0);
    for (number, pass) in passes.iter().enumerate().rev() {
        for layer in pass.iter().rev() {
            if number + 1 == passes.len() {
                there = parameters.min(there + layer.gradients);
            }
            let activations = (left + there - parameters).max(0);
            if activations + layer.workspace > most.0 + most.1 {
                most = (activations, layer.workspace);
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

/// Bytes of the largest kernel.
fn largest_tensor(model: &config::Model) -> i128 {
    let kernels = shapes::ResNet::of(model).convs().map(shapes::Conv::weights).max();
    wide(kernels.unwrap_or(0)) * 4
}

/// Edge of a pass's images.
fn edge_of(config: &Config, pass: &PassDesign) -> i64 {
    config.views.group(&pass.group).map_or(0, |group| i64::from(group.images().1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{Batch, Form};
    use crate::dist::local::Local;
    use crate::model::{Draws, Model};
    use crate::optim::Sgd;
    use crate::shim::step::Meter;
    use crate::step::{At, update};
    use tch::{Kind, Tensor};

    /// The most that two steps hold, counted by libtorch's allocator.
    fn measured(config: &Config, norms: Norms) -> i64 {
        tch::set_num_threads(1);
        let meter = Meter::begin().unwrap();
        let mut model = Model::new(config, Device::Cpu).unwrap();
        model.normalise_by(norms);
        let mut sgd = Sgd::of(model.query.parameters(), &config.optim);
        let form = Form::of(config, Device::Cpu);
        for step in 0..2 {
            let n = config.train.batch;
            let view = |name: &str, images: i64, edge: i64| {
                let kind = if form.bf16 { Kind::BFloat16 } else { Kind::Float };
                let lead = if images == 1 { vec![n] } else { vec![n, images] };
                let draw = |shape: Vec<i64>, at| Draws::new(step, name, at).normal(&shape, 1.0);
                // Small factors: what the test itself needs for its batch is not to be the most.
                let each = draw([lead, vec![3, 1, 1]].concat(), 0).to_kind(kind);
                each + draw(vec![3, edge, edge], 1).to_kind(kind)
            };
            let groups = config.training_views().groups.into_iter().map(|group| {
                let (images, edge) = group.images();
                let view = |v: u32| view(&v.to_string(), images as i64, edge.into());
                (group.name.clone(), (0..group.count).map(view).collect())
            });
            let batch = Batch::new(groups.collect());
            let at = At { step, learning_rate: 0.01 };
            let report = update(&mut model, &mut sgd, &Local, config, &batch, at).unwrap();
            assert!(report.applied);
        }
        meter.read().unwrap().1
    }

    /// Between 5 % below and 15 % above, for both kinds of blocks, with and without
    /// patches, in both precisions, whole and in micro-batches; where our kernels normalise, too.
    #[test]
    fn needs_are_what_libtorch_counts() {
        let small = ["model.width=8", "method.dim=32", "method.queue=512", "train.batch=8"];
        use Norms::{Kernels, Libtorch};
        let cases: [(&str, &[&str], Norms); 14] = [
            ("detco-r50", &["method.local_head=pirl", "views.patches.grid.patch=32"], Libtorch),
            // With 8 channels libtorch's convolutions in bfloat16 hold more on a CPU than their maps.
            (
                "detco-r50",
                &[
                    "model.backbone=resnet18",
                    "model.width=16",
                    "views.patches.grid.patch=32",
                    "train.precision=bf16",
                ],
                Libtorch,
            ),
            ("detco-r50", &["model.backbone=resnet18", "train.accumulate=4"], Libtorch),
            ("moco-v2-r50", &["train.accumulate=2"], Libtorch),
            ("moco-v2-cifar", &["model.bn_splits=1", "train.layout=channels-last"], Libtorch),
            (
                "detco-r50",
                &[
                    "method.local_head=pirl",
                    "views.patches.grid.patch=32",
                    "train.layout=channels-last",
                ],
                Kernels,
            ),
            ("moco-v2-cifar", &["train.layout=channels-last"], Kernels),
            ("simclr-cifar", &["train.accumulate=2"], Libtorch),
            ("simclr-r50", &[], Libtorch),
            // Narrow, of small images: gradients and workspace are a large part, and come when activations go.
            ("simclr-r50", &["model.backbone=resnet18", "model.width=16"], Libtorch),
            // More weights than activations: what LARS makes of the gradients is the most.
            (
                "simclr-r50",
                &[
                    "model.backbone=resnet18",
                    "model.width=32",
                    "train.batch=4",
                    "model.bn_splits=2",
                ],
                Libtorch,
            ),
            ("rotation-r50", &["model.backbone=resnet18", "model.width=16"], Libtorch),
            ("rotation-r50", &[], Libtorch),
            ("rotation-cifar", &["train.accumulate=2"], Libtorch),
        ];
        for (recipe, more, norms) in cases {
            let edges = ["views.crops.size=64", "model.bn_splits=4"];
            let is_moco = !recipe.contains("simclr") && !recipe.contains("rotation");
            let small = small.iter().filter(|set| is_moco || !set.starts_with("method."));
            let sets = small.chain(&edges).chain(more).map(ToString::to_string);
            let config = Config::load(recipe, &sets.collect::<Vec<_>>()).unwrap();
            let needs = Needs::normalised_by(norms, &config, 1, Device::Cpu, Way::Copied);
            let beside = needs.part("data pipeline") + needs.part("libraries");
            let of_libtorch = needs.sum() - beside;
            let (said, found) = (of_libtorch as f64, measured(&config, norms) as f64);
            println!("{recipe} {more:?} {norms:?}: said {said:.3e}, found {found:.3e}\n{needs}");
            assert!((0.95..1.15).contains(&(said / found)), "{recipe} {more:?}: {}", said / found);
        }
    }

    #[test]
    fn a_smaller_card_takes_more_micro_batches() {
        let sets = ["model.width=8", "method.local_head=pirl", "method.queue=1024"];
        let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
        let config = Config::load("detco-r50", &sets).unwrap();
        let whole = Needs::of(&config, 1, Device::Cuda(0), Way::Copied);
        let fits = |free| accumulate_for(&config, 1, Device::Cuda(0), Way::Copied, free);
        assert_eq!(fits(whole.sum()), Some(1));
        assert_eq!(fits(whole.sum() - 1), Some(2));
        assert_eq!(fits(whole.sum() - whole.part("activations")), None);
        let half = whole.part("activations") / 2 + whole.part("logits") / 2;
        assert_eq!(fits(whole.sum() - half), Some(2));
        assert!(matches!(fits(whole.sum() - half - half / 2), Some(4 | 8)));
    }

    #[test]
    fn batches_that_wait_on_the_device_are_counted() {
        let sets = ["model.width=8", "method.queue=1024", "data.batches_ahead=2"];
        let config = Config::load("detco-r50", &sets.map(String::from)).unwrap();
        let of = |way| Needs::of(&config, 1, Device::Cuda(0), way);
        let (copied, lent) = (of(Way::Copied), of(Way::Lent));
        assert_eq!(copied.part("data pipeline"), 0);
        // Three batches of 256: two crops and two patch sets in bfloat16, and a picture.
        let (crop, patch) = (224 * 224, config.patch_size().unwrap().pow(2));
        let sample = 2 * 3 * 2 * i64::from(crop + 9 * patch) + (640 << 10);
        assert_eq!(lent.part("data pipeline"), 3 * 256 * sample + NVJPEG);
        assert_eq!(lent.part("batch"), 0, "the pipeline's own views, and nothing made of them");
        let rest = |needs: &Needs| needs.sum() - needs.part("batch") - needs.part("data pipeline");
        assert_eq!(rest(&copied), rest(&lent));
    }

    /// What is counted by shapes is what models hold, byte by byte, and what their checkpoints do.
    #[test]
    fn shapes_are_those_of_models() {
        let bytes = |tensors: &[(String, Tensor)]| -> i64 {
            let of = |tensor: &Tensor| tensor.numel() * tensor.kind().elt_size_in_bytes();
            tensors.iter().map(|(_, tensor)| of(tensor) as i64).sum()
        };
        let small = ["model.width=4", "method.dim=8", "method.queue=1024"];
        for recipe in ["simclr-r50", "simclr-cifar", "rotation-r50"] {
            let config = Config::load(recipe, &["model.width=4".into()]).unwrap();
            let model = Model::new(&config, Device::Cpu).unwrap();
            let parameters = bytes(&model.query.parameters());
            let design = config.design();
            assert_eq!(parameters, shapes::parameters(&config.model, &design) * shapes::FLOAT);
            let query = bytes(&model.query.tensors());
            assert_eq!(query, shapes::encoder_bytes(&config.model, &design), "{recipe}");
            let saved = bytes(&model.tensors()) + parameters; // momentum
            assert_eq!(saved, shapes::checkpoint_bytes(&config), "{recipe}");
        }
        for (recipe, more) in [
            ("detco-r50", ["method.local_head=pirl", "method.levels=[3,5]"]),
            ("detco-small", ["method.local_head=9c-9c", "model.backbone=resnet34"]),
            ("moco-v1-r50", ["model.backbone=resnet101", "model.stem=cifar"]),
            ("moco-v2-cifar", ["method.head=linear", "model.width=6"]),
        ] {
            let mut sets: Vec<String> =
                small.iter().chain(&more).map(ToString::to_string).collect();
            if more[1].contains("levels") {
                sets.push("method.level_weights=[0.5,1.0]".into());
            }
            let config = Config::load(recipe, &sets).unwrap();
            let model = Model::new(&config, Device::Cpu).unwrap();
            let parameters = bytes(&model.query.parameters());
            assert_eq!(
                parameters,
                shapes::parameters(&config.model, &config.design()) * shapes::FLOAT,
                "{recipe}"
            );
            let query = bytes(&model.query.tensors());
            assert_eq!(
                query,
                parameters + shapes::buffer_bytes(&config.model, &config.design()),
                "{recipe}"
            );
            let saved = bytes(&model.tensors()) + parameters; // momentum
            // The queues' pointer is eight bytes.
            assert_eq!(saved - 8, shapes::checkpoint_bytes(&config), "{recipe}");
        }
    }

    #[test]
    fn ranks_share_the_batch_and_not_the_model() {
        let config = Config::load("detco-r50", &[]).unwrap();
        let of = |ranks| Needs::of(&config, ranks, Device::Cuda(0), Way::Copied);
        let (one, eight) = (of(1), of(8));
        for shared in ["batch", "logits", "activations"] {
            let part = |needs: &Needs| needs.part(shared) as f64;
            // Weights that were cast to bfloat16 are among the activations.
            let share = part(&one) / part(&eight);
            assert!((7.0..=8.0).contains(&share), "{shared}: {share}");
        }
        for own in ["query encoder", "momentum", "queues"] {
            assert_eq!(one.part(own), eight.part(own));
        }
        assert_eq!((one.part("averaging"), eight.part("averaging")), (0, one.part("gradients")));
    }
}
