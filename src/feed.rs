//! From a batch of views to the tensors that a step reads, and the batch's memory back.
//!
//! Views in a slab are [copied](Feeder). Views that the device pipeline made lie where the model is,
//! as its encoders want them: tensors are put over them, and nothing is copied. Such a batch is
//! *lent*: its memory goes back to the pipeline when no tensor reads it any more, behind the work
//! that the step has queued, and the host waits for nothing.
//!
//! Not yet run on a GPU; the twin of a device goes the same way on the CPU.

#![expect(unsafe_code, reason = "tensors over the pipeline's memory")]

use std::time::{Duration, Instant};

#[cfg(feature = "nvjpeg")]
use detco_shards::cuda::{CudaError, Stream};
use detco_shards::device::{Decode, Decoding, Number, Setup, Share};
use detco_shards::pipeline::{Filled, Views};
use detco_shards::views::Note;
use tch::Device;
use thiserror::Error;

use crate::batch::{Batch, BatchError, Feeder, Form, Sections};
use crate::config::{self, Config, ConfigError};
use crate::device::{Found, in_bf16};
use crate::shim::ShimError;
use crate::shim::feed::{self as shim, Lie, Loan, Span};
use crate::source::{Source, Taken};

/// With `train.deterministic`, of what the batch decoder takes: a measured share would be another in
/// each run, and the two decoders may differ by a rounding.
const FIXED_SHARE: f64 = 0.5;

/// Why a batch becomes no tensors.
#[derive(Debug, Error)]
pub enum FeedError {
    /// Its bytes do not fit, or libtorch failed.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// libtorch failed.
    #[error(transparent)]
    Shim(#[from] ShimError),
    /// The driver failed.
    #[cfg(feature = "nvjpeg")]
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// The pipeline's batch holds nothing, or nothing normalised.
    #[error("the device pipeline handed out a batch without views")]
    NoViews,
    /// Somebody keeps tensors beyond their step.
    #[error("{tensors} tensors of a batch are still held when the step after it has been queued")]
    Held {
        /// How many.
        tensors: i64,
    },
}

/// How views come to the tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From slabs, by a copy.
    Copied,
    /// They are where the model is.
    Lent,
}

impl Way {
    /// As this decoder's batches go.
    pub fn of(decoding: &Decoding) -> Way {
        match decoding {
            Decoding::Cpu { .. } => Way::Copied,
            _ => Way::Lent,
        }
    }
}

/// Who decodes and renders for a run on this device: what `data.decode` asks for, held against what
/// is here. nvJPEG decodes on the GPU on which the model is, and nowhere else.
///
/// # Errors
/// `nvjpeg` was asked for and cannot be had: says what is missing.
pub fn decoding(config: &Config, found: &Found) -> Result<Decoding, ConfigError> {
    let wanted = config.data.decode;
    let refused = |reason: String| {
        let (key, value) = ("data.decode", "nvjpeg".to_owned());
        ConfigError::Value { key, value, reason }
    };
    match found.device {
        Device::Cuda(index) => {
            let libtorch = shim::libtorch();
            let setup = config::gpu(number(config, found.device), libtorch.as_deref());
            let setup = Setup { ordinal: index as u32, ..setup };
            let views = Views::Recipe(config.training_views());
            wanted.resolve(&setup, &views).map_err(|missing| refused(missing.to_string()))
        }
        _ if wanted == Decode::Nvjpeg => Err(refused(format!(
            "nvJPEG decodes where the model is, and this run is on {}",
            found.describe()
        ))),
        _ => Ok(Decoding::Cpu { missing: None }),
    }
}

/// What the views' numbers are on this device.
pub fn number(config: &Config, device: Device) -> Number {
    if in_bf16(&config.train, device) { Number::Bf16 } else { Number::F32 }
}

/// How the load is shared between a device's decoders.
pub fn share(config: &Config) -> Share {
    if config.train.deterministic { Share::Fixed(FIXED_SHARE) } else { Share::Measure }
}

/// How long a step's batch was waited for.
///
/// On a CPU, which computes when it is told to, that is how long the loader took. A GPU works while
/// the host waits: there it is the time from the later of two moments, when the GPU had done what it
/// had been given and when the host began to wait, to when the views were on it. Both are measured
/// alike whoever made the batch.
#[derive(Debug)]
pub struct Wait {
    start: Instant,
    host: Duration,
    device: Option<Span>,
}

impl Wait {
    /// Begins, before the loader is asked.
    ///
    /// # Errors
    /// When the device failed.
    pub fn begin(device: Device) -> Result<Wait, ShimError> {
        let device = Span::begin(device)?;
        Ok(Wait { start: Instant::now(), host: Duration::ZERO, device })
    }

    /// The loader has handed the batch out.
    pub fn handed_out(&mut self) {
        self.host = self.start.elapsed();
    }

    /// The current stream has been told to wait for the views, and to do nothing with them so far.
    fn queued(&mut self) -> Result<(), ShimError> {
        self.device.as_mut().map_or(Ok(()), Span::end)
    }

    /// How long it was. Asked after the step, when the device has long passed it; before, it waits.
    ///
    /// # Errors
    /// When the device failed.
    pub fn read(&self) -> Result<Duration, ShimError> {
        self.device.as_ref().map_or(Ok(self.host), Span::read)
    }
}

/// Makes a run's batches into tensors.
#[derive(Debug)]
pub struct Feed {
    form: Form,
    /// Groups of views and how many of each, whose notes go with a batch.
    groups: Vec<(String, usize)>,
    /// For views in slabs.
    feeder: Option<Feeder<Filled>>,
    /// Batches that tensors may still read.
    lent: Vec<Lent>,
    #[cfg(feature = "nvjpeg")]
    gpu: Option<std::sync::Arc<detco_shards::cuda::Device>>,
}

/// The tensors of a step. They go back through [`Feed::give_back`].
#[derive(Debug)]
pub struct Fed {
    /// What the step reads.
    pub batch: Batch,
    // After the batch: the order of the fields is the order of dropping.
    lent: Option<Lent>,
}

/// A batch of the pipeline's that tensors lie over.
#[derive(Debug)]
struct Lent {
    loan: Loan,
    /// None when it has been given back.
    taken: Option<Taken>,
}

impl Drop for Lent {
    fn drop(&mut self) {
        // Memory that a tensor may still read is better lost than overwritten.
        if !matches!(self.loan.out(), Ok(0)) {
            std::mem::forget(self.taken.take());
        }
    }
}

impl Feed {
    /// For the batches of this source, on this device.
    ///
    /// # Errors
    /// When the memory for copies is not there, on the host or on the device.
    pub fn new(
        config: &Config,
        device: Device,
        source: &Source,
        ranks: usize,
    ) -> Result<Feed, FeedError> {
        let form = Form::of(config, device);
        let samples = config.train.batch as usize / ranks;
        let bytes = samples * config.training_views().bytes();
        let feeder = source.fills_slabs().then(|| Feeder::new(form, bytes)).transpose()?;
        #[cfg(feature = "nvjpeg")]
        let gpu = source.gpu().cloned();
        let groups = config.training_views().groups.into_iter();
        Ok(Feed {
            form,
            groups: groups.map(|group| (group.name, group.count as usize)).collect(),
            feeder,
            lent: Vec::new(),
            #[cfg(feature = "nvjpeg")]
            gpu,
        })
    }

    /// The tensors of a batch. A slab is kept until its views have left it; others are lent.
    ///
    /// # Errors
    /// When the views are not what the config asks for, or the device failed.
    pub fn take(&mut self, taken: Taken, wait: &mut Wait) -> Result<Fed, FeedError> {
        let notes = self.notes(&taken);
        let Fed { batch, lent } = self.tensors(taken, wait)?;
        Ok(Fed { batch: batch.with_notes(notes), lent })
    }

    /// What was drawn with each view.
    fn notes(&self, taken: &Taken) -> Vec<(String, Vec<Vec<Note>>)> {
        let samples = taken.samples().len();
        let of = |(group, views): &(String, usize)| {
            let view = |view| (0..samples).map(|slot| taken.note(group, view, slot)).collect();
            (group.clone(), (0..*views).map(view).collect())
        };
        self.groups.iter().map(of).collect()
    }

    fn tensors(&mut self, taken: Taken, wait: &mut Wait) -> Result<Fed, FeedError> {
        #[cfg(feature = "nvjpeg")]
        if let Some(stream) = self.stream()? {
            taken.wait_on(&stream)?;
        }
        match taken.into_slab() {
            Ok(filled) => {
                if filled.layout().is_none_or(|layout| layout.views() == 0) {
                    return Err(FeedError::NoViews);
                }
                let feeder = self.feeder.as_mut().ok_or(FeedError::NoViews)?;
                let queued = || wait.queued();
                let batch = feeder.batch(filled, |filled| Sections::of(filled), queued)?;
                Ok(Fed { batch, lent: None })
            }
            Err(taken) => {
                wait.queued()?;
                self.lend(*taken)
            }
        }
    }

    /// Tensors over a device's batch.
    fn lend(&self, taken: Taken) -> Result<Fed, FeedError> {
        let (n, at) = (taken.samples().len(), taken.pointers().ok_or(FeedError::NoViews)?);
        let form = self.form;
        assert_eq!(at.number() == Number::Bf16, form.bf16, "the pipeline was opened for this form");
        assert!(n <= at.layout().n(), "{n} samples in room for {}", at.layout().n());
        let lent = Lent { loan: Loan::new()?, taken: Some(taken) };
        let n = n as i64;
        let over = |address: u64, sizes: &[i64], strides: &[i64]| {
            let lie = Lie { sizes, strides, bf16: form.bf16, device: form.device };
            // SAFETY: the pipeline's addresses are those of as many numbers of this kind on the
            // model's device. They are its batch's until `taken` is dropped, which `give_back` does
            // behind their readers and only when no tensor is out, as does `Lent::drop`.
            let lies = unsafe { lent.loan.lend(address, lie) }?;
            Ok::<_, ShimError>(if form.channels_last { lies } else { lies.contiguous() })
        };
        let image = |edge: i64| [3 * edge * edge, 1, 3 * edge, 3];
        let (mut groups, mut addresses) = (Vec::new(), at.views().iter());
        for section in at.layout().sections() {
            let shape: Vec<i64> = section.shape.iter().map(|length| *length as i64).collect();
            let (sizes, strides) = match shape[..] {
                [patches, edge, ..] if shape.len() == 4 => {
                    let [set, channel, row, column] = image(edge);
                    let strides = vec![patches * set, set, channel, row, column];
                    (vec![n, patches, 3, edge, edge], strides)
                }
                [edge, ..] => (vec![n, 3, edge, edge], image(edge).to_vec()),
                [] => return Err(FeedError::NoViews),
            };
            let views = addresses.by_ref().take(section.views);
            let views = views.map(|address| over(*address, &sizes, &strides));
            groups.push((section.name.clone(), views.collect::<Result<Vec<_>, _>>()?));
        }
        if groups.is_empty() {
            return Err(FeedError::NoViews);
        }
        Ok(Fed { batch: Batch::new(groups), lent: Some(lent) })
    }

    /// After the step has been queued: the batch's memory goes back behind it.
    ///
    /// # Errors
    /// When the device failed, or tensors of the batch before are still held.
    pub fn give_back(&mut self, fed: Fed) -> Result<(), FeedError> {
        let Fed { batch, lent } = fed;
        drop(batch);
        if let Some(feeder) = &mut self.feeder {
            feeder.release()?;
        }
        self.lent.extend(lent);
        // A thread of libtorch's may be about to let go of what the newest step has read.
        let mut held = Vec::new();
        for lent in std::mem::take(&mut self.lent) {
            match lent.loan.out()? {
                0 => self.release(lent)?,
                tensors => held.push((tensors, lent)),
            }
        }
        let oldest = held.first().map_or(0, |(tensors, _)| *tensors);
        let count = held.len();
        self.lent.extend(held.into_iter().map(|(_, lent)| lent));
        if count > 1 { Err(FeedError::Held { tensors: oldest }) } else { Ok(()) }
    }

    /// Nobody reads it but what has been queued.
    fn release(&self, mut lent: Lent) -> Result<(), FeedError> {
        let taken = lent.taken.take();
        #[cfg(feature = "nvjpeg")]
        if let (Some(batch), Some(stream)) = (&taken, self.stream()?) {
            batch.release_on(&stream)?;
        }
        drop(taken);
        Ok(())
    }

    /// The stream on which libtorch works now.
    #[cfg(feature = "nvjpeg")]
    fn stream(&self) -> Result<Option<Stream>, FeedError> {
        let (Some(gpu), Device::Cuda(index)) = (&self.gpu, self.form.device) else {
            return Ok(None);
        };
        let handle = shim::stream(index)?;
        // SAFETY: libtorch's streams are of the primary context, as is the pipeline's `Device`, which
        // was opened with this index, and live as long as the process.
        Ok(Some(unsafe { Stream::from_raw(gpu, handle) }))
    }
}
