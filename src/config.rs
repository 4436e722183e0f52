//! One TOML file to one validated [`Config`]: built-in recipes by name, a file on top, `--set` on
//! top of that. Unknown keys are errors that name the nearest valid one.
//!
//! Never touches tensors, shards or the network: reading a config costs nothing and can be tested
//! without data. It is also the only place that reads the environment.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use detco_shards::device::{Number, Setup};
use detco_shards::views::{Recipe, RecipeError};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::method::{Around, Chosen, Design, Refused};

/// The recipes that ship with the program: name, one line, TOML.
pub const RECIPES: &[(&str, &str, &str)] = &[
    (
        "detco-r50",
        "DetCo, ResNet-50, ImageNet: the paper (200 epochs, batch 256)",
        include_str!("recipes/detco-r50.toml"),
    ),
    (
        "detco-aa-r50",
        "DetCo+AA: detco-r50 with RandAugment on the crops",
        include_str!("recipes/detco-aa-r50.toml"),
    ),
    (
        "moco-v2-r50",
        "MoCo v2, ResNet-50, ImageNet (200 epochs, batch 256)",
        include_str!("recipes/moco-v2-r50.toml"),
    ),
    (
        "moco-v1-r50",
        "MoCo v1, ResNet-50, ImageNet (200 epochs, batch 256)",
        include_str!("recipes/moco-v1-r50.toml"),
    ),
    (
        "simclr-r50",
        "SimCLR, ResNet-50, ImageNet (200 epochs, batch 256, LARS)",
        include_str!("recipes/simclr-r50.toml"),
    ),
    (
        "rotation-r50",
        "Rotation, ResNet-50, ImageNet (70 epochs, 128 images in four rotations)",
        include_str!("recipes/rotation-r50.toml"),
    ),
    (
        "detco-cifar",
        "DetCo, ResNet-18 with a CIFAR stem, 32-pixel images",
        include_str!("recipes/detco-cifar.toml"),
    ),
    (
        "moco-v2-cifar",
        "MoCo v2, ResNet-18 with a CIFAR stem, 32-pixel images",
        include_str!("recipes/moco-v2-cifar.toml"),
    ),
    (
        "simclr-cifar",
        "SimCLR, ResNet-18 with a CIFAR stem, 32-pixel images",
        include_str!("recipes/simclr-cifar.toml"),
    ),
    (
        "rotation-cifar",
        "Rotation, ResNet-18 with a CIFAR stem, 32-pixel images",
        include_str!("recipes/rotation-cifar.toml"),
    ),
    (
        "detco-small",
        "DetCo, narrow ResNet-18, 48-pixel crops: minutes on a laptop",
        include_str!("recipes/detco-small.toml"),
    ),
    (
        "moco-v2-small",
        "MoCo v2, narrow ResNet-18, 48-pixel crops: minutes on a laptop",
        include_str!("recipes/moco-v2-small.toml"),
    ),
];

/// Samples of an update: four times the largest batch that anybody trains with.
const BATCH_MAX: i64 = 1 << 20;
/// Bytes of the cache.
const CACHE_MAX: u64 = 1 << 60;

pub use crate::method::{CROPS, PATCHES};

/// What a file builds upon that names no base; equal to `Config::default()`.
const DEFAULT: &str = "detco-r50";

/// Why a configuration was refused.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the config {path}: {source}")]
    Read {
        /// The file that was asked for.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Neither a recipe nor a file.
    #[error("{name:?} is neither a built-in recipe nor a file{hint}\nbuilt-in recipes: {known}")]
    UnknownRecipe {
        /// What was asked for.
        name: String,
        /// The nearest built-in name, if one is near.
        hint: String,
        /// All built-in names.
        known: String,
    },
    /// A base that is none.
    #[error(
        "{origin}: base = {name:?}: a base is a built-in recipe, one of {known}; files do not chain"
    )]
    Base {
        /// The file that names it.
        origin: String,
        /// What it names.
        name: String,
        /// All built-in names.
        known: String,
    },
    /// Not TOML, an unknown key, or a value of the wrong type.
    #[error("{origin}: {message}{hint}")]
    Parse {
        /// The file or recipe the text came from.
        origin: String,
        /// What the parser said, with line and column.
        message: String,
        /// The nearest valid key, if a key was unknown.
        hint: String,
    },
    /// `--set` without `=`, or through a value that is no table.
    #[error("--set {text:?}: {reason}")]
    Set {
        /// The argument.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Views that cannot be drawn.
    #[error("views.{0}")]
    Views(#[from] RecipeError),
    /// A legal value that makes no sense here.
    #[error("{key} = {value}: {reason}")]
    Value {
        /// Dotted key.
        key: &'static str,
        /// The value as given.
        value: String,
        /// What was expected.
        reason: String,
    },
}

/// Everything a run is: the resolved configuration, written into the run's folder as `config.toml`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The built-in recipe that a file builds upon, `detco-r50` if it names none: its values hold
    /// where the file is silent. In a resolved configuration, where it came from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// Seed of order, views, initial weights, queues and shuffles.
    pub seed: u64,
    /// Where samples come from, and what happens to bad ones.
    pub data: Data,
    /// Backbone and BN groups.
    pub model: Model,
    /// What is learnt: the method's name and its keys.
    pub method: Chosen,
    /// SGD and its schedule.
    pub optim: Optim,
    /// Length, batch, device, numerics.
    pub train: Train,
    /// What ranks do together.
    pub dist: Dist,
    /// When to save, how many to keep.
    pub checkpoint: Checkpoint,
    /// What to watch while training.
    pub monitor: Monitor,
    /// The groups of views, and what may be drawn for them: a `[[views]]` table each.
    pub views: Recipe,
}

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
    /// [`cache_folder`].
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

pub use detco_shards::device::Decode;
pub use detco_shards::pipeline::OnBadSample;

/// What a GPU is opened with to decode and render: NVIDIA's libraries beside the libtorch of LIBTORCH,
/// or else beside the one given, or the one that this program was built with; compiled kernels in the
/// user's cache.
pub fn gpu(number: Number, libtorch: Option<&Path>) -> Setup {
    let folder = |name| std::env::var_os(name).filter(|text| !text.is_empty()).map(PathBuf::from);
    let home = || folder("HOME").map(|home| home.join(".cache"));
    let cache = folder("XDG_CACHE_HOME").or_else(home).unwrap_or_else(std::env::temp_dir);
    let named = folder("LIBTORCH");
    let built_with = option_env!("DETCO_LIBTORCH").map(Path::new);
    Setup::new(named.as_deref().or(libtorch).or(built_with), cache.join("detco/kernels"), number)
}

/// A number of bytes; written as a number, or as text with a unit: `"200GB"`, `"64 GiB"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "BytesForm", into = "BytesForm")]
pub struct Bytes(pub u64);

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum BytesForm {
    Number(u64),
    Text(String),
}

impl TryFrom<BytesForm> for Bytes {
    type Error = String;

    fn try_from(form: BytesForm) -> Result<Bytes, String> {
        match form {
            BytesForm::Number(number) => Ok(Bytes(number)),
            BytesForm::Text(text) => text.parse(),
        }
    }
}

impl From<Bytes> for BytesForm {
    fn from(bytes: Bytes) -> BytesForm {
        BytesForm::Number(bytes.0)
    }
}

impl std::str::FromStr for Bytes {
    type Err = String;

    /// `1000`, `256MiB`, `1 GB`.
    fn from_str(text: &str) -> Result<Bytes, String> {
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let number: u64 = number
            .parse()
            .map_err(|_| "expected a number of bytes, or one with a unit: 200GB, 64 GiB")?;
        let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "kb" => 1_000,
            "kib" | "k" => 1 << 10,
            "mb" => 1_000_000,
            "mib" | "m" => 1 << 20,
            "gb" => 1_000_000_000,
            "gib" | "g" => 1 << 30,
            "tb" => 1_000_000_000_000,
            "tib" | "t" => 1 << 40,
            unit => {
                return Err(format!("`{unit}` is no unit: B, KB, KiB, MB, MiB, GB, GiB, TB, TiB"));
            }
        };
        Ok(Bytes(number.checked_mul(factor).ok_or("too many bytes for 64 bits")?))
    }
}

/// How much of the data a shuffle mixes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "WindowForm", into = "WindowForm")]
pub enum Window {
    /// All of it, if it is local or fits the cache; otherwise as many shards as do, twice over. A run
    /// writes down what that came to, and keeps to it.
    Auto,
    /// All of it: the true shuffle.
    All,
    /// Windows of so many shards, at least 1.
    Shards(u32),
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum WindowForm {
    Number(u32),
    Text(String),
}

impl TryFrom<WindowForm> for Window {
    type Error = &'static str;

    fn try_from(form: WindowForm) -> Result<Window, &'static str> {
        match form {
            WindowForm::Number(number) => number.to_string().parse(),
            WindowForm::Text(text) => text.parse(),
        }
    }
}

impl From<Window> for WindowForm {
    fn from(window: Window) -> WindowForm {
        match window {
            Window::Shards(shards) => WindowForm::Number(shards),
            window => WindowForm::Text(window.to_string()),
        }
    }
}

impl std::str::FromStr for Window {
    type Err = &'static str;

    /// `auto`, `all`, or a number.
    fn from_str(text: &str) -> Result<Window, &'static str> {
        match (text, text.parse()) {
            ("auto", _) => Ok(Window::Auto),
            ("all", _) => Ok(Window::All),
            (_, Ok(0)) => Err("a window of 0 shards"),
            (_, Ok(shards)) => Ok(Window::Shards(shards)),
            _ => Err("expected \"auto\", \"all\" or a number of shards"),
        }
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Window::Auto => f.write_str("auto"),
            Window::All => f.write_str("all"),
            Window::Shards(shards) => shards.fmt(f),
        }
    }
}

/// Writes words that may be URLs without what is secret in them.
fn shown<S: serde::Serializer>(words: &[String], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(words.iter().map(|word| detco_shards::stream::remote::shown(word)))
}

/// Where fetched shards are kept when nobody says: `detco` in `$XDG_CACHE_HOME`, in `~/.cache`, or
/// else in the folder for temporary files.
pub fn cache_folder() -> PathBuf {
    let folder = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || folder("HOME").map(|home| home.join(".cache"));
    folder("XDG_CACHE_HOME").or_else(home).unwrap_or_else(std::env::temp_dir).join("detco")
}

/// The variables that stores are configured by: `AWS_*`, `GOOGLE_*`, `AZURE_*`, and for HTTP
/// `DETCO_HTTP_*`, Hugging Face's, and those that lead to `.netrc`.
pub fn store_environment() -> Vec<(String, String)> {
    let groups = ["AWS_", "GOOGLE_", "AZURE_", "DETCO_HTTP_"];
    let single = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "NETRC", "HOME"];
    let ours =
        |name: &str| single.contains(&name) || groups.iter().any(|group| name.starts_with(group));
    let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
        Some((name.into_string().ok()?, value.into_string().ok()?))
    };
    std::env::vars_os().filter_map(text).filter(|(name, _)| ours(name)).collect()
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
    /// `lr * 0.5 * (1 + cos(pi * epoch / epochs))`, both without the epochs of the warm-up.
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
            samples: false,
            collapse_share: 0.01,
            collapse_steps: 200,
        }
    }
}

/// A variable of the environment; one that is empty, or no text, counts as not set.
#[expect(clippy::disallowed_methods, reason = "this is the place that reads the environment")]
pub fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

impl Config {
    /// Resolves a recipe name or TOML file plus `--set` overrides, and validates the result.
    pub fn load(recipe: &str, overrides: &[String]) -> Result<Config, ConfigError> {
        let (mut table, base, origin) = read(recipe)?;
        let mut config = from_table(table.clone(), &origin)?;
        if !overrides.is_empty() {
            for text in overrides {
                set(&mut table, text)?;
            }
            // What was right before is wrong by these.
            config = from_table(table, "--set")?;
        }
        config.base = Some(base);
        config.validate()?;
        Ok(config)
    }

    /// Reads the resolved config of a run back.
    pub fn from_toml(text: &str, origin: &str) -> Result<Config, ConfigError> {
        let config = from_table(parse(text, origin)?, origin)?;
        config.validate()?;
        Ok(config)
    }

    /// Reads the resolved config of a checkpoint back: as [`Config::from_toml`], and those of runs from before
    /// methods had a table of their own.
    ///
    /// # Errors
    /// As [`Config::from_toml`].
    pub fn from_checkpoint(text: &str, origin: &str) -> Result<Config, ConfigError> {
        let config = from_table(with_method(parse(text, origin)?), origin)?;
        config.validate()?;
        Ok(config)
    }

    /// The configuration of a run: that of its newest checkpoint, which it goes on by; where there is none yet,
    /// the copy in its folder.
    ///
    /// # Errors
    /// When neither can be read.
    pub fn of_run(run: &Path) -> Result<Config, ConfigError> {
        let is_checkpoint = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            name.strip_prefix("step-").is_some_and(|step| step.parse::<u64>().is_ok())
        };
        let entries = std::fs::read_dir(run.join("checkpoints")).into_iter().flatten().flatten();
        let newest = entries.map(|entry| entry.path()).filter(is_checkpoint).max();
        let path = match &newest {
            Some(checkpoint) => checkpoint.join("state.json"),
            None => run.join("config.toml"),
        };
        let text = std::fs::read_to_string(&path)
            .map_err(|source| ConfigError::Read { path: path.clone(), source })?;
        let origin = path.display().to_string();
        if newest.is_none() {
            return Config::from_checkpoint(&text, &origin);
        }
        let state: Result<serde_json::Value, _> = serde_json::from_str(&text);
        let config = state.as_ref().ok().and_then(|state| state["config"].as_str());
        let config = config.ok_or_else(|| ConfigError::Parse {
            origin: origin.clone(),
            message: "holds no configuration".into(),
            hint: String::new(),
        })?;
        Config::from_checkpoint(config, &origin)
    }

    /// This configuration with `--set` overrides on top, validated.
    pub fn with_overrides(&self, overrides: &[String]) -> Result<Config, ConfigError> {
        let mut table = parse(&self.to_toml(), "config")?;
        for text in overrides {
            set(&mut table, text)?;
        }
        let config = from_table(table, "--set")?;
        config.validate()?;
        Ok(config)
    }

    /// The resolved configuration as TOML, every key written out.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("every field of Config has a TOML form")
    }

    /// What the method declares, on this backbone.
    pub fn design(&self) -> Design {
        self.method.design(self.model.channels())
    }

    /// The groups of views that training reads.
    pub fn training_views(&self) -> Recipe {
        let groups = self.design().groups;
        self.views.only(&groups.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Side of an image in pixels: of the first group that training reads.
    pub fn crop_size(&self) -> u32 {
        self.training_views().groups.first().map_or(0, |group| group.size)
    }

    /// Side of a patch in pixels, where training reads patches.
    pub fn patch_size(&self) -> Option<u32> {
        let views = self.training_views();
        views.groups.iter().find_map(|group| Some(group.grid.as_ref()?.patch))
    }

    /// All values as TOML by their keys, such as `train.epochs` and `views.crops.steps.gray.p`.
    pub fn flat(&self) -> BTreeMap<String, String> {
        let mut keys = BTreeMap::new();
        if let Ok(table) = self.to_toml().parse() {
            flatten("", &toml::Value::Table(table), &mut keys);
        }
        keys
    }

    /// Learning rate before the schedule: linear in the global batch (Goyal et al., 2017).
    pub fn base_lr(&self) -> f64 {
        self.optim.lr * self.train.batch as f64 / self.optim.lr_batch as f64
    }

    /// Checks what types cannot: ranges, divisibility, matching lengths.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let m = &self.model;
        let batch = self.train.batch;
        let seed = self.seed;
        check("seed", seed, i64::try_from(seed).is_ok(), "at most 2^63 - 1, as TOML has it")?;
        let reason = format!("1 to {BATCH_MAX}");
        check("train.batch", batch, (1..=BATCH_MAX).contains(&batch), reason)?;
        check("train.epochs", self.train.epochs, self.train.epochs >= 1, "at least 1")?;
        // Where the system has no more threads, libtorch waits for them for ever.
        let threads = self.train.threads;
        check("train.threads", threads, (0..=1024).contains(&threads), "0 to 1024")?;
        check("model.width", m.width, (1..=512).contains(&m.width), "1 to 512")?;
        check("model.bn_splits", m.bn_splits, m.bn_splits >= 1, "at least 1")?;
        let whole = m.bn_splits >= 1 && batch % m.bn_splits == 0;
        check(
            "model.bn_splits",
            m.bn_splits,
            whole,
            format!("a divisor of train.batch = {batch}"),
        )?;
        // A group of one sample has no variance at Res5 of a 32-pixel image.
        let pairs = m.bn_splits >= 1 && batch / m.bn_splits >= 2;
        check("model.bn_splits", m.bn_splits, pairs, "at least 2 samples in a BN group")?;
        let a = self.train.accumulate;
        let reason =
            format!("a divisor of model.bn_splits = {}: BN groups stay whole", m.bn_splits);
        check("train.accumulate", a, a >= 1 && m.bn_splits % a == 0, reason)?;
        let lr = self.optim.lr;
        check("optim.lr", lr, lr.is_finite() && lr >= 0.0, "finite, 0 or more")?;
        check("optim.lr_batch", self.optim.lr_batch, self.optim.lr_batch >= 1, "at least 1")?;
        let reason = format!(
            "finite times train.batch / optim.lr_batch = {batch} / {}",
            self.optim.lr_batch
        );
        check("optim.lr", lr, self.base_lr().is_finite(), reason)?;
        let momentum = self.optim.momentum;
        check("optim.momentum", momentum, (0.0..1.0).contains(&momentum), "0 to below 1")?;
        let decay = self.optim.weight_decay;
        check("optim.weight_decay", decay, decay.is_finite() && decay >= 0.0, "finite, 0 or more")?;
        let trust = self.optim.trust;
        check("optim.trust", trust, trust.is_finite() && trust > 0.0, "above 0")?;
        let (warm, epochs) = (self.optim.warmup_epochs, self.train.epochs);
        let reason = format!("below train.epochs = {epochs}");
        check("optim.warmup_epochs", warm, warm == 0 || warm < epochs, reason)?;
        let start = self.optim.warmup_start;
        check("optim.warmup_start", start, (0.0..=1.0).contains(&start), "0 to 1")?;
        let factor = self.optim.milestone_factor;
        check("optim.milestone_factor", factor, (0.0..=1.0).contains(&factor), "0 to 1")?;
        let looks_ahead = self.optim.nesterov;
        let possible = self.optim.optimizer == Optimizer::Sgd && momentum > 0.0;
        let reason = "false, or optim.optimizer = \"sgd\" with a momentum";
        check("optim.nesterov", looks_ahead, !looks_ahead || possible, reason)?;
        let size = self.data.cache_size.0;
        check("data.cache_size", size, size <= CACHE_MAX, "at most 1 EiB")?;
        let workers = self.data.workers;
        check("data.workers", workers, workers <= 1024, "0 to 1024")?;
        let ahead = self.data.batches_ahead;
        check("data.batches_ahead", ahead, (1..=64).contains(&ahead), "1 to 64")?;
        let fetches = self.data.fetches;
        check("data.fetches", fetches, (1..=1024).contains(&fetches), "1 to 1024")?;
        let share = self.data.bad_share_max;
        check("data.bad_share_max", share, (0.0..=1.0).contains(&share), "0 to 1")?;
        let d = &self.dist;
        let (slow, timeout) = (d.slow_seconds, d.timeout_seconds);
        check("dist.timeout_seconds", timeout, (1..=86_400).contains(&timeout), "1 to 86400")?;
        let reason = format!("1 to dist.timeout_seconds = {timeout}");
        check("dist.slow_seconds", slow, (1..=timeout).contains(&slow), reason)?;
        let mb = d.bucket_mb;
        check("dist.bucket_mb", mb, (1..=4096).contains(&mb), "1 to 4096")?;
        check("checkpoint.keep", self.checkpoint.keep, self.checkpoint.keep >= 1, "at least 1")?;
        let every = self.monitor.every_steps;
        check("monitor.every_steps", every, every >= 1, "at least 1")?;
        let collapse = self.monitor.collapse_share;
        check("monitor.collapse_share", collapse, (0.0..1.0).contains(&collapse), "0 to below 1")?;
        self.views.validate()?;
        self.check_method()
    }

    /// Checks the method's keys, and what it declares.
    fn check_method(&self) -> Result<(), ConfigError> {
        let around = Around { batch: self.train.batch, views: &self.views };
        self.method.check(&around)?;
        let design = self.design();
        let (key, name) = ("method.name", self.method.name());
        for group in &design.groups {
            let reason = format!("a recipe with the group of views {group:?}, which it trains on");
            check(key, name, self.views.group(group).is_some(), reason)?;
        }
        let mut widths = design.outputs().filter(|head| head.unit).map(|head| head.width);
        let first = widths.next();
        let reason = "outputs of unit length to be of one width";
        check(key, name, widths.all(|width| Some(width) == first), reason)?;
        let whole = !design.groups.is_empty() && design.outputs().next().is_some();
        let reason = "a group of views, a pass and a head";
        check(key, name, whole && design.readings.first() == Some(&"loss"), reason)
    }
}

impl From<Refused> for ConfigError {
    fn from(Refused { key, value, expected }: Refused) -> ConfigError {
        ConfigError::Value { key, value, reason: format!("expected {expected}") }
    }
}

/// Values by their keys. Of a list of tables with names, or of steps, each is a table by its name.
fn flatten(prefix: &str, value: &toml::Value, to: &mut BTreeMap<String, String>) {
    let join =
        |key: &str| if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") };
    match value {
        toml::Value::Table(table) => {
            table.iter().for_each(|(key, value)| flatten(&join(key), value, to));
        }
        toml::Value::Array(list)
            if !list.is_empty() && list.iter().all(|one| name(one).is_some()) =>
        {
            for one in list {
                flatten(&join(name(one).unwrap_or_default()), one, to);
            }
        }
        value => {
            to.insert(prefix.to_string(), value.to_string());
        }
    }
}

/// What a table in a list is called: a group of views by its `name`, a step by its `step`.
fn name(one: &toml::Value) -> Option<&str> {
    one.get("name").or_else(|| one.get("step"))?.as_str()
}

fn check(
    key: &'static str,
    value: impl ToString,
    holds: bool,
    reason: impl Into<String>,
) -> Result<(), ConfigError> {
    if holds {
        return Ok(());
    }
    let reason = format!("expected {}", reason.into());
    Err(ConfigError::Value { key, value: value.to_string(), reason })
}

/// A recipe's or file's table with its `base` chain merged in, the built-in recipe that it is or
/// builds upon, and a name for error messages.
fn read(recipe: &str) -> Result<(toml::Table, String, String), ConfigError> {
    if let Some((name, _, text)) = RECIPES.iter().find(|(name, ..)| *name == recipe) {
        let table = resolve_base(parse(text, name)?, name)?;
        return Ok((table, name.to_string(), format!("recipe {name}")));
    }
    let path = Path::new(recipe);
    if !path.is_file() {
        return Err(unknown_recipe(recipe));
    }
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_path_buf(), source })?;
    let mut table = parse(&text, recipe)?;
    // The types' own defaults are detco-r50's as a whole, not table by table: a file that sets a
    // crop's ratio alone must not get torchvision's scale.
    let base = table.entry("base").or_insert_with(|| DEFAULT.into());
    let base = base.as_str().unwrap_or_default().to_string();
    Ok((resolve_base(table, recipe)?, base, recipe.to_string()))
}

/// Puts the table on top of its base; a base is a built-in recipe, so a chain cannot loop through files.
fn resolve_base(mut table: toml::Table, origin: &str) -> Result<toml::Table, ConfigError> {
    let Some(base) = table.remove("base") else { return Ok(table) };
    let name = base.as_str().unwrap_or_default();
    let known = RECIPES.iter().find(|(known, ..)| *known == name && name != origin);
    let (_, _, text) = known.ok_or_else(|| ConfigError::Base {
        origin: origin.to_string(),
        name: name.to_string(),
        known: known_recipes(),
    })?;
    let mut merged = resolve_base(parse(text, name)?, name)?;
    merge(&mut merged, table);
    Ok(merged)
}

/// Puts a table on another, key by key. Lists of tables with a `name` go table by table: groups of views.
fn merge(under: &mut toml::Table, over: toml::Table) {
    let groups = |list: &[toml::Value]| list.iter().all(|one| one.get("name").is_some());
    for (key, value) in over {
        match (under.get_mut(&key), value) {
            // The keys of one method mean nothing to another.
            (Some(toml::Value::Table(below)), toml::Value::Table(above))
                if key == METHOD && other_name(below, above.get("name")) =>
            {
                *below = above;
            }
            (Some(toml::Value::Table(below)), toml::Value::Table(above)) => merge(below, above),
            (Some(toml::Value::Array(below)), toml::Value::Array(above))
                if !above.is_empty() && groups(&below[..]) && groups(&above) =>
            {
                above.into_iter().for_each(|one| merge_group(below, one));
            }
            (_, value) => {
                under.insert(key, value);
            }
        }
    }
}

/// The table of the method and its keys.
const METHOD: &str = "method";

/// Whether a name is that of another method than the table's.
fn other_name(table: &toml::Table, name: Option<&toml::Value>) -> bool {
    name.is_some_and(|name| table.get("name") != Some(name))
}

/// Puts a group on that of its name, or behind all others.
fn merge_group(list: &mut Vec<toml::Value>, group: toml::Value) {
    let same = |one: &&mut toml::Value| name(one).is_some() && name(one) == name(&group);
    match (list.iter_mut().find(same), group) {
        (Some(toml::Value::Table(below)), toml::Value::Table(above)) => merge(below, above),
        (_, group) => list.push(group),
    }
}

fn parse(text: &str, origin: &str) -> Result<toml::Table, ConfigError> {
    text.parse::<toml::Table>().map_err(|error| ConfigError::Parse {
        origin: origin.to_string(),
        message: error.to_string(),
        hint: String::new(),
    })
}

/// Where keys of methods stood before methods had a table of their own.
const MOVED: &[(&str, &[&str])] = &[
    ("loss", &["temperature", "level_weights", "queue", "fill_first", "ema"]),
    ("model", &["levels", "local", "head", "local_head", "dim"]),
];

/// Puts the keys of a configuration from before methods had a table where they are now.
fn with_method(mut table: toml::Table) -> toml::Table {
    let mut keys = toml::Table::new();
    for (old, names) in MOVED {
        let Some(toml::Value::Table(from)) = table.get_mut(*old) else { continue };
        let taken = |name: &&str| Some((name.to_string(), from.remove(*name)?));
        keys.extend(names.iter().filter_map(taken));
        if from.is_empty() {
            table.remove(*old);
        }
    }
    if !keys.is_empty() && !table.contains_key(METHOD) {
        keys.insert("name".to_owned(), "moco".into());
        table.insert(METHOD.to_owned(), toml::Value::Table(keys));
    }
    table
}

fn from_table(table: toml::Table, origin: &str) -> Result<Config, ConfigError> {
    let moved = MOVED.iter().find_map(|(old, names)| {
        let from = table.get(*old)?.as_table()?;
        names.iter().find(|name| from.contains_key(**name)).map(|name| (old, name))
    });
    if let Some((old, key)) = moved {
        return Err(ConfigError::Parse {
            origin: origin.to_string(),
            message: format!("{old}.{key} is a key of the method now: method.{key}"),
            hint: format!("\nhint: write {key} = ... under [method]"),
        });
    }
    Config::deserialize(toml::Value::Table(table)).map_err(|error| {
        let message = error.to_string().trim_end().to_string();
        let hint = nearest_key(&message).unwrap_or_default();
        ConfigError::Parse { origin: origin.to_string(), message: plain(message), hint }
    })
}

/// serde's words for types and keys in those of a configuration.
fn plain(message: String) -> String {
    const WORDS: [(&str, &str); 9] = [
        ("unknown field", "unknown key"),
        ("unknown variant", "unknown value"),
        ("expected i64", "expected an integer"),
        ("expected u64", "expected an integer, 0 or more"),
        ("expected u32", "expected an integer, 0 or more"),
        ("expected usize", "expected an integer, 0 or more"),
        ("expected u8", "expected an integer, 0 or more"),
        ("expected f64", "expected a number"),
        ("expected f32", "expected a number"),
    ];
    WORDS.iter().fold(message, |text, (from, to)| text.replace(from, to))
}

/// `train.batch=64` into the table; the value is TOML, or a string if it is not.
fn set(table: &mut toml::Table, text: &str) -> Result<(), ConfigError> {
    let fault = |reason: String| ConfigError::Set { text: text.to_string(), reason };
    let (path, value) = text.split_once('=').ok_or_else(|| fault("expected key=value".into()))?;
    let value = value.trim();
    let value = format!("v = {value}")
        .parse::<toml::Table>()
        .ok()
        .and_then(|mut one| one.remove("v"))
        .unwrap_or_else(|| toml::Value::String(value.to_string()));
    let mut keys = path.trim().split('.').peekable();
    let mut at = table;
    while let Some(key) = keys.next() {
        if key.is_empty() {
            return Err(fault("the key is empty".into()));
        }
        if keys.peek().is_none() {
            if path.trim() == "method.name" && other_name(at, Some(&value)) {
                at.clear(); // the keys of one method mean nothing to another
            }
            at.insert(key.to_string(), value);
            break;
        }
        let mut below = at.entry(key).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        while let toml::Value::Array(list) = below {
            let one = keys.next().filter(|_| keys.peek().is_some());
            let one = one.ok_or_else(|| {
                fault(format!("{key} is a list: a key of one of its tables is needed"))
            })?;
            below = element(list, one).map_err(fault)?;
        }
        at = below
            .as_table_mut()
            .ok_or_else(|| fault("the key goes through a value that is no table".into()))?;
    }
    Ok(())
}

/// The table of a list that has this name.
fn element<'a>(list: &'a mut [toml::Value], of: &str) -> Result<&'a mut toml::Value, String> {
    let known: Vec<&str> = list.iter().filter_map(name).collect();
    let Some(at) = list.iter().position(|one| name(one) == Some(of)) else {
        let was = match of {
            "global" => "; what was views.global is views.crops",
            "local" => "; what was views.local is views.patches",
            _ => "",
        };
        return Err(format!("`{of}` is none of this list: {}{was}", known.join(", ")));
    };
    Ok(&mut list[at])
}

/// serde names the unknown field and all valid ones in backticks; picks the nearest.
fn nearest_key(message: &str) -> Option<String> {
    let (_, rest) = message.split_once("unknown field ")?;
    let mut names = rest.split('`').skip(1).step_by(2);
    let unknown = names.next()?;
    nearest(unknown, names).map(|name| format!("\nhint: did you mean `{name}`?"))
}

fn nearest<'a>(word: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    names
        .map(|name| (strsim::jaro_winkler(word, name), name))
        .filter(|(score, _)| *score > 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}

fn unknown_recipe(name: &str) -> ConfigError {
    let hint = nearest(name, RECIPES.iter().map(|(name, ..)| *name));
    ConfigError::UnknownRecipe {
        name: name.to_string(),
        hint: hint.map(|name| format!("; did you mean {name:?}?")).unwrap_or_default(),
        known: known_recipes(),
    }
}

fn known_recipes() -> String {
    RECIPES.iter().map(|(name, ..)| *name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use detco_shards::views::{Group, Region, Step};

    use super::*;
    use crate::method::Moco;

    #[test]
    fn a_run_goes_by_its_checkpoint_and_not_by_the_copy() {
        let run = tempfile::tempdir().unwrap();
        let small = Config::load("detco-small", &[]).unwrap();
        let said = Config::of_run(run.path()).unwrap_err().to_string();
        assert!(said.contains("config.toml"), "{said}");
        std::fs::write(run.path().join("config.toml"), Config::default().to_toml()).unwrap();
        assert_eq!(Config::of_run(run.path()).unwrap(), Config::default());
        let newest = run.path().join("checkpoints/step-000000003");
        std::fs::create_dir_all(&newest).unwrap();
        let state = serde_json::json!({ "format": 1, "config": small.to_toml() });
        std::fs::write(newest.join("state.json"), state.to_string()).unwrap();
        assert_eq!(Config::of_run(run.path()).unwrap(), small);
        std::fs::write(newest.join("state.json"), "{").unwrap();
        let said = Config::of_run(run.path()).unwrap_err().to_string();
        assert!(said.contains("state.json") && said.contains("no configuration"), "{said}");
    }

    #[test]
    fn every_recipe_is_valid_and_survives_a_round_trip() {
        for (name, ..) in RECIPES {
            let mut config = Config::load(name, &[]).unwrap_or_else(|e| panic!("{name}: {e}"));
            config.base = None;
            assert_eq!(Config::from_toml(&config.to_toml(), name).unwrap(), config, "{name}");
        }
    }

    #[test]
    fn the_paper_is_the_default() {
        let mut recipe = Config::load("detco-r50", &[]).unwrap();
        recipe.base = None;
        assert_eq!(recipe, Config::default());
    }

    #[test]
    fn a_file_builds_upon_a_recipe_key_by_key() {
        let file = tempfile::NamedTempFile::with_suffix(".toml").unwrap();
        let load = |text: &str| {
            std::fs::write(file.path(), text).unwrap();
            Config::load(file.path().to_str().unwrap(), &[])
        };
        let config = load("[[views]]\nname = \"crops\"\ncrop = { ratio = [1.0, 1.0] }\n").unwrap();
        assert_eq!(config.base.as_deref(), Some("detco-r50"));
        let region = Region::Random { scale: [0.2, 1.0], ratio: [1.0, 1.0] };
        assert_eq!(config.views.groups[0].crop.region, region);
        assert_eq!(config.views.groups[1], Recipe::detco().groups[1]);
        let config = load("base = \"moco-v2-small\"\nseed = 7\n").unwrap();
        assert_eq!((config.seed, config.model.width), (7, 16));
        // What a run has written is a recipe as well, for the same run.
        assert_eq!(load(&config.to_toml()).unwrap(), config);
        assert!(load("base = 3\n").is_err());
    }

    #[test]
    fn overrides_reach_every_type() {
        let sets = ["train.batch=64", "method.temperature=0.07", "method.levels=[5]"];
        let more = ["method.level_weights=[1]", "data.shards=[\"a\", \"b\"]", "model.stem=cifar"];
        let sets: Vec<String> = sets.iter().chain(&more).map(|s| s.to_string()).collect();
        let config = Config::load("detco-r50", &sets).unwrap();
        let moco = config.method.as_a::<Moco>().unwrap();
        assert_eq!((config.train.batch, moco.levels.clone()), (64, vec![5]));
        assert_eq!((moco.temperature, config.model.stem), (0.07, Stem::Cifar));
        assert_eq!(config.data.shards, ["a", "b"]);
    }

    #[test]
    fn overrides_reach_groups_of_views_and_their_steps_by_name() {
        let load = |set: &str| Config::load("detco-r50", &[set.to_owned()]);
        let crops = |set: &str| load(set).unwrap().views.groups.remove(0);
        assert_eq!(crops("views.crops.size=160").size, 160);
        let gray = crops("views.crops.steps.gray.p=0.5").steps;
        let gray = Recipe { groups: vec![Group { steps: gray, ..Group::default() }] };
        assert_eq!(gray.steps(&gray.groups[0])[1], Step::Gray { p: 0.5 });
        assert_eq!(load("views.patches.grid.patch=48").unwrap().patch_size(), Some(48));
        let steps = load("views.patches.steps=[{step=\"flip\", p=0.1}]").unwrap().views;
        assert_eq!(steps.steps(&steps.groups[1]), [Step::Flip { p: 0.1 }]);
        for (set, reason) in [
            ("views.global.size=160", "what was views.global is views.crops"),
            ("views.crop.size=160", "`crop` is none of this list: crops, patches"),
            ("views.crops=3", "views is a list"),
            ("views.crops.steps.blurr.p=0.5", "none of this list: jitter, gray, blur, flip"),
            ("views.crops.size.x=3", "no table"),
            ("views.crops.sise=3", "unknown key `sise`"),
            ("views.crops.steps.gray.q=3", "unknown key `q`"),
            ("views.crops.steps.gray.p=3", "views.crops.steps.gray.p = 3: must lie in [0, 1]"),
            ("views.crops.count=1", "views.crops = 1 views: expected two views without a grid"),
            ("views.patches.count=0", "views.patches = 0 views: expected two views with a grid"),
        ] {
            let error = load(set).unwrap_err().to_string();
            assert!(error.contains(reason), "{set}: {error}");
        }
        // Of no use to MoCo, and no fault.
        let moco = Config::load("moco-v2-r50", &["views.patches.count=0".to_owned()]).unwrap();
        assert_eq!((moco.training_views().groups.len(), moco.patch_size()), (1, None));
    }

    #[test]
    fn a_file_from_before_views_were_a_list_is_told_what_to_write() {
        let old = "[views.global]\nsize = 160\n";
        let error = Config::from_toml(old, "run/config.toml").unwrap_err().to_string();
        assert!(
            error.starts_with("run/config.toml: views are a list of groups: [[views]]"),
            "{error}"
        );
    }

    #[test]
    fn keys_of_a_method_stand_in_its_table() {
        let load = |sets: &[&str]| {
            Config::load("detco-r50", &sets.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        for (set, reason) in [
            ("loss.queue=512", "loss.queue is a key of the method now: method.queue"),
            ("model.dim=64", "model.dim is a key of the method now: method.dim"),
            ("method.quue=512", "did you mean `queue`"),
            ("method.name=moko", "method.name = \"moko\": there are moco"),
            ("method.name=3", "method.name = 3: expected a name"),
            ("method.rotations=4", "it is a key of rotation"),
            ("method.norm=false", "it is a key of simclr"),
        ] {
            let error = load(&[set]).unwrap_err().to_string();
            assert!(error.contains(reason), "{set}: {error}");
        }
        // A checkpoint's text from before is read for what it says.
        let config = load(&["method.queue=1024", "method.dim=64"]).unwrap();
        let mut older: toml::Table = config.to_toml().parse().unwrap();
        let mut keys = older.remove("method").unwrap().as_table().unwrap().clone();
        keys.remove("name");
        keys.remove("ema_schedule"); // there was one alone
        for (table, names) in MOVED {
            let table = older.entry(*table).or_insert_with(|| toml::Table::new().into());
            let table = table.as_table_mut().unwrap();
            table.extend(names.iter().map(|name| (name.to_string(), keys.remove(*name).unwrap())));
        }
        assert!(keys.is_empty(), "{keys:?}");
        let text = toml::to_string(&older).unwrap();
        assert_eq!(Config::from_checkpoint(&text, "state.json").unwrap(), config);
        assert!(Config::from_toml(&text, "file").is_err());
    }

    #[test]
    fn values_have_keys_by_name() {
        let flat = Config::default().flat();
        assert_eq!(flat["views.crops.steps.gray.p"], "0.2");
        assert_eq!((&*flat["views.patches.steps"], &*flat["train.batch"]), ("\"crops\"", "256"));
    }

    #[test]
    fn sizes_and_windows_are_numbers_or_words() {
        let load = |set: &str| Config::load("detco-r50", &[set.to_owned()]).map(|c| c.data);
        for (text, bytes) in [("64GiB", 64 << 30), ("1 TB", 1_000_000_000_000), ("77", 77)] {
            assert_eq!(load(&format!("data.cache_size={text}")).unwrap().cache_size, Bytes(bytes));
        }
        for (text, window) in
            [("auto", Window::Auto), ("all", Window::All), ("12", Window::Shards(12))]
        {
            assert_eq!(load(&format!("data.window={text}")).unwrap().window, window);
        }
        for wrong in ["cache_size=many", "cache_size=7 apples", "window=0", "window=most"] {
            assert!(load(&format!("data.{wrong}")).is_err(), "{wrong}");
        }
        assert!("-1".parse::<Bytes>().unwrap_err().contains("or one with a unit: 200GB"));
        assert!("99999999999999GiB".parse::<Bytes>().is_err());
    }

    #[test]
    fn an_unknown_key_names_the_nearest() {
        let error = Config::load("detco-r50", &["optim.weigth_decay=1".into()]).unwrap_err();
        assert!(error.to_string().contains("did you mean `weight_decay`"), "{error}");
        let error = Config::load("detco-r5", &[]).unwrap_err();
        assert!(error.to_string().contains("did you mean \"detco-r50\""), "{error}");
    }

    #[test]
    fn values_that_make_no_sense_are_refused_by_name() {
        for (text, key) in [
            ("train.batch=0", "train.batch"),
            ("method.queue=1000", "method.queue"),
            ("model.bn_splits=7", "model.bn_splits"),
            ("train.accumulate=3", "train.accumulate"),
            ("method.levels=[5,2]", "method.levels"),
            ("method.level_weights=[1.0]", "method.level_weights"),
            ("method.temperature=0", "method.temperature"),
            ("method.ema=1.5", "method.ema"),
            ("optim.lr=nan", "optim.lr"),
        ] {
            let error = Config::load("detco-r50", &[text.into()]).unwrap_err();
            assert!(
                matches!(&error, ConfigError::Value { key: k, .. } if *k == key),
                "{text}: {error}"
            );
        }
        let error = Config::load("detco-r50", &["train.batch".into()]).unwrap_err();
        assert!(matches!(error, ConfigError::Set { .. }), "{error}");
    }
}
