//! Predicts the speed of a cluster, its traffic, and what limits it first. Arithmetic on numbers that were
//! measured elsewhere; nothing runs here.
//!
//! # The formulas
//!
//! N nodes of G GPUs each are W = N G ranks. A rank makes a step over n samples in `step` seconds of
//! computing (`--step-ms`), so the global batch is B = W n.
//!
//! **What a rank sends a step** (zero where W = 1):
//!
//! - images of the keys, each to one rank, for shuffled batch normalisation:
//!   `n (1 - 1/W) x image`, where an image is `4 x 3 x (size^2 + 9 patch^2)` bytes of floats;
//!   What a loss reads of a sample's keys and no queue keeps comes back that way (DenseCL's cells);
//! - embeddings of the keys, to all: `(W - 1) n x 4 x dim x levels x 2` bytes (x 1 without patches).
//!   Every rank's queues take them from there, so nothing travels for the queues;
//! - gradients, by a ring: `2 (1 - 1/W) x bytes x parameters`, 4 bytes each, or 2 as bf16;
//! - means and variances of batch normalisation, 0.3 % of that for a ResNet-50: left out here.
//!
//! **Time on the network.** Rings and gathers go at the slower of `link` (between GPUs of a node) and,
//! where N > 1, `net` (of a node). The images of a node's GPUs that leave it, `G n (1 - 1/N) x image`
//! in all, go at `net`, those of a rank at `link`, and the slower counts. Of what a network carries
//! 95 % is ours, the rest headers. Each bucket of gradients (one of 1 MiB, then of `dist.bucket_mb`)
//! costs 2 (W - 1) latencies, the gather W - 1, the exchange one.
//!
//! **What hides behind backward**, B = `backward x step`: backward goes through the patches first, then
//! through the crops, which are `g = size^2 / (size^2 + 9 patch^2)` of it. The local heads' gradients
//! are ready at once, and travel as far as they fill buckets: `early`. All other weights are used by
//! both, and ready in the crops' part. The last bucket is full when backward ends: `last`.
//!
//! ```text
//! late     = gradients - early
//! rest     = max(last, max(early, (1 - g) B) + late - B)
//! exposed  = images + embeddings + rest
//! in step  = B / (step + exposed)                     images/s, if data is always there
//! cores    = N x cores x 1000 / cpu_ms                images/s that all cores prepare
//! storage  = N x storage / image_bytes                images/s that nodes read, each for itself
//! store    = store / image_bytes                      images/s that one store gives them all
//! images/s = the least of these four
//! days     = epochs x samples / images/s / 86,400
//! cores a GPU = in step / W x cpu_ms / 1000
//! ```
//!
//! Of the step's arithmetic, backward is a half (the query's forward pass 1, its backward pass 2, the
//! key's forward pass 1): that is the default of `backward`, since gradients are averaged while
//! backward goes on.
//!
//! **The first bottleneck** is what gives the least: the cores, the storage, the store; or, where
//! the step does, the network if it takes longer than the computing, else the GPU.
//!
//! # What it leaves out
//!
//! Stragglers, other traffic, checkpoints, evaluation, the first epoch's cold cache, and that cores
//! which feed GPUs have other work too. Defaults that were measured say where; those that were not
//! (`link`, `latency`) are usual values of PCIe 4 and of Ethernet.

#[cfg(test)]
mod tests;

use serde::Serialize;

use crate::config::Config;
use crate::method::{HeadDesign, PassDesign};
use crate::shapes;

/// CPU milliseconds per image from JPEG to the four views of DetCo, without a profile: 307 images/s
/// per core (`benches/record/2026-11-23-views.md`, an AMD EPYC with AVX2).
pub const CPU_MS: f64 = 1e3 / 307.0;
/// Bytes of a compressed image of ImageNet: 138 GB of 1,281,167.
pub const IMAGE_BYTES: f64 = 138e9 / 1_281_167.0;
/// Samples of ImageNet's training set.
pub const IMAGENET: u64 = 1_281_167;
/// Share of the network's traffic that is payload: between two network namespaces 4.79 MB per step
/// were sent for 4.56 (`benches/record/2026-11-23-ranks.md`).
const OURS: f64 = 0.95;
/// Bytes of the first bucket of gradients: libtorch's `kDefaultFirstBucketBytes`.
const FIRST_BUCKET: f64 = (1 << 20) as f64;
/// Bytes of a float.
const FLOAT: f64 = 4.0;

/// A cluster and a job. All numbers are above 0 and finite; bandwidths are bytes a second.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cluster {
    /// Nodes, N.
    pub nodes: u64,
    /// GPUs of a node, G.
    pub gpus: u64,
    /// Samples of a step on each GPU, n.
    pub batch: u64,
    /// Seconds of computing of a step.
    pub step: f64,
    /// Share of the step that is backward, 0 to 1.
    pub backward: f64,
    /// Bandwidth between the GPUs of a node.
    pub link: f64,
    /// Network bandwidth of a node; `None` for a single node.
    pub net: Option<f64>,
    /// Latency between two ranks in seconds.
    pub latency: f64,
    /// Bytes of a gradient element: 4, or 2.
    pub gradient_bytes: f64,
    /// Read bandwidth of each node; `None` is unlimited.
    pub storage: Option<f64>,
    /// Bandwidth of one store for all nodes; `None` is unlimited.
    pub store: Option<f64>,
    /// CPU cores of a node; `None` is unlimited.
    pub cores: Option<f64>,
    /// CPU milliseconds per image.
    pub cpu_ms: f64,
    /// Compressed bytes of an image.
    pub image_bytes: f64,
    /// Samples of the data set.
    pub samples: u64,
    /// Epochs.
    pub epochs: u64,
}

/// The parts of a model that are sent between ranks.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Load {
    /// Parameters with a gradient.
    pub parameters: u64,
    /// Values of a key's images: its crop and its nine patches.
    pub image_values: u64,
    /// Values of a key's embeddings, all levels and scopes.
    pub embedding_values: u64,
    /// Bytes of a bucket of gradients, as floats.
    pub bucket: f64,
    /// Parameters of the local heads, which are included above.
    pub local_parameters: u64,
    /// Share of backward that goes through the crops, 0 to 1.
    pub crops: f64,
}

/// What a rank sends in a step, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Sent {
    /// Images of keys.
    pub images: f64,
    /// Embeddings of keys.
    pub embeddings: f64,
    /// Gradients.
    pub gradients: f64,
}

/// The first bottleneck.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Bottleneck {
    /// The computing of a step.
    Gpu,
    /// The network between ranks.
    Network,
    /// The cores that decode and render.
    Cores,
    /// The storage of each node.
    Storage,
    /// The store of all nodes.
    Store,
}

/// The prediction.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Forecast {
    /// Ranks, W.
    pub ranks: u64,
    /// Images/s of all ranks.
    pub images_per_s: f64,
    /// Days for all epochs.
    pub days: f64,
    /// Seconds per step spent waiting for the network.
    pub exposed: f64,
    /// Seconds per step in which the network is busy.
    pub network: f64,
    /// What a rank sends in a step.
    pub sent: Sent,
    /// Bytes a second that a node sends to others.
    pub node_sends: f64,
    /// Bytes a second that all nodes read.
    pub reads: f64,
    /// CPU cores needed per GPU.
    pub cores_per_gpu: f64,
    /// Images/s that each part would allow alone.
    pub limits: Limits,
    /// The part that allows the least.
    pub bottleneck: Bottleneck,
}

/// Images a second that each part would allow by itself; `None` where it was not stated, or is not
/// needed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Limits {
    /// Computing.
    pub gpu: f64,
    /// The network.
    pub network: Option<f64>,
    /// Cores.
    pub cores: Option<f64>,
    /// Each node's storage.
    pub storage: Option<f64>,
    /// The one store.
    pub store: Option<f64>,
}

impl Load {
    /// The parts of a configuration's model that are sent.
    pub fn of(config: &Config) -> Load {
        let design = config.design();
        let pixels = |pass: &PassDesign| {
            let edge = config.views.group(&pass.group).map_or(0, |group| group.images().1);
            pass.images as u64 * u64::from(edge).pow(2)
        };
        let all: u64 = design.passes.iter().map(pixels).sum();
        let first = design.passes.first().map_or(0, pixels);
        let shuffles = design.teacher.is_some_and(|teacher| teacher.shuffles);
        // Outputs of the teacher, or of a student whose rows are coupled.
        let (mut gathered, mut sent_home) = (0, 0);
        for pass in &design.passes {
            let edge = config.views.group(&pass.group).map_or(0, |group| group.images().1);
            for head in design.heads_of(&pass.scope) {
                let rows = shapes::rows(&config.model, head, pass.images, edge.into());
                let values = (rows / head.joined * head.width) as u64;
                let meets = match design.teacher {
                    Some(_) => head.in_teacher,
                    None => design.is_coupled,
                };
                match (meets, head.is_gathered) {
                    (false, _) => {}
                    (true, true) => gathered += values,
                    (true, false) => sent_home += values,
                }
            }
        }
        // Gradients of other scopes' heads come before the first's.
        let scope = design.passes.first().map(|pass| pass.scope.as_str()).unwrap_or_default();
        let later = design.heads.iter().filter(|head| head.scope != scope);
        Load {
            parameters: parameters(config),
            image_values: if shuffles { 3 * all + sent_home } else { 0 },
            embedding_values: gathered,
            bucket: (config.dist.bucket_mb << 20) as f64,
            local_parameters: later.map(HeadDesign::parameters).sum::<i64>() as u64,
            crops: first as f64 / all.max(1) as f64,
        }
    }

    /// The share of all gradients in the buckets that the local heads fill.
    fn early(&self) -> f64 {
        let local = FLOAT * self.local_parameters as f64 - FIRST_BUCKET.min(self.bucket);
        if local < 0.0 {
            return 0.0;
        }
        let whole = FIRST_BUCKET.min(self.bucket) + (local / self.bucket).floor() * self.bucket;
        whole / (FLOAT * self.parameters as f64)
    }

    /// The number of buckets, and the share of all gradients that the last one holds.
    fn buckets(&self) -> (f64, f64) {
        let bytes = FLOAT * self.parameters as f64;
        let first = FIRST_BUCKET.min(self.bucket).min(bytes);
        let more = ((bytes - first) / self.bucket).ceil();
        let last = if more < 1.0 { first } else { bytes - first - (more - 1.0) * self.bucket };
        (1.0 + more, last / bytes)
    }
}

/// Numbers that training changes: convolutions, the scales and offsets of batch normalisation, heads
/// with their biases.
pub fn parameters(config: &Config) -> u64 {
    shapes::parameters(&config.model, &config.design()) as u64
}

impl Cluster {
    fn ranks(&self) -> f64 {
        (self.nodes * self.gpus) as f64
    }

    /// Samples of the global batch.
    pub fn global_batch(&self) -> u64 {
        self.nodes * self.gpus * self.batch
    }

    /// What a rank sends in a step.
    fn sent(&self, load: &Load) -> Sent {
        let (ranks, n) = (self.ranks(), self.batch as f64);
        let others = 1.0 - 1.0 / ranks;
        Sent {
            images: n * others * FLOAT * load.image_values as f64,
            embeddings: (ranks - 1.0) * n * FLOAT * load.embedding_values as f64,
            gradients: 2.0 * others * self.gradient_bytes * load.parameters as f64,
        }
    }

    /// Images of a node's keys that leave it in a step, in bytes.
    fn leaving(&self, load: &Load) -> f64 {
        let elsewhere = 1.0 - 1.0 / self.nodes as f64;
        (self.gpus * self.batch) as f64 * elsewhere * FLOAT * load.image_values as f64
    }

    /// Seconds per step for images, embeddings and gradients, and the part of the gradients' that does not
    /// overlap with the backward pass.
    fn network(&self, load: &Load) -> [f64; 4] {
        let ranks = self.ranks();
        if ranks < 2.0 {
            return [0.0; 4];
        }
        let net = self.net.map(|net| OURS * net);
        let sent = self.sent(load);
        let ring = net.unwrap_or(f64::INFINITY).min(self.link);
        let abroad = net.map_or(0.0, |net| self.leaving(load) / net);
        let (buckets, last) = load.buckets();
        let round = 2.0 * (ranks - 1.0) * self.latency;
        let gradients = sent.gradients / ring + buckets * round;
        let (backward, early) = (self.backward * self.step, load.early() * gradients);
        let crops_begin = (1.0 - load.crops) * backward;
        let end = early.max(crops_begin) + gradients - early;
        [
            (sent.images / self.link).max(abroad) + self.latency,
            sent.embeddings / ring + (ranks - 1.0) * self.latency,
            gradients,
            (end - backward).max(last * sent.gradients / ring + round),
        ]
    }

    /// Predicts the training of this model on this cluster.
    pub fn forecast(&self, load: &Load) -> Forecast {
        let (ranks, nodes) = (self.ranks(), self.nodes as f64);
        let batch = self.global_batch() as f64;
        let [images, embeddings, gradients, rest] = self.network(load);
        let exposed = images + embeddings + rest;
        let network = images + embeddings + gradients;
        let limits = Limits {
            gpu: batch / self.step,
            network: (network > 0.0).then(|| batch / network),
            cores: self.cores.map(|cores| nodes * cores * 1e3 / self.cpu_ms),
            storage: self.storage.map(|bytes| nodes * bytes / self.image_bytes),
            store: self.store.map(|bytes| bytes / self.image_bytes),
        };
        let in_step = batch / (self.step + exposed);
        let step = if network > self.step { Bottleneck::Network } else { Bottleneck::Gpu };
        let data = [
            (limits.cores, Bottleneck::Cores),
            (limits.storage, Bottleneck::Storage),
            (limits.store, Bottleneck::Store),
        ];
        let data = data.into_iter().filter_map(|(limit, what)| Some((limit?, what)));
        let (images_per_s, bottleneck) =
            data.fold((in_step, step), |least, one| if one.0 < least.0 { one } else { least });
        let sent = self.sent(load);
        let ring = sent.embeddings + sent.gradients;
        let abroad = if self.nodes > 1 { self.leaving(load) + ring } else { 0.0 };
        Forecast {
            ranks: self.nodes * self.gpus,
            images_per_s,
            days: self.epochs as f64 * self.samples as f64 / images_per_s / 86_400.0,
            exposed,
            network,
            sent,
            node_sends: abroad * images_per_s / batch,
            reads: images_per_s * self.image_bytes,
            cores_per_gpu: in_step / ranks * self.cpu_ms / 1e3,
            limits,
            bottleneck,
        }
    }
}
