//! Image files through a backbone: read where they lie, rendered as Pillow does it, to rows of features.

use std::io;
use std::num::NonZero;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::thread::Builder;

use detco_shards::decode::{DecodeError, Decoder, Image};
use detco_shards::views::{Recipe, Renderer};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, TchError, Tensor};
use thiserror::Error;

use super::features::{Pool, device_of};
use crate::batch::{self, BatchError};
use crate::model::Encoder;
use crate::shim::ShimError;

/// Images that go through the network together.
const BATCH: usize = 64;

/// Why there are no features.
#[derive(Debug, Error)]
pub enum PictureError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is no picture that can be decoded.
    #[error("{}: {source}", path.display())]
    Decode {
        /// Which.
        path: PathBuf,
        /// Why.
        source: DecodeError,
    },
    /// Two sets have a picture in common.
    #[error(
        "{} and {} are the same file: a test on training images measures nothing",
        test.display(),
        train.display()
    )]
    Common {
        /// A file of the training set.
        train: PathBuf,
        /// One of the test set with the same bytes.
        test: PathBuf,
    },
    /// A feature is NaN or infinite.
    #[error("{}: a feature of Res{level} is not finite", path.display())]
    NotFinite {
        /// Which picture.
        path: PathBuf,
        /// Which map.
        level: u8,
    },
    /// The system starts no thread.
    #[error("cannot start a thread: {source}")]
    Thread {
        /// Why.
        source: io::Error,
    },
    /// Bytes make no batch.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// libtorch failed.
    #[error(transparent)]
    Shim(#[from] ShimError),
    /// libtorch refused.
    #[error("{0}")]
    Torch(#[from] TchError),
}

/// Reads a file.
fn read(path: &Path) -> Result<Vec<u8>, PictureError> {
    std::fs::read(path).map_err(|source| PictureError::Io { path: path.to_path_buf(), source })
}

/// Checks by SHA-256 of their bytes that no file of `test` is one of `train`, too.
///
/// # Errors
/// [`PictureError::Common`], [`PictureError::Io`].
pub fn check_apart(train: &[PathBuf], test: &[PathBuf]) -> Result<(), PictureError> {
    let digest = |path: &PathBuf| Ok::<_, PictureError>(Sha256::digest(read(path)?));
    let mut known = std::collections::HashMap::with_capacity(train.len());
    for path in train {
        known.insert(digest(path)?, path);
    }
    for path in test {
        if let Some(same) = known.get(&digest(path)?) {
            return Err(PictureError::Common { train: (*same).clone(), test: path.clone() });
        }
    }
    Ok(())
}

/// Features `[n, d]` of files, float32 on the CPU, one tensor a level. `recipe` gives one view a picture; `watch`
/// hears of the pictures done, and may ask for the end, which gives none.
///
/// # Errors
/// [`PictureError`], naming the file where it is one file's fault.
pub fn features(
    encoder: &Encoder,
    files: &[PathBuf],
    recipe: &Recipe,
    (levels, pool): (&[u8], Pool),
    watch: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Option<Vec<(u8, Tensor)>>, PictureError> {
    let device = device_of(encoder);
    let edge = recipe.groups.first().map_or(0, |group| group.size) as usize;
    let mut rows: Vec<(u8, Option<Tensor>)> = levels.iter().map(|level| (*level, None)).collect();
    let mut done = 0;
    std::thread::scope(|scope| {
        // One batch ahead: files are decoded while the network computes.
        let (send, receive) = sync_channel(1);
        let ahead = move || {
            for chunk in files.chunks(BATCH) {
                if send.send(rendered(chunk, recipe, edge)).is_err() {
                    break;
                }
            }
        };
        let started = Builder::new().spawn_scoped(scope, ahead);
        started.map_err(|source| PictureError::Thread { source })?;
        for (chunk, pixels) in files.chunks(BATCH).zip(receive) {
            let maps = encoder.maps(&batch::images(&pixels?, chunk.len(), edge, device)?)?;
            for (level, all) in &mut rows {
                let map = &maps[usize::from((*level).clamp(2, 5)) - 2];
                let part = pool.rows(map)?.to_device(Device::Cpu).to_kind(Kind::Float);
                if let Some(row) = first_not_finite(&part)? {
                    return Err(PictureError::NotFinite {
                        path: chunk[row].clone(),
                        level: *level,
                    });
                }
                let shape = [files.len() as i64, part.size()[1]];
                let all =
                    all.get_or_insert_with(|| Tensor::empty(shape, (Kind::Float, Device::Cpu)));
                all.narrow(0, done, chunk.len() as i64).copy_(&part);
            }
            done += chunk.len() as i64;
            if watch(done as usize).is_break() {
                return Ok(None);
            }
        }
        Ok(Some(rows.into_iter().filter_map(|(level, all)| Some((level, all?))).collect()))
    })
}

/// The first row `[n, d]` that holds a number that is not finite.
fn first_not_finite(rows: &Tensor) -> Result<Option<usize>, TchError> {
    let finite = Vec::<bool>::try_from(rows.isfinite().all_dim(1, false))?;
    Ok(finite.iter().position(|finite| !finite))
}

/// The views of files, `[n, edge, edge, 3]`.
fn rendered(files: &[PathBuf], recipe: &Recipe, edge: usize) -> Result<Vec<u8>, PictureError> {
    let bytes = edge * edge * 3;
    let mut pixels = vec![0; files.len() * bytes];
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
    let share = files.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        let parts = files.chunks(share).zip(pixels.chunks_mut((share * bytes).max(1)));
        let start = |(files, pixels)| {
            Builder::new().spawn_scoped(scope, move || render(files, recipe, edge, pixels))
        };
        let threads: Vec<_> = parts.map(start).collect();
        threads.into_iter().try_for_each(|thread| {
            let thread = thread.map_err(|source| PictureError::Thread { source })?;
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })?;
    Ok(pixels)
}

fn render(
    files: &[PathBuf],
    recipe: &Recipe,
    edge: usize,
    pixels: &mut [u8],
) -> Result<(), PictureError> {
    let (mut decoder, mut renderer, mut image) = (Decoder::new(), Renderer::new(), Image::new());
    for (path, pixels) in files.iter().zip(pixels.chunks_mut(edge * edge * 3)) {
        decode(&mut decoder, path, &mut image)?;
        // Nothing is drawn at random in a recipe for evaluation.
        let plan = recipe.draw(image.width, image.height, 0, 0, 0);
        if let Some(view) = plan.views.first() {
            renderer.view(&image, view, pixels);
        }
    }
    Ok(())
}

/// Reads and decodes a file.
///
/// # Errors
/// [`PictureError::Io`], [`PictureError::Decode`].
pub fn decode(decoder: &mut Decoder, path: &Path, image: &mut Image) -> Result<(), PictureError> {
    let bytes = read(path)?;
    let decoded = decoder.decode(&bytes, image);
    decoded.map_err(|source| PictureError::Decode { path: path.to_path_buf(), source })
}
