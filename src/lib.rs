//! `detco`: from a folder of images to a DetCo backbone.
//!
//! # The flow
//!
//! ```text
//!  images ──pack──▶ shards (.tar + .idx)                                            weights ──export──▶ torchvision, detectron2
//!                      │ mmap, no copies                                               ▲
//!                      ▼                                                               │
//!    order ──▶ stream ──▶ decode ──▶ views ──▶ slab ──▶ batch ──▶ model ──▶ loss ──▶ step ──▶ checkpoint
//!    (seed,     slices    pixels     2 crops   recycled  tensors   query,    12 terms   SGD, EMA,
//!     epoch)    of a map             2 × 9     buffers             key                  queues
//!                                    patches
//! ```
//!
//! Two halves. The data plane, crate [`detco_shards`], turns bytes on disk into a slab of pixels and
//! never names a tensor: it builds, tests and runs without libtorch. The trainer, this crate behind
//! the feature `train`, turns slabs into tensors and tensors into weights.
//!
//! # The map, in the order of the flow
//!
//! | module | what it does | what it never does |
//! |---|---|---|
//! | [`exit`] | exit codes, and which errors have one | end the process |
//! | `console` | lines for whoever watches; standard output | end a run that nobody watches |
//! | [`export_format`] | the names of the formats that weights are exported in, and of the tables that have configs | |
//! | [`config`] | a recipe, a file and `--set` to one validated [`config::Config`]; reads the environment | open data |
//! | [`shapes`] | the layers of a backbone as numbers: channels, kernels, sizes | make a tensor |
//! | [`data`] | the table `data` to open shards and an order | read a sample |
//! | `detco_shards::format` | tar, index, map, writer, manifest: the format, byte by byte | end quietly on foreign bytes |
//! | `detco_shards::pack` | images, class folders, ImageNet's tar of tars to shards | hold more than one image a worker |
//! | `detco_shards::order` | `(seed, epoch, step, slot)` to a sample id | keep an array of samples |
//! | `detco_shards::cache` | a folder of bounded size, shared by processes | fetch |
//! | `detco_shards::stream` | a sample id to slices of the map; shards behind URLs, fetched ahead | copy an image |
//! | `detco_shards::decode` | JPEG to RGB, Pillow's pixels | return half a picture |
//! | `detco_shards::views` | draw a plan from identity, then render it | share random numbers |
//! | `detco_shards::cuda`, `views::cuda` | the driver and NVRTC, found when asked for; the same plans rendered on a GPU | wait for the device |
//! | `detco_shards::slab`, `pipe`, `stats`, `trace`, `pipeline` | recycled buffers, threads, counters, timelines, the wiring | allocate pixels after warm-up |
//! | `detco_shards::device` | the same wiring where the pixels are made on a GPU: batches stay there | wait for the device on the hot path without saying where |
//! | [`source`] | the loader, or the device pipeline: who makes batches | know a tensor |
//! | [`shim`] | what libtorch has and `tch` has not, in C++ | let an exception through |
//! | [`device`] | where tensors live, in which precision | load CUDA unasked |
//! | [`batch`] | slabs to normalised tensors: the only place where bytes become tensors | |
//! | [`feed`] | a batch of either source to a step's tensors, and its memory back | wait for the device |
//! | [`draws`] | random numbers with an address | draw from a global state |
//! | [`model`] | ResNet, heads, encoders, queues | know a rank, a clock or a disk |
//! | [`method`] | one file a method: what it is made of, what its encoders see, the gradients of its loss; [`method::parts`] is what methods share | make a pass |
//! | [`optim`], [`schedule`] | SGD and LARS with a state that can be saved; learning rates | |
//! | [`dist`] | ranks: their world, collectives, who is lost | name what a step computes |
//! | `micro`, `report` | a batch in parts of whole BN groups; what a step saw | |
//! | [`step`] | one update in ten moves | name a method; touch weights after a loss that is not finite |
//! | [`memory`] | what a step will need, by arithmetic on shapes | |
//! | [`disk`] | what checkpoints will take, and what the disk has | |
//! | [`checkpoint`] | everything needed to go on, one atomic directory | leave a half one |
//! | [`metrics`] | JSON lines, TensorBoard events, progress | |
//! | [`subset`] | subsets of COCO annotations by image | draw by place in a file |
//! | [`plan`] | what a cluster would give, by arithmetic | measure |
//! | [`profile`] | the data path measured as it runs, and what limits it | measure a copy of the pipeline |
//! | [`mod@train`] | the loop; the only place that knows everything | |
//! | [`dry_run`] | everything up to the first step, and what it will take | change a file |
//! | [`eval`] | kNN, linear classifiers, SVMs, features, average precision, a detection probe, attention maps, reports; classes of two sets compared | change a backbone |
//! | [`weights`], [`export`] | foreign weights in, ours out; folders with which other engines train detectors | run a pickle's code |
//! | [`guide`] | the guides, which `detco guide` shows too | |
//! | [`cli`] | the command line, one file a subcommand | compute |
//!
//! Beside the crates: `shards/resize` is the data plane's slow-to-build part, `shards/twin` a GPU's stand-ins
//! for tests (kernels, driver, nvJPEG), and `tools` is `cargo xtask` (setup, demo, test, check, peers, gpu-check),
//! with files for Slurm and others in `tools/cluster`.
//!
//! A module names only modules above it; the loop and the command line come last and see everything.
//!
//! # Invariants
//!
//! - A JPEG byte is not copied between page cache and decoder.
//! - Views are drawn from `(run seed, epoch, sample, view)` alone, then rendered by a pure function:
//!   one worker and sixteen give the same bytes.
//! - Order is arithmetic: global batch *g* of epoch *e* is the same whatever the number of ranks,
//!   workers or restarts. Resuming is a cursor.
//! - Every channel is bounded and its bound is named; everything stops by disconnection.
//! - Files appear whole: sibling temp file, flush, rename, flush of the folder.
//! - `unsafe` lives in the map, the slab, the AVX2 views, the wall around CUDA and its launches,
//!   nvJPEG's wall and its engine, the profile's counting allocator, the shim, the feed that lends it
//!   the pipeline's memory, and nowhere else.
//!
//! # Two binaries
//!
//! `detco` parses the command line and runs the data plane's commands; it hands those that need
//! libtorch over to `detco-train`, so that nobody pays for loading libtorch who does not use it.

#[macro_use]
mod console;

pub mod cli;
pub mod config;
pub mod data;
pub mod exit;
#[path = "export/format.rs"]
pub mod export_format;
pub mod guide;
pub mod shapes;
pub mod source;
pub mod subset;

#[cfg(feature = "train")]
pub mod batch;
#[cfg(feature = "train")]
pub mod checkpoint;
#[cfg(feature = "train")]
pub mod device;
#[cfg(feature = "train")]
pub mod disk;
#[cfg(feature = "train")]
pub mod dist;
pub mod draws;
#[cfg(feature = "train")]
pub mod dry_run;
#[cfg(feature = "train")]
pub mod eval;
#[cfg(feature = "train")]
pub mod export;
#[cfg(feature = "train")]
pub mod feed;
#[cfg(feature = "train")]
pub mod memory;
pub mod method;
pub mod metrics;
#[cfg(feature = "train")]
mod micro;
#[cfg(feature = "train")]
pub mod model;
#[cfg(feature = "train")]
pub mod optim;
pub mod plan;
pub mod profile;
#[cfg(feature = "train")]
mod report;
pub mod schedule;
#[cfg(feature = "train")]
pub mod shim;
#[cfg(feature = "train")]
pub mod step;
#[cfg(feature = "train")]
pub mod train;
#[cfg(feature = "weights")]
pub mod weights;
