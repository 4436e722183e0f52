//! Loaders onto a device and their batches, whichever device it is.

use std::fmt;
use std::sync::Arc;

#[cfg(feature = "nvjpeg")]
use detco_shards::cuda::{CudaError, Device, Stream};
#[cfg(feature = "nvjpeg")]
use detco_shards::device::GpuError;
use detco_shards::device::{Counts, DeviceBatch, DeviceError, DeviceLoader, Engine, Pointers};
use detco_shards::format::ShardError;
use detco_shards::order::Cursor;
use detco_shards::pipeline::BadSample;
use detco_shards::stats::Stats;
use detco_shards::stream::ShardSet;
use detco_shards::views::Note;

use super::{Batch, SourceError, Taken};

/// What the trainer asks of a loader onto a device, whichever device it is.
pub(super) trait Pipeline: fmt::Debug + Send {
    fn next(&mut self) -> Option<Result<Taken, SourceError>>;
    fn pass(&self, batch: Taken) -> Result<(), SourceError>;
    fn counters(&self) -> &Arc<Stats>;
    fn set(&self) -> &Arc<ShardSet>;
    fn slabs(&self) -> (usize, usize);
    fn counts(&self) -> Counts;
    fn refusal(&self) -> Option<String>;
    #[cfg(feature = "nvjpeg")]
    fn gpu(&self) -> Option<&Arc<Device>>;
}

/// What the trainer asks of a batch on a device.
pub(super) trait OnDevice: fmt::Debug + Send {
    fn cursor(&self) -> Cursor;
    fn samples(&self) -> &[u64];
    fn labels(&self) -> Result<Vec<Option<u32>>, ShardError>;
    fn note(&self, group: &str, view: usize, slot: usize) -> Note;
    fn bad(&self) -> &[BadSample];
    fn pointers(&self) -> Option<Pointers>;
    #[cfg(feature = "nvjpeg")]
    fn wait_on(&self, stream: &Stream) -> Result<(), CudaError>;
    #[cfg(feature = "nvjpeg")]
    fn release_on(&self, stream: &Stream) -> Result<(), CudaError>;
}

impl<E: Engine> OnDevice for DeviceBatch<E> {
    fn cursor(&self) -> Cursor {
        self.cursor
    }

    fn samples(&self) -> &[u64] {
        &self.samples
    }

    fn labels(&self) -> Result<Vec<Option<u32>>, ShardError> {
        self.labels()
    }

    fn note(&self, group: &str, view: usize, slot: usize) -> Note {
        self.note(group, view, slot)
    }

    fn bad(&self) -> &[BadSample] {
        &self.bad
    }

    fn pointers(&self) -> Option<Pointers> {
        self.pointers()
    }

    #[cfg(feature = "nvjpeg")]
    fn wait_on(&self, stream: &Stream) -> Result<(), CudaError> {
        self.wait_on(stream)
    }

    #[cfg(feature = "nvjpeg")]
    fn release_on(&self, stream: &Stream) -> Result<(), CudaError> {
        self.release_on(stream)
    }
}

/// A loader onto a device, and on a GPU a stream for [`Source::pass`](super::Source::pass).
#[derive(Debug)]
pub(super) struct Onto<E: Engine> {
    pub(super) loader: DeviceLoader<E>,
    #[cfg(feature = "nvjpeg")]
    pub(super) stream: Option<Stream>,
}

impl<E: Engine> Pipeline for Onto<E>
where
    SourceError: From<DeviceError<E::Error>>,
{
    fn next(&mut self) -> Option<Result<Taken, SourceError>> {
        Some(match self.loader.next()? {
            Ok(batch) => Ok(Taken(Batch::Device(Box::new(batch)))),
            Err(error) => Err(error.into()),
        })
    }

    fn pass(&self, batch: Taken) -> Result<(), SourceError> {
        #[cfg(feature = "nvjpeg")]
        if let (Some(stream), Batch::Device(batch)) = (&self.stream, &batch.0) {
            batch.wait_on(stream).map_err(GpuError::from)?;
            batch.release_on(stream).map_err(GpuError::from)?;
        }
        drop(batch);
        Ok(())
    }

    fn counters(&self) -> &Arc<Stats> {
        self.loader.counters()
    }

    fn set(&self) -> &Arc<ShardSet> {
        self.loader.set()
    }

    fn slabs(&self) -> (usize, usize) {
        self.loader.slabs()
    }

    fn counts(&self) -> Counts {
        self.loader.counts()
    }

    fn refusal(&self) -> Option<String> {
        self.loader.refusal()
    }

    #[cfg(feature = "nvjpeg")]
    fn gpu(&self) -> Option<&Arc<Device>> {
        self.loader.engine().gpu()
    }
}
