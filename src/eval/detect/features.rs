//! A frozen backbone's maps of scenes, computed once.

use tch::{Kind, Tensor};

use super::DetectError;
use super::head::{STRIDE, reduced};
use super::sources::Scenes;
use crate::batch;
use crate::eval::features::{BN_BATCHES, device_of};
use crate::model::Encoder;

/// Scenes that go through the backbone together.
const BATCH: usize = 50;
/// Training scenes that channels are standardised by, at most.
const STANDARD: usize = 1000;
/// Smallest deviation that a channel is divided by.
const DEVIATION_MIN: f64 = 1e-4;
/// Largest absolute value of a standardised number.
const VALUE_MAX: f64 = 50.0;

/// Levels of a backbone: 2 to 5.
pub const LEVELS: [u8; 4] = [2, 3, 4, 5];

/// Mean and deviation of each channel of Res2 to Res5, `[1, c, 1, 1]` each: a detector then sees no scale of the
/// backbone's.
#[derive(Debug)]
pub struct Standard([[Tensor; 2]; 4]);

/// Maps of Res2 to Res5, none finer than the detector's grid: averaging to stride 8 may come before a 1x1 convolution.
///
/// # Errors
/// When libtorch fails, or the grid does not divide a map.
pub fn on_grid(maps: &[Tensor], grid: i64) -> Result<Vec<Tensor>, DetectError> {
    let onto = |map: &Tensor| {
        let edge = map.size()[3];
        reduced(map, grid).ok_or(DetectError::Grid { edge, grid })
    };
    maps.iter().map(onto).collect()
}

/// The maps of some scenes, on the encoder's device.
fn maps(
    encoder: &Encoder,
    scenes: &Scenes,
    first: usize,
    count: usize,
) -> Result<Vec<Tensor>, DetectError> {
    let device = device_of(encoder);
    let edge = scenes.size as usize;
    let images = batch::images(scenes.bytes(first, count), count, edge, device)?;
    on_grid(&encoder.maps(&images)?, grid(scenes))
}

/// Puts statistics of training scenes in the place of an encoder's running ones, of at most
/// [`BN_BATCHES`] whole batches, or of all where they are fewer than a batch. Returns the number of scenes.
///
/// # Errors
/// When libtorch fails.
pub fn recompute_bn(encoder: &mut Encoder, scenes: &Scenes) -> Result<u64, DetectError> {
    let (device, edge) = (device_of(encoder), scenes.size as usize);
    let mut seen = 0;
    // A last batch of a few scenes would count as much as others, and of one a small map has no variance.
    let whole = batches(scenes.len()).filter(|(first, count)| *first == 0 || *count == BATCH);
    let images = whole.take(BN_BATCHES).map(|(first, count)| {
        seen += count as u64;
        let images = batch::images(scenes.bytes(first, count), count, edge, device);
        images.map_err(DetectError::from)
    });
    encoder.recompute_statistics(images)?;
    Ok(seen)
}

/// Edge of the grid for scenes of this size, in cells.
pub fn grid(scenes: &Scenes) -> i64 {
    i64::from(scenes.size) / STRIDE
}

/// The scenes from 0 to `end` by batches: first number and count.
fn batches(end: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..end).step_by(BATCH).map(move |first| (first, BATCH.min(end - first)))
}

impl Standard {
    /// Of the first thousand training scenes.
    ///
    /// # Errors
    /// When a map is not finite, libtorch fails, or the grid does not divide a map.
    pub fn of(encoder: &Encoder, scenes: &Scenes) -> Result<Standard, DetectError> {
        let mut sums: Vec<[Tensor; 2]> = Vec::new();
        let mut counts = [0.0; 4];
        for (first, count) in batches(scenes.len().min(STANDARD)) {
            for (at, map) in maps(encoder, scenes, first, count)?.iter().enumerate() {
                let map = map.to_kind(Kind::Double);
                let sum =
                    |of: Tensor| of.sum_dim_intlist([0_i64, 2, 3].as_slice(), true, Kind::Double);
                let seen = [sum(map.shallow_clone()), sum(map.square())];
                counts[at] += (map.numel() as i64 / map.size()[1]) as f64;
                match sums.get_mut(at) {
                    Some(sums) => {
                        for (sum, seen) in sums.iter_mut().zip(seen) {
                            *sum += seen;
                        }
                    }
                    None => sums.push(seen),
                }
            }
        }
        let mut all = Vec::with_capacity(4);
        for ((level, [sum, square]), count) in LEVELS.into_iter().zip(sums).zip(counts) {
            let mean = &sum / count;
            let variance = (&square - &mean * &sum) / (count - 1.0).max(1.0);
            let deviation = variance.clamp_min(0.0).sqrt().clamp_min(DEVIATION_MIN);
            if deviation.isfinite().all().int64_value(&[]) == 0 {
                return Err(DetectError::NotFinite { level });
            }
            all.push([mean, deviation].map(|of| of.to_kind(Kind::Float)));
        }
        let all: [_; 4] = all.try_into().map_err(|_| DetectError::NoObjects)?;
        Ok(Standard(all))
    }

    /// A map of a level, standardised.
    pub fn apply(&self, level: u8, map: &Tensor) -> Tensor {
        let [mean, deviation] = &self.0[usize::from(level) - 2];
        ((map - mean) / deviation).clamp(-VALUE_MAX, VALUE_MAX)
    }
}

/// Standardised maps of scenes: of each level `[n, c, h, h]` in float16, on the encoder's device.
#[derive(Debug)]
pub struct Features {
    levels: Vec<(u8, Tensor)>,
}

impl Features {
    /// The maps of these levels of all scenes; `tick` hears the number of scenes of each batch.
    ///
    /// # Errors
    /// As [`Standard::of`].
    pub fn of(
        encoder: &Encoder,
        scenes: &Scenes,
        standard: &Standard,
        levels: &[u8],
        tick: &mut dyn FnMut(u64),
    ) -> Result<Features, DetectError> {
        let mut all: Vec<(u8, Tensor)> = Vec::new();
        for (first, count) in batches(scenes.len()) {
            let maps = maps(encoder, scenes, first, count)?;
            for (at, level) in levels.iter().enumerate() {
                let map = standard.apply(*level, &maps[usize::from(*level) - 2]);
                if first == 0 {
                    let mut shape = map.size();
                    shape[0] = scenes.len() as i64;
                    all.push((*level, Tensor::zeros(shape, (Kind::Half, map.device()))));
                }
                let mut part = all[at].1.narrow(0, first as i64, count as i64);
                part.copy_(&map);
            }
            tick(count as u64);
        }
        for (level, map) in &all {
            if map.sum(Kind::Double).isfinite().int64_value(&[]) == 0 {
                return Err(DetectError::NotFinite { level: *level });
            }
        }
        Ok(Features { levels: all })
    }

    /// Rows of these levels, in float32.
    ///
    /// # Panics
    /// Where a level is not among those that were computed.
    pub fn rows(&self, levels: &[u8], rows: &Tensor) -> Vec<Tensor> {
        let of = |level: &u8| {
            let found = self.levels.iter().find(|(own, _)| own == level);
            let (_, map) = found.unwrap_or_else(|| panic!("no maps of Res{level}"));
            map.index_select(0, rows).to_kind(Kind::Float)
        };
        levels.iter().map(of).collect()
    }

    /// Channels of each level that was computed.
    pub fn channels(&self) -> Vec<(u8, i64)> {
        self.levels.iter().map(|(level, map)| (*level, map.size()[1])).collect()
    }

    /// The device of the maps.
    pub fn device(&self) -> tch::Device {
        self.levels.first().map_or(tch::Device::Cpu, |(_, map)| map.device())
    }
}
