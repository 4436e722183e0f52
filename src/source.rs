//! Where batches of views come from: the loader, into slabs, or the pipeline whose pixels are made on
//! a device and stay there. What reads them, the trainer and the profile, asks here.
//!
//! Order, views, substitutes and counters are the same whoever decodes.

mod error;
mod onto;

use std::fmt;
use std::sync::Arc;

#[cfg(feature = "nvjpeg")]
use detco_shards::cuda::{CudaError, Device, Stream};
#[cfg(feature = "nvjpeg")]
use detco_shards::device::GpuError;
use detco_shards::device::{
    Counts, Decoding, DeviceError, DeviceLoader, DeviceOptions, Engine, Pointers, Share,
};
use detco_shards::format::ShardError;
use detco_shards::order::Cursor;
use detco_shards::pipeline::{BadSample, Filled, Loader, LoaderOptions};
#[cfg(feature = "nvjpeg")]
use detco_shards::slab::Slab;
use detco_shards::stats::{Snapshot, Stats};
use detco_shards::stream::ShardSet;
use detco_shards::views::Note;
use indicatif::HumanCount;

pub use self::error::SourceError;
use self::onto::{OnDevice, Onto, Pipeline};

/// A loader that runs: into slabs, or onto a device.
#[derive(Debug)]
pub struct Source(Kind);

#[derive(Debug)]
enum Kind {
    Host(Box<Loader>),
    Device(Box<dyn Pipeline>),
}

/// A batch. Dropping it gives its memory back.
#[derive(Debug)]
pub struct Taken(Batch);

#[derive(Debug)]
enum Batch {
    /// In a slab.
    Host(Filled),
    /// On a device, or about to be there.
    Device(Box<dyn OnDevice>),
}

/// How a [`Source`] is started, and what its batches are made by, in words.
pub struct Starter {
    name: String,
    start: Box<Start>,
}

type Start =
    dyn FnOnce(&Arc<ShardSet>, LoaderOptions, Share, Option<u32>) -> Result<Source, SourceError>;

impl fmt::Debug for Starter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Starter").field("name", &self.name).finish_non_exhaustive()
    }
}

impl fmt::Display for Starter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl From<Decoding> for Starter {
    fn from(decoding: Decoding) -> Starter {
        let name = decoding.to_string();
        let start = |set: &Arc<ShardSet>, options, share, copied_by| {
            Source::start(set, options, decoding, share, copied_by)
        };
        Starter { name, start: Box::new(start) }
    }
}

impl Starter {
    /// Batches by this engine, which has this name.
    pub fn of<E: Engine>(name: &str, engine: E) -> Starter
    where
        SourceError: From<DeviceError<E::Error>>,
    {
        let start = |set: &Arc<ShardSet>, loader, share, _: Option<u32>| {
            let options = DeviceOptions { loader, share };
            Ok(Source::onto(DeviceLoader::start(Arc::clone(set), engine, options)?))
        };
        Starter { name: name.to_owned(), start: Box::new(start) }
    }

    /// As [`Source::start`].
    ///
    /// # Errors
    /// As [`Source::start`].
    pub fn start(
        self,
        set: &Arc<ShardSet>,
        options: LoaderOptions,
        share: Share,
        copied_by: Option<u32>,
    ) -> Result<Source, SourceError> {
        (self.start)(set, options, share, copied_by)
    }
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
        // Without nvJPEG there is no device to share the load with.
        #[cfg(not(feature = "nvjpeg"))]
        let _ = share;
        match decoding {
            Decoding::Cpu { .. } => {
                Ok(Source(Kind::Host(Box::new(loader(set, options, copied_by)?))))
            }
            #[cfg(feature = "nvjpeg")]
            Decoding::Nvjpeg(cuda) => {
                let stream = Some(Stream::new(cuda.device()).map_err(GpuError::from)?);
                let options = DeviceOptions { loader: options, share };
                let loader = DeviceLoader::start(set, *cuda, options)?;
                Ok(Source(Kind::Device(Box::new(Onto { loader, stream }))))
            }
        }
    }

    /// A loader that was started onto a device.
    fn onto<E: Engine>(loader: DeviceLoader<E>) -> Source
    where
        SourceError: From<DeviceError<E::Error>>,
    {
        Source(Kind::Device(Box::new(Onto {
            loader,
            #[cfg(feature = "nvjpeg")]
            stream: None,
        })))
    }

    /// The next batch; `None` at the end. A GPU may not have made it yet: what reads it must be
    /// queued behind it.
    ///
    /// # Errors
    /// What ends the run.
    #[expect(clippy::should_implement_trait, reason = "no caller iterates")]
    pub fn next(&mut self) -> Option<Result<Taken, SourceError>> {
        match &mut self.0 {
            Kind::Host(loader) => {
                let taken = |filled| Taken(Batch::Host(filled));
                Some(loader.next()?.map(taken).map_err(SourceError::from))
            }
            Kind::Device(loader) => loader.next(),
        }
    }

    /// Gives a batch back that nobody reads, as a trainer would: what is made next in its memory
    /// waits for its rendering, and the host does not.
    ///
    /// # Errors
    /// When the device failed.
    pub fn pass(&self, batch: Taken) -> Result<(), SourceError> {
        match &self.0 {
            Kind::Host(_) => Ok(()),
            Kind::Device(loader) => loader.pass(batch),
        }
    }

    /// The counters themselves.
    pub fn counters(&self) -> &Arc<Stats> {
        match &self.0 {
            Kind::Host(loader) => loader.counters(),
            Kind::Device(loader) => loader.counters(),
        }
    }

    /// The shards that are read.
    pub fn set(&self) -> &Arc<ShardSet> {
        match &self.0 {
            Kind::Host(loader) => loader.set(),
            Kind::Device(loader) => loader.set(),
        }
    }

    /// The counters at this moment.
    pub fn stats(&self) -> Snapshot {
        self.counters().snapshot()
    }

    /// How many buffers circulate, and the bytes of one.
    pub fn slabs(&self) -> (usize, usize) {
        match &self.0 {
            Kind::Host(loader) => loader.slabs(),
            Kind::Device(loader) => loader.slabs(),
        }
    }

    /// Who decoded how many images; none where the CPU decodes all.
    pub fn counts(&self) -> Option<Counts> {
        match &self.0 {
            Kind::Host(_) => None,
            Kind::Device(loader) => Some(loader.counts()),
        }
    }

    /// What the GPU said of the first image or batch that it refused although it decodes such ones.
    pub fn refusal(&self) -> Option<String> {
        match &self.0 {
            Kind::Host(_) => None,
            Kind::Device(loader) => loader.refusal(),
        }
    }

    /// Whether batches come in slabs.
    pub fn fills_slabs(&self) -> bool {
        matches!(self.0, Kind::Host(_))
    }

    /// The GPU that makes the batches.
    #[cfg(feature = "nvjpeg")]
    pub fn gpu(&self) -> Option<&Arc<Device>> {
        match &self.0 {
            Kind::Host(_) => None,
            Kind::Device(loader) => loader.gpu(),
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
        match &self.0 {
            Batch::Host(filled) => filled.cursor,
            Batch::Device(batch) => batch.cursor(),
        }
    }

    /// The samples it holds, substitutes included, in slot order.
    pub fn samples(&self) -> &[u64] {
        match &self.0 {
            Batch::Host(filled) => &filled.samples,
            Batch::Device(batch) => batch.samples(),
        }
    }

    /// The class of each sample, in slot order, where they were asked for.
    ///
    /// # Errors
    /// A class that is no number.
    pub fn labels(&self) -> Result<Vec<Option<u32>>, ShardError> {
        match &self.0 {
            Batch::Host(filled) => filled.labels(),
            Batch::Device(batch) => batch.labels(),
        }
    }

    /// What was drawn for view `view` of a group, of the sample in this slot.
    ///
    /// # Panics
    /// Where the recipe has no such view, or the batch no such slot.
    pub fn note(&self, group: &str, view: usize, slot: usize) -> Note {
        match &self.0 {
            Batch::Host(filled) => filled.note(group, view, slot),
            Batch::Device(batch) => batch.note(group, view, slot),
        }
    }

    /// Samples that could not be used, in slot order.
    pub fn bad(&self) -> &[BadSample] {
        match &self.0 {
            Batch::Host(filled) => &filled.bad,
            Batch::Device(batch) => batch.bad(),
        }
    }

    /// The slab that holds it.
    ///
    /// # Errors
    /// The batch, where it lies on a device.
    pub fn into_slab(self) -> Result<Filled, Box<Taken>> {
        match self.0 {
            Batch::Host(filled) => Ok(filled),
            batch => Err(Box::new(Taken(batch))),
        }
    }

    /// Where a device's views lie as normalised numbers.
    pub fn pointers(&self) -> Option<Pointers> {
        match &self.0 {
            Batch::Host(_) => None,
            Batch::Device(batch) => batch.pointers(),
        }
    }

    /// Lets what is queued on `stream` from now on wait until the views are rendered.
    ///
    /// # Errors
    /// When the driver fails.
    #[cfg(feature = "nvjpeg")]
    pub fn wait_on(&self, stream: &Stream) -> Result<(), CudaError> {
        match &self.0 {
            Batch::Host(_) => Ok(()),
            Batch::Device(batch) => batch.wait_on(stream),
        }
    }

    /// Has its memory used again only behind what is queued on `stream` now.
    ///
    /// # Errors
    /// When the driver fails.
    #[cfg(feature = "nvjpeg")]
    pub fn release_on(&self, stream: &Stream) -> Result<(), CudaError> {
        match &self.0 {
            Batch::Host(_) => Ok(()),
            Batch::Device(batch) => batch.release_on(stream),
        }
    }
}
