//! The tables of a configuration, their keys and defaults.

use std::path::PathBuf;

use detco_shards::device::Decode;
use detco_shards::pipeline::OnBadSample;
use serde::{Deserialize, Serialize};

use super::units::{Bytes, Window};

/// Where samples come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Data {
    /// Shards: folders, globs, brace lists or single tars; or URLs (`s3://`, `gs://`, `az://`,
    /// `http://`, `https://`) of folders, tars or brace lists. Written down without passwords,
    /// signatures and tokens.
    #[serde(serialize_with = "shown")]
    pub shards: Vec<String>,
    /// Who decodes, and renders: `auto` (nvJPEG where the run is on a GPU that has it, else the CPU),
    /// `cpu` or `nvjpeg`.
    pub decode: Decode,
    /// Folder that keeps what is fetched from URLs; processes of one machine share it. Without one,
    /// [`cache_folder`](super::cache_folder).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
    /// Its bound.
    pub cache_size: Bytes,
    /// How much of the data is mixed: all of it, or windows of so many shards.
    pub window: Window,
    /// Shards that are fetched from URLs at a time.
    pub fetches: usize,
    /// Decode and view threads; 0 means one a core.
    pub workers: usize,
    /// Batches that may be finished or in work ahead of the trainer (bounds memory: the host's, or
    /// the GPU's where it decodes).
    pub batches_ahead: usize,
    /// Whether pictures far larger than all of their views are decoded at 1/2 or 1/4 of their size.
    pub reduce: bool,
    /// What happens when a sample cannot be decoded.
    pub on_bad_sample: OnBadSample,
    /// `skip` stops the run when more than this share of the samples seen was bad.
    pub bad_share_max: f64,
    /// `skip` stops the run after this many bad samples in a row.
    pub bad_run_max: u32,
}

impl Default for Data {
    fn default() -> Self {
        Data {
            shards: Vec::new(),
            decode: Decode::Auto,
            cache: None,
            cache_size: Bytes(200_000_000_000), // ImageNet, and then some
            window: Window::Auto,
            fetches: 4,
            workers: 0,
            batches_ahead: 3,
            reduce: true,
            on_bad_sample: OnBadSample::Fail,
            bad_share_max: 0.001,
            bad_run_max: 100,
        }
    }
}

/// Writes words that may be URLs without what is secret in them.
fn shown<S: serde::Serializer>(words: &[String], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(words.iter().map(|word| detco_shards::stream::remote::shown(word)))
}

/// Which ResNet (He et al., 2016; torchvision's v1.5: the stride sits in the 3×3 convolution).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backbone {
    /// Basic blocks 2-2-2-2.
    Resnet18,
    /// Basic blocks 3-4-6-3.
    Resnet34,
    /// Bottlenecks 3-4-6-3.
    Resnet50,
    /// Bottlenecks 3-4-23-3.
    Resnet101,
}

/// What stands before Res2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stem {
    /// 7×7 convolution of stride 2, then 3×3 max pooling of stride 2: torchvision's.
    Imagenet,
    /// 3×3 convolution of stride 1, no pooling: the usual one for 32-pixel images.
    Cifar,
}

/// Backbone and BN groups.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Model {
    /// Which ResNet.
    pub backbone: Backbone,
    /// What stands before Res2.
    pub stem: Stem,
    /// Channels of Res2's base width; 64 is the standard network.
    pub width: i64,
    /// BN groups of a batch: statistics are computed for each contiguous n/`bn_splits` samples
    /// apart, and keys are shuffled across groups, which is what shuffle-BN over as many GPUs does.
    pub bn_splits: i64,
    /// Start the query encoder's backbone from this file (see `detco train --init`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<PathBuf>,
    /// What stands before the backbone's names in that file, where it holds several backbones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_prefix: Option<String>,
}

impl Default for Model {
    fn default() -> Self {
        Model {
            backbone: Backbone::Resnet50,
            stem: Stem::Imagenet,
            width: 64,
            bn_splits: 8,
            init: None,
            init_prefix: None,
        }
    }
}

impl Model {
    /// Channels of the maps of Res2 to Res5.
    pub fn channels(&self) -> [i64; 4] {
        let expansion = match self.backbone {
            Backbone::Resnet18 | Backbone::Resnet34 => 1,
            Backbone::Resnet50 | Backbone::Resnet101 => 4,
        };
        [0, 1, 2, 3].map(|stage| (self.width << stage) * expansion)
    }
}

/// How the learning rate falls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// `lr * (e + (1 - e) * 0.5 * (1 + cos(pi * epoch / epochs)))`, both without the epochs of the warm-up, where
    /// e is `optim.cosine_end`.
    Cosine,
    /// Times `optim.milestone_factor` at each of `optim.milestones`.
    Steps,
}

/// How gradients change weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Optimizer {
    /// Stochastic gradient descent with momentum.
    Sgd,
    /// The same with gradients scaled, tensor by tensor, to a share of the weights' length (You et al., 2017), in
    /// BYOL's order: weight decay, trust ratio, momentum, learning rate.
    Lars,
}

/// When the learning rate is updated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SchedulePer {
    /// Once an epoch, as MoCo and OpenSelfSup do.
    Epoch,
    /// Every step, with a fractional epoch.
    Step,
}

/// SGD and its schedule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Optim {
    /// Learning rate for a global batch of `lr_batch`; scaled linearly with `train.batch`.
    pub lr: f64,
    /// The batch that `lr` was stated for.
    pub lr_batch: i64,
    /// Plain SGD, or LARS.
    pub optimizer: Optimizer,
    /// SGD's momentum.
    pub momentum: f64,
    /// Whether SGD looks ahead: Nesterov's momentum.
    pub nesterov: bool,
    /// Weight decay.
    pub weight_decay: f64,
    /// Whether vectors are decayed (and, by LARS, adapted) as well: scales and offsets of batch normalisation, and
    /// biases. MoCo's are.
    pub decay_vectors: bool,
    /// LARS's trust coefficient.
    pub trust: f64,
    /// Epochs in which the learning rate rises from `warmup_start` times its value, step by step.
    pub warmup_epochs: u32,
    /// Where it begins to rise, as a share of the learning rate.
    pub warmup_start: f64,
    /// How the learning rate falls.
    pub schedule: Schedule,
    /// Where the cosine ends, as a share of the learning rate.
    pub cosine_end: f64,
    /// When it is updated.
    pub schedule_per: SchedulePer,
    /// Epochs at which `steps` multiplies by `milestone_factor`.
    pub milestones: Vec<u32>,
    /// What `steps` multiplies by.
    pub milestone_factor: f64,
}

impl Default for Optim {
    fn default() -> Self {
        Optim {
            lr: 0.03,
            lr_batch: 256,
            optimizer: Optimizer::Sgd,
            momentum: 0.9,
            nesterov: false,
            weight_decay: 1e-4,
            decay_vectors: true,
            trust: 0.001,
            warmup_epochs: 0,
            warmup_start: 0.0,
            schedule: Schedule::Cosine,
            cosine_end: 0.0,
            schedule_per: SchedulePer::Epoch,
            milestones: vec![120, 160],
            milestone_factor: 0.1,
        }
    }
}

/// Where the tensors live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// A GPU where libtorch finds one, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU; an error without one.
    Cuda,
}

/// In which precision the encoders run. Weights, gradients, momentum, statistics, embeddings, logits
/// and losses are float32 in any.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// bfloat16 on a GPU, float32 on a CPU.
    Auto,
    /// IEEE float32.
    F32,
    /// float32 whose products a GPU may round to TensorFloat-32; on a CPU as `f32`.
    Tf32,
    /// Convolutions and linear layers in bfloat16, as autocast has them; TensorFloat-32 where float32
    /// remains on a GPU.
    Bf16,
}

/// How maps lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// Channels last on a GPU, first on a CPU.
    Auto,
    /// `[n, c, h, w]` with w innermost.
    ChannelsFirst,
    /// The same shape with c innermost: what tensor cores read.
    ChannelsLast,
}

/// Length, batch, device, numerics.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Train {
    /// Passes over the data.
    pub epochs: u32,
    /// Stop after this many steps, wherever the epoch is; 0 means never.
    pub steps_max: u64,
    /// Samples of one update over all ranks.
    pub batch: i64,
    /// Micro-batches an update is computed in; must leave BN groups whole.
    pub accumulate: i64,
    /// Where the tensors live.
    pub device: Device,
    /// In which precision the encoders run.
    pub precision: Precision,
    /// How maps lie in memory.
    pub layout: Layout,
    /// The same bits from the same seed on the same GPU, more slowly. On a CPU it is so anyway.
    pub deterministic: bool,
    /// libtorch's intra-op threads; 0 leaves its default, one a core or `OMP_NUM_THREADS`. They spin
    /// while they wait for each other, so beside other busy programs fewer are faster. Bit-identical
    /// resume needs the same number.
    pub threads: i32,
}

impl Default for Train {
    fn default() -> Self {
        Train {
            epochs: 200,
            steps_max: 0,
            batch: 256,
            accumulate: 1,
            device: Device::Auto,
            precision: Precision::Auto,
            layout: Layout::Auto,
            deterministic: false,
            threads: 0,
        }
    }
}

/// How averaged gradients travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compress {
    /// As they are.
    None,
    /// As bfloat16: half the bytes, three decimal digits.
    Bf16,
}

/// What ranks do together; of no meaning to a world of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Dist {
    /// Seconds after which ranks that wait for another end the run.
    pub timeout_seconds: u64,
    /// Seconds after which ranks that wait for another name it.
    pub slow_seconds: u64,
    /// Compare queues and weights of all ranks every this many steps; 0 means never.
    pub check_steps: u64,
    /// Megabytes (2^20) of gradients that are sent together.
    pub bucket_mb: i64,
    /// How averaged gradients travel.
    pub compress: Compress,
}

impl Default for Dist {
    fn default() -> Self {
        Dist {
            timeout_seconds: 600,
            slow_seconds: 30,
            check_steps: 100,
            bucket_mb: 25,
            compress: Compress::None,
        }
    }
}

/// When to save, how many to keep.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Checkpoint {
    /// Save every this many epochs (and at the end); 0 means only at the end.
    pub every_epochs: u32,
    /// Save every this many steps as well; 0 means never.
    pub every_steps: u64,
    /// Keep this many of the newest.
    pub keep: usize,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Checkpoint { every_epochs: 1, every_steps: 0, keep: 2 }
    }
}

/// What to watch while training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Monitor {
    /// Write metrics every this many steps.
    pub every_steps: u64,
    /// Run kNN every this many epochs; 0 means never.
    pub knn_every_epochs: u32,
    /// Shards whose labelled samples are the kNN's memory; empty means the training shards.
    #[serde(serialize_with = "shown")]
    pub knn_train: Vec<String>,
    /// Shards whose labelled samples are classified; empty switches the monitor off.
    #[serde(serialize_with = "shown")]
    pub knn_test: Vec<String>,
    /// At most this many samples of each set, evenly spaced; 0 means all.
    pub knn_samples_max: u64,
    /// Fit a linear classifier to the kNN's features too: logistic regression, as `detco eval linear` does.
    pub linear: bool,
    /// Write down which samples each step was made of, `samples.jsonl` in the run's folder (rank r
    /// above 0: `samples.r.jsonl`).
    pub samples: bool,
    /// Stop when the standard deviation of a level's query embeddings stays below this share of
    /// 1/sqrt(d), its value for directions spread evenly; 0 switches the check off.
    pub collapse_share: f64,
    /// How many steps in a row that must hold: an untrained network starts out narrow.
    pub collapse_steps: u64,
}

impl Default for Monitor {
    fn default() -> Self {
        Monitor {
            every_steps: 10,
            knn_every_epochs: 0,
            knn_train: Vec::new(),
            knn_test: Vec::new(),
            knn_samples_max: 0,
            linear: false,
            samples: false,
            collapse_share: 0.01,
            collapse_steps: 200,
        }
    }
}
