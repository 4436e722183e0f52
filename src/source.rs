//! Where batches of views come from: the loader, into slabs, or the pipeline whose pixels are made on
//! a device and stay there. What reads them, the trainer and the profile, asks here.
//!
//! Order, views, substitutes and counters are the same whoever decodes.

use std::convert::Infallible;
use std::sync::Arc;

#[cfg(feature = "nvjpeg")]
use detco_shards::cuda::{Device, Stream};
use detco_shards::device::{
    Counts, Decoding, DeviceBatch, DeviceError, DeviceLoader, DeviceOptions, Host, Share,
};
#[cfg(feature = "nvjpeg")]
use detco_shards::device::{Cuda, GpuError};
use detco_shards::format::ShardError;
use detco_shards::order::Cursor;
use detco_shards::pipeline::{BadSample, Filled, Loader, LoaderOptions, PipelineError};
#[cfg(feature = "nvjpeg")]
use detco_shards::slab::Slab;
use detco_shards::stats::{Snapshot, Stats};
use detco_shards::stream::ShardSet;
use detco_shards::views::Note;
use indicatif::HumanCount;
use thiserror::Error;

/// Why there is no next batch.
#[derive(Debug, Error)]
pub enum SourceError {
    /// Samples, or threads.
    #[error("{0}")]
    Pipeline(#[source] Box<PipelineError>),
    /// The GPU that decodes and renders.
    #[cfg(feature = "nvjpeg")]
    #[error("the GPU failed the data path: {0}")]
    Gpu(#[source] Box<GpuError>),
}

impl From<PipelineError> for SourceError {
    fn from(error: PipelineError) -> SourceError {
        SourceError::Pipeline(Box::new(error))
    }
}

impl From<DeviceError<Infallible>> for SourceError {
    fn from(error: DeviceError<Infallible>) -> SourceError {
        match error {
            DeviceError::Pipeline(error) => error.into(),
            DeviceError::Engine(never) => match never {},
        }
    }
}

#[cfg(feature = "nvjpeg")]
impl From<GpuError> for SourceError {
    fn from(error: GpuError) -> SourceError {
        SourceError::Gpu(Box::new(error))
    }
}

#[cfg(feature = "nvjpeg")]
impl From<DeviceError<GpuError>> for SourceError {
    fn from(error: DeviceError<GpuError>) -> SourceError {
        match error {
            DeviceError::Pipeline(error) => error.into(),
            DeviceError::Engine(error) => error.into(),
        }
    }
}

/// A loader that runs.
#[derive(Debug)]
pub enum Source {
    /// Into slabs.
    Host(Box<Loader>),
    /// Onto a device's twin in host memory.
    Twin(Box<DeviceLoader<Host>>),
    /// Onto a GPU; and a stream for [`Source::pass`].
    #[cfg(feature = "nvjpeg")]
    Gpu(Box<DeviceLoader<Cuda>>, Stream),
}

/// A batch. Dropping it gives its memory back.
#[derive(Debug)]
pub enum Taken {
    /// In a slab.
    Host(Filled),
    /// In memory of a device's twin.
    Twin(Box<DeviceBatch<Host>>),
    /// On a GPU, or about to be there.
    #[cfg(feature = "nvjpeg")]
    Gpu(Box<DeviceBatch<Cuda>>),
}

impl Source {
    /// Starts what `decoding` asks for. `share` is for devices with a batch decoder. Where a GPU is to
    /// copy from slabs, their pages are locked for it: `copied_by` is its number.
    ///
    /// # Errors
    /// No threads, or no room on the device.
    pub fn start(
        set: &Arc<ShardSet>,
        options: LoaderOptions,
        decoding: Decoding,
        share: Share,
        copied_by: Option<u32>,
    ) -> Result<Source, SourceError> {
        let set = Arc::clone(set);
        let of_device = |loader| DeviceOptions { loader, share };
        Ok(match decoding {
            Decoding::Cpu { .. } => Source::Host(Box::new(loader(set, options, copied_by)?)),
            Decoding::Twin(host) => {
                Source::Twin(Box::new(DeviceLoader::start(set, host, of_device(options))?))
            }
            #[cfg(feature = "nvjpeg")]
            Decoding::Nvjpeg(cuda) => {
                let stream = Stream::new(cuda.device()).map_err(GpuError::from)?;
                let loader = DeviceLoader::start(set, *cuda, of_device(options))?;
                Source::Gpu(Box::new(loader), stream)
            }
        })
    }

    /// The next batch; `None` at the end. A GPU may not have made it yet: what reads it must be
    /// queued behind it.
    ///
    /// # Errors
    /// What ends the run.
    #[expect(clippy::should_implement_trait, reason = "no caller iterates")]
    pub fn next(&mut self) -> Option<Result<Taken, SourceError>> {
        match self {
            Source::Host(loader) => {
                Some(loader.next()?.map(Taken::Host).map_err(SourceError::from))
            }
            Source::Twin(loader) => Some(match loader.next()? {
                Ok(batch) => Ok(Taken::Twin(Box::new(batch))),
                Err(error) => Err(error.into()),
            }),
            #[cfg(feature = "nvjpeg")]
            Source::Gpu(loader, _) => Some(match loader.next()? {
                Ok(batch) => Ok(Taken::Gpu(Box::new(batch))),
                Err(error) => Err(error.into()),
            }),
        }
    }

    /// Gives a batch back that nobody reads, as a trainer would: what is made next in its memory
    /// waits for its rendering, and the host does not.
    ///
    /// # Errors
    /// When the device failed.
    pub fn pass(&self, batch: Taken) -> Result<(), SourceError> {
        #[cfg(feature = "nvjpeg")]
        if let (Source::Gpu(_, stream), Taken::Gpu(batch)) = (self, &batch) {
            batch.wait_on(stream).map_err(GpuError::from)?;
            batch.release_on(stream).map_err(GpuError::from)?;
        }
        drop(batch);
        Ok(())
    }

    /// The counters themselves.
    pub fn counters(&self) -> &Arc<Stats> {
        match self {
            Source::Host(loader) => loader.counters(),
            Source::Twin(loader) => loader.counters(),
            #[cfg(feature = "nvjpeg")]
            Source::Gpu(loader, _) => loader.counters(),
        }
    }

    /// The shards that are read.
    pub fn set(&self) -> &Arc<ShardSet> {
        match self {
            Source::Host(loader) => loader.set(),
            Source::Twin(loader) => loader.set(),
            #[cfg(feature = "nvjpeg")]
            Source::Gpu(loader, _) => loader.set(),
        }
    }

    /// The counters at this moment.
    pub fn stats(&self) -> Snapshot {
        self.counters().snapshot()
    }

    /// How many buffers circulate, and the bytes of one.
    pub fn slabs(&self) -> (usize, usize) {
        match self {
            Source::Host(loader) => loader.slabs(),
            Source::Twin(loader) => loader.slabs(),
            #[cfg(feature = "nvjpeg")]
            Source::Gpu(loader, _) => loader.slabs(),
        }
    }

    /// Who decoded how many images; none where the CPU decodes all.
    pub fn counts(&self) -> Option<Counts> {
        match self {
            Source::Host(_) => None,
            Source::Twin(loader) => Some(loader.counts()),
            #[cfg(feature = "nvjpeg")]
            Source::Gpu(loader, _) => Some(loader.counts()),
        }
    }

    /// What the GPU said of the first image or batch that it refused although it decodes such ones.
    pub fn refusal(&self) -> Option<String> {
        match self {
            Source::Host(_) => None,
            Source::Twin(loader) => loader.refusal(),
            #[cfg(feature = "nvjpeg")]
            Source::Gpu(loader, _) => loader.refusal(),
        }
    }
}

/// Who decoded how many images, and in which ratio, as reports say it.
pub fn who_decoded(counts: &Counts) -> String {
    let Counts { batched, single, cpu, refused, share } = *counts;
    let [batched, single, cpu, refused] = [batched, single, cpu, refused].map(HumanCount);
    let share = share.map(|share| format!("{:.0} %", share * 100.0));
    let share = share.as_deref().unwrap_or("still being measured");
    format!(
        "{batched} by the hardware, {single} one by one, {cpu} by the CPU; batches refused: {refused}; \
         share of the hardware: {share}"
    )
}

/// A loader, with locked slabs where a GPU is to copy from them.
#[cfg(feature = "nvjpeg")]
fn loader(
    set: Arc<ShardSet>,
    options: LoaderOptions,
    copied_by: Option<u32>,
) -> Result<Loader, SourceError> {
    let Some(gpu) = copied_by else { return Ok(Loader::start(set, options)?) };
    let gpu = Device::open(gpu).map_err(GpuError::from)?;
    Loader::start_in(set, options, |layout| {
        Slab::locked(layout, &gpu).map_err(|error| GpuError::from(error).into())
    })
}

/// A loader. Pages are locked through the data plane's own way to the driver, which is not built:
/// a copy from other pages is right as well, and slower.
#[cfg(not(feature = "nvjpeg"))]
fn loader(
    set: Arc<ShardSet>,
    options: LoaderOptions,
    _copied_by: Option<u32>,
) -> Result<Loader, SourceError> {
    Ok(Loader::start(set, options)?)
}

impl Taken {
    /// Where it stands in the run.
    pub fn cursor(&self) -> Cursor {
        match self {
            Taken::Host(filled) => filled.cursor,
            Taken::Twin(batch) => batch.cursor,
            #[cfg(feature = "nvjpeg")]
            Taken::Gpu(batch) => batch.cursor,
        }
    }

    /// The samples it holds, substitutes included, in slot order.
    pub fn samples(&self) -> &[u64] {
        match self {
            Taken::Host(filled) => &filled.samples,
            Taken::Twin(batch) => &batch.samples,
            #[cfg(feature = "nvjpeg")]
            Taken::Gpu(batch) => &batch.samples,
        }
    }

    /// The class of each sample, in slot order, where they were asked for.
    ///
    /// # Errors
    /// A class that is no number.
    pub fn labels(&self) -> Result<Vec<Option<u32>>, ShardError> {
        match self {
            Taken::Host(filled) => filled.labels(),
            Taken::Twin(batch) => batch.labels(),
            #[cfg(feature = "nvjpeg")]
            Taken::Gpu(batch) => batch.labels(),
        }
    }

    /// What was drawn for view `view` of a group, of the sample in this slot.
    ///
    /// # Panics
    /// Where the recipe has no such view, or the batch no such slot.
    pub fn note(&self, group: &str, view: usize, slot: usize) -> Note {
        match self {
            Taken::Host(filled) => filled.note(group, view, slot),
            Taken::Twin(batch) => batch.note(group, view, slot),
            #[cfg(feature = "nvjpeg")]
            Taken::Gpu(batch) => batch.note(group, view, slot),
        }
    }

    /// Samples that could not be used, in slot order.
    pub fn bad(&self) -> &[BadSample] {
        match self {
            Taken::Host(filled) => &filled.bad,
            Taken::Twin(batch) => &batch.bad,
            #[cfg(feature = "nvjpeg")]
            Taken::Gpu(batch) => &batch.bad,
        }
    }
}
