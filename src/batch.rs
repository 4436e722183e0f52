//! Slab to tensors: the only place where bytes become tensors.

use tch::{Device, Kind, Tensor};
use thiserror::Error;

/// ImageNet's channel means, of pixels scaled to \[0, 1\]: what torchvision normalises with.
pub const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
/// ImageNet's channel deviations.
pub const STD: [f32; 3] = [0.229, 0.224, 0.225];

/// Why bytes make no batch.
#[derive(Debug, Error)]
pub enum BatchError {
    /// More or fewer bytes than the shape says.
    #[error("a section of {found} bytes cannot hold {images} images of {edge} x {edge} x 3 bytes")]
    Length {
        /// Images expected.
        images: usize,
        /// Their edge in pixels.
        edge: usize,
        /// Bytes found.
        found: usize,
    },
}

/// What the encoders see in one step: two renditions of the same n samples.
#[derive(Debug)]
pub struct Batch {
    /// Crops `[n, 3, h, w]`, normalised: for the query encoder and for the key encoder.
    pub global: [Tensor; 2],
    /// Patches `[n, 9, 3, p, p]`, normalised: for the query encoder and for the key encoder.
    pub local: Option<[Tensor; 2]>,
}

impl Batch {
    /// Copies the sections of a slab: `global` are two of `[n, size, size, 3]`, `local` two of
    /// `[n, 9, patch, patch, 3]` bytes.
    ///
    /// # Errors
    /// When a section has another length.
    pub fn from_slab(
        global: [&[u8]; 2],
        local: Option<[&[u8]; 2]>,
        n: usize,
        size: usize,
        patch: usize,
        device: Device,
    ) -> Result<Batch, BatchError> {
        let crops = |bytes| images(bytes, n, size, device);
        let patches = |bytes| -> Result<Tensor, BatchError> {
            let p = patch as i64;
            Ok(images(bytes, 9 * n, patch, device)?.view([n as i64, 9, 3, p, p]))
        };
        let global = [crops(global[0])?, crops(global[1])?];
        let local = match local {
            Some([query, key]) => Some([patches(query)?, patches(key)?]),
            None => None,
        };
        Ok(Batch { global, local })
    }

    /// Samples, n.
    pub fn len(&self) -> i64 {
        self.global[0].size()[0]
    }

    /// Whether there is no sample.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Bytes `[n, edge, edge, 3]` to normalised floats `[n, 3, edge, edge]` on the device, with
/// torchvision's arithmetic: `(byte / 255 - mean) / std`.
///
/// # Errors
/// When there are more or fewer bytes.
pub fn images(bytes: &[u8], n: usize, edge: usize, device: Device) -> Result<Tensor, BatchError> {
    if n.checked_mul(edge * edge * 3) != Some(bytes.len()) {
        return Err(BatchError::Length { images: n, edge, found: bytes.len() });
    }
    let (rows, edge) = (n as i64, edge as i64);
    let pixels = Tensor::from_data_size(bytes, &[rows, edge, edge, 3], Kind::Uint8);
    let channels = |values: &[f32; 3]| Tensor::from_slice(values).view([3, 1, 1]).to_device(device);
    // Bytes travel to the device: a quarter of what floats would be.
    let mut floats = Tensor::empty([rows, 3, edge, edge], (Kind::Float, device));
    floats.copy_(&pixels.to_device(device).permute([0, 3, 1, 2]));
    let mut floats = floats.g_div_scalar_(255.0);
    let mut floats = floats.g_sub_(&channels(&MEAN));
    Ok(floats.g_div_(&channels(&STD)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_become_channels_first_normalised_floats() {
        let bytes: Vec<u8> = (0..2 * 4 * 4 * 3).map(|i| (i * 37 % 256) as u8).collect();
        let x = images(&bytes, 2, 4, Device::Cpu).unwrap();
        assert_eq!(x.size(), [2, 3, 4, 4]);
        assert!(x.is_contiguous());
        for (n, c, y, column) in [(0, 0, 0, 0), (0, 2, 3, 1), (1, 1, 2, 3), (1, 2, 3, 3)] {
            let byte = bytes[((n * 4 + y) * 4 + column) * 3 + c];
            let expected = (f32::from(byte) / 255.0 - MEAN[c]) / STD[c];
            let found = x.double_value(&[n as i64, c as i64, y as i64, column as i64]) as f32;
            assert_eq!(found, expected, "{n} {c} {y} {column}");
        }
    }

    #[test]
    fn patches_of_a_sample_stay_together() {
        let crops = [0_u8; 2 * 8 * 8 * 3];
        let patch = |n: usize, i: usize| vec![(n * 9 + i) as u8; 2 * 2 * 3];
        let patches: Vec<u8> = (0..2).flat_map(|n| (0..9).flat_map(move |i| patch(n, i))).collect();
        let batch =
            Batch::from_slab([&crops; 2], Some([&patches; 2]), 2, 8, 2, Device::Cpu).unwrap();
        let [query, _] = batch.local.unwrap();
        assert_eq!(query.size(), [2, 9, 3, 2, 2]);
        let value = query.double_value(&[1, 4, 0, 1, 1]) as f32;
        assert_eq!(value, (13.0 / 255.0 - MEAN[0]) / STD[0]);
    }

    #[test]
    fn a_short_section_is_refused() {
        let error = images(&[0; 47], 1, 4, Device::Cpu).unwrap_err();
        assert!(matches!(error, BatchError::Length { images: 1, edge: 4, found: 47 }));
        assert!(images(&[], usize::MAX, 4, Device::Cpu).is_err());
    }
}
