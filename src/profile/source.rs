//! Where a profile's batches come from: the loader, or the one whose pixels are made on a device.

use std::sync::Arc;

#[cfg(feature = "nvjpeg")]
use detco_shards::cuda::Stream;
use detco_shards::device::{Counts, Decoding};
#[cfg(feature = "nvjpeg")]
use detco_shards::device::{Cuda, DeviceBatch, DeviceLoader, DeviceOptions, Share};
use detco_shards::pipeline::{Filled, Loader, LoaderOptions};
use detco_shards::stats::{Snapshot, Stats};
use detco_shards::stream::ShardSet;

use super::measure::MeasureError;

/// A loader that runs.
#[derive(Debug)]
pub(super) enum Source {
    /// Into slabs.
    Host(Box<Loader>),
    /// Onto a GPU, and the stream of the one who takes its batches.
    #[cfg(feature = "nvjpeg")]
    Gpu(Box<DeviceLoader<Cuda>>, Stream),
}

/// A batch that nobody reads.
#[derive(Debug)]
pub(super) enum Batch {
    Host(Filled),
    #[cfg(feature = "nvjpeg")]
    Gpu(Box<DeviceBatch<Cuda>>),
}

impl Source {
    /// Starts what `decoding` asks for.
    pub(super) fn start(
        set: &Arc<ShardSet>,
        options: LoaderOptions,
        decoding: Decoding,
    ) -> Result<Source, MeasureError> {
        match decoding {
            Decoding::Cpu { .. } => {
                Ok(Source::Host(Box::new(Loader::start(Arc::clone(set), options)?)))
            }
            #[cfg(feature = "nvjpeg")]
            Decoding::Nvjpeg(cuda) => {
                let stream = Stream::new(cuda.device()).map_err(MeasureError::Cuda)?;
                let options = DeviceOptions { loader: options, share: Share::Measure };
                let loader = DeviceLoader::start(Arc::clone(set), *cuda, options)?;
                Ok(Source::Gpu(Box::new(loader), stream))
            }
        }
    }

    /// The next batch; `None` at the end.
    pub(super) fn next(&mut self) -> Option<Result<Batch, MeasureError>> {
        match self {
            Source::Host(loader) => {
                Some(loader.next()?.map(Batch::Host).map_err(MeasureError::from))
            }
            #[cfg(feature = "nvjpeg")]
            Source::Gpu(loader, stream) => {
                let batch = loader.next()?.map_err(MeasureError::from);
                // As a trainer would: what comes after the rendering gives the buffers back.
                Some(batch.and_then(|batch| {
                    batch.wait_on(stream).map_err(MeasureError::Cuda)?;
                    batch.release_on(stream).map_err(MeasureError::Cuda)?;
                    Ok(Batch::Gpu(Box::new(batch)))
                }))
            }
        }
    }

    /// The counters themselves.
    pub(super) fn counters(&self) -> &Arc<Stats> {
        match self {
            Source::Host(loader) => loader.counters(),
            #[cfg(feature = "nvjpeg")]
            Source::Gpu(loader, _) => loader.counters(),
        }
    }

    /// The shards that are read.
    pub(super) fn set(&self) -> &Arc<ShardSet> {
        match self {
            Source::Host(loader) => loader.set(),
            #[cfg(feature = "nvjpeg")]
            Source::Gpu(loader, _) => loader.set(),
        }
    }

    /// The counters at this moment.
    pub(super) fn stats(&self) -> Snapshot {
        self.counters().snapshot()
    }

    /// How many buffers circulate, and the bytes of one.
    pub(super) fn slabs(&self) -> (usize, usize) {
        match self {
            Source::Host(loader) => loader.slabs(),
            #[cfg(feature = "nvjpeg")]
            Source::Gpu(loader, _) => loader.slabs(),
        }
    }

    /// Who decoded how many images; none where the CPU decodes all.
    pub(super) fn counts(&self) -> Option<Counts> {
        match self {
            Source::Host(_) => None,
            #[cfg(feature = "nvjpeg")]
            Source::Gpu(loader, _) => Some(loader.counts()),
        }
    }
}

impl Batch {
    /// Its number in the epoch, its samples, and how many of them replace bad ones.
    pub(super) fn about(&self) -> (u64, usize, u64) {
        match self {
            Batch::Host(filled) => (filled.cursor.step, filled.len(), filled.bad.len() as u64),
            #[cfg(feature = "nvjpeg")]
            Batch::Gpu(batch) => (batch.cursor.step, batch.len(), batch.bad.len() as u64),
        }
    }
}
