//! What a training step will need, by arithmetic on shapes: no pass is made.
//!
//! Exact for what is held from step to step; for activations, what libtorch's layers keep for their
//! backward passes; for what comes and goes within a layer, an estimate.

use std::fmt;

use detco_shards::device::{Number, Shape, batches_held};
use detco_shards::pipeline::Views;
use tch::{Device, Tensor};

use crate::config::Config;
use crate::device;
use crate::feed::Way;
use crate::model::{Model, Norms, Scope};

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
    /// Of training this model, made from this config, on `device`, alone, with views that come this
    /// way. The model itself may lie elsewhere.
    pub fn of(model: &Model, config: &Config, device: Device, way: Way) -> Needs {
        let on_gpu = device.is_cuda() && device::channels_last(config, device);
        let norms = if on_gpu { Norms::Kernels } else { Norms::Libtorch };
        Needs::normalised_by(norms, model, config, device, way)
    }

    fn normalised_by(
        norms: Norms,
        model: &Model,
        config: &Config,
        device: Device,
        way: Way,
    ) -> Needs {
        let bf16 = device::in_bf16(&config.train, device);
        let parameters = bytes(&model.query.parameters());
        let query = bytes(&model.query.tensors());
        let queues = [Scope::Global, Scope::Local].map(|scope| model.queues.rings(scope).iter());
        let rows = config.train.batch / config.train.accumulate;
        let mut kept = if bf16 { parameters / 2 } else { 0 }; // weights, as they were cast
        let mut largest = 0;
        let mut batch = 0;
        let mut raw = 0;
        for (scope, edge, images) in scopes(config) {
            let (of_scope, largest_map) = model.query.kept_bytes(scope, rows, edge, bf16, norms);
            kept += of_scope;
            largest = largest.max(largest_map);
            let elements = config.train.batch * images * 3 * edge * edge;
            batch += elements * if bf16 { 2 } else { 4 };
            raw += 2 * elements;
        }
        let (batch, pipeline) = match way {
            // Two views, and the second once more in the order that the key encoder sees; the bytes
            // of two batches on their way.
            Way::Copied if device.is_cuda() => (3 * batch + 2 * raw, 0),
            // On a CPU the pipeline's slabs lie in the same memory.
            Way::Copied => (3 * batch, batches_held(config.data.batches_ahead) as i64 * raw),
            // That once more alone: both views are the pipeline's.
            Way::Lent => (batch, pipeline(config, bf16)),
        };
        let logits = 2 * rows * config.loss.queue * 4;
        // A layer's gradients, of what it made and of what it read, and one map between.
        let workspace = 3 * largest + if device.is_cuda() { CUDA_LIBRARIES } else { 0 };
        Needs(vec![
            ("query encoder", query),
            ("gradients", parameters),
            ("momentum", parameters),
            ("key encoder", query),
            ("queues", queues.into_iter().flatten().map(size).sum()),
            ("batch", batch),
            ("data pipeline", pipeline),
            ("activations", kept),
            ("logits", logits),
            ("workspace", workspace),
            ("libraries", if device.is_cuda() { 0 } else { LIBRARIES }),
        ])
    }

    /// All of them, in bytes.
    pub fn sum(&self) -> i64 {
        self.0.iter().map(|(_, bytes)| bytes).sum()
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
fn pipeline(config: &Config, bf16: bool) -> i64 {
    let mut recipe = config.views.clone();
    recipe.local = recipe.local.filter(|_| config.model.local);
    let shape = Shape::of(&Views::Train(recipe), config.train.batch as usize);
    let number = if bf16 { Number::Bf16 } else { Number::F32 };
    (batches_held(config.data.batches_ahead) * shape.bytes(number)) as i64 + NVJPEG
}

/// The least `train.accumulate` whose needs fit into `free` bytes; none if none does.
pub fn accumulate_for(
    model: &Model,
    config: &Config,
    device: Device,
    way: Way,
    free: i64,
) -> Option<i64> {
    let (mut config, groups) = (config.clone(), config.model.bn_splits);
    (1..=groups).filter(|parts| groups % parts == 0).find(|parts| {
        config.train.accumulate = *parts;
        Needs::of(model, &config, device, way).sum() <= free
    })
}

/// Scopes that the config trains, with the edge and the number of a sample's images.
fn scopes(config: &Config) -> impl Iterator<Item = (Scope, i64, i64)> {
    let local = config.views.local.as_ref().filter(|_| config.model.local);
    let local = local.map(|local| (Scope::Local, i64::from(local.patch), 9));
    [(Scope::Global, i64::from(config.views.global.size), 1)].into_iter().chain(local)
}

fn size(tensor: &Tensor) -> i64 {
    (tensor.numel() * tensor.kind().elt_size_in_bytes()) as i64
}

fn bytes(tensors: &[(String, Tensor)]) -> i64 {
    tensors.iter().map(|(_, tensor)| size(tensor)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{Batch, Form};
    use crate::dist::local::Local;
    use crate::model::Draws;
    use crate::optim::Sgd;
    use crate::shim::step::Meter;
    use crate::step::{At, update};
    use tch::Kind;

    /// The most that two steps hold, counted by libtorch's allocator.
    fn measured(config: &Config, norms: Norms) -> i64 {
        tch::set_num_threads(1);
        let meter = Meter::begin().unwrap();
        let mut model = Model::new(config, Device::Cpu).unwrap();
        model.normalise_by(norms);
        let mut sgd = Sgd::new(model.query.parameters(), 0.9, 1e-4);
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
            let mut views =
                scopes(config).map(|(_, edge, images)| ["0", "1"].map(|v| view(v, images, edge)));
            let batch = Batch { global: views.next().unwrap(), local: views.next() };
            let at = At { step, learning_rate: 0.01 };
            let report = update(&mut model, &mut sgd, &Local, config, &batch, at).unwrap();
            assert!(report.applied);
        }
        meter.read().unwrap().1
    }

    /// Between a twentieth below and a fifth above, for both kinds of blocks, with and without
    /// patches, in both precisions, whole and in micro-batches; where our kernels normalise, too.
    #[test]
    fn needs_are_what_libtorch_counts() {
        let small = ["model.width=8", "model.dim=32", "loss.queue=512", "train.batch=8"];
        use Norms::{Kernels, Libtorch};
        let cases: [(&str, &[&str], Norms); 7] = [
            ("detco-r50", &["model.local_head=pirl", "views.local.patch=32"], Libtorch),
            // With 8 channels libtorch's convolutions in bfloat16 hold more on a CPU than their maps.
            (
                "detco-r50",
                &[
                    "model.backbone=resnet18",
                    "model.width=16",
                    "views.local.patch=32",
                    "train.precision=bf16",
                ],
                Libtorch,
            ),
            ("detco-r50", &["model.backbone=resnet18", "train.accumulate=4"], Libtorch),
            ("moco-v2-r50", &["train.accumulate=2"], Libtorch),
            ("moco-v2-cifar", &["model.bn_splits=1", "train.layout=channels-last"], Libtorch),
            (
                "detco-r50",
                &["model.local_head=pirl", "views.local.patch=32", "train.layout=channels-last"],
                Kernels,
            ),
            ("moco-v2-cifar", &["train.layout=channels-last"], Kernels),
        ];
        for (recipe, more, norms) in cases {
            let edges = ["views.global.size=64", "model.bn_splits=4"];
            let sets = small.iter().chain(&edges).chain(more).map(ToString::to_string);
            let config = Config::load(recipe, &sets.collect::<Vec<_>>()).unwrap();
            let model = Model::new(&config, Device::Cpu).unwrap();
            let needs = Needs::normalised_by(norms, &model, &config, Device::Cpu, Way::Copied);
            let beside = needs.part("data pipeline") + needs.part("libraries");
            let of_libtorch = needs.sum() - beside;
            let (said, found) = (of_libtorch as f64, measured(&config, norms) as f64);
            println!("{recipe} {more:?} {norms:?}: said {said:.3e}, found {found:.3e}\n{needs}");
            assert!((0.95..1.20).contains(&(said / found)), "{recipe} {more:?}: {}", said / found);
        }
    }

    #[test]
    fn a_smaller_card_takes_more_micro_batches() {
        let sets = ["model.width=8", "model.local_head=pirl", "loss.queue=1024"];
        let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
        let config = Config::load("detco-r50", &sets).unwrap();
        let model = Model::new(&config, Device::Cpu).unwrap();
        let whole = Needs::of(&model, &config, Device::Cuda(0), Way::Copied);
        let fits = |free| accumulate_for(&model, &config, Device::Cuda(0), Way::Copied, free);
        assert_eq!(fits(whole.sum()), Some(1));
        assert_eq!(fits(whole.sum() - 1), Some(2));
        assert_eq!(fits(whole.sum() - whole.part("activations")), None);
        let half = whole.part("activations") / 2 + whole.part("logits") / 2;
        assert_eq!(fits(whole.sum() - half), Some(2));
        assert!(matches!(fits(whole.sum() - half - half / 2), Some(4 | 8)));
    }

    #[test]
    fn batches_that_wait_on_the_device_are_counted() {
        let sets = ["model.width=8", "loss.queue=1024", "data.batches_ahead=2"];
        let config = Config::load("detco-r50", &sets.map(String::from)).unwrap();
        let model = Model::new(&config, Device::Cpu).unwrap();
        let of = |way| Needs::of(&model, &config, Device::Cuda(0), way);
        let (copied, lent) = (of(Way::Copied), of(Way::Lent));
        assert_eq!(copied.part("data pipeline"), 0);
        // Three batches of 256: two crops and two patch sets in bfloat16, and a picture.
        let (crop, patch) = (224 * 224, config.views.local.as_ref().unwrap().patch.pow(2));
        let sample = 2 * 3 * 2 * i64::from(crop + 9 * patch) + (640 << 10);
        assert_eq!(lent.part("data pipeline"), 3 * 256 * sample + NVJPEG);
        assert_eq!(lent.part("batch"), 256 * 3 * 2 * i64::from(crop + 9 * patch));
        let rest = |needs: &Needs| needs.sum() - needs.part("batch") - needs.part("data pipeline");
        assert_eq!(rest(&copied), rest(&lent));
    }
}
