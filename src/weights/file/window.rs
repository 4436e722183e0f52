//! A tensor as a window on the bytes of its storage.

use std::ops::Range;
use std::path::Path;

use super::super::pickle::{Data, TensorRef};
use super::super::{Dtype, WeightsError};
use super::RawTensor;

/// A tensor that is to be read.
pub(super) struct Wanted<'a> {
    pub(super) path: &'a Path,
    /// Bytes of the file.
    pub(super) len: u64,
    pub(super) name: &'a str,
    pub(super) tensor: &'a TensorRef,
}

/// What was checked of a tensor: it lies in its storage and is not larger than it, so that neither a
/// wild index nor a zero stride (a terabyte from one element) is followed.
pub(super) struct Window {
    pub(super) dtype: Dtype,
    /// Elements of the storage.
    storage: usize,
    /// Elements of the tensor.
    pub(super) count: usize,
}

impl Wanted<'_> {
    pub(super) fn window(&self) -> Result<Window, WeightsError> {
        let tensor = self.tensor;
        let dtype = tensor.dtype.ok_or_else(|| WeightsError::Dtype {
            path: self.path.to_path_buf(),
            tensor: self.name.to_string(),
            dtype: tensor.dtype_name.clone(),
        })?;
        let product = || tensor.size.iter().try_fold(1_i64, |all, n| all.checked_mul(*n));
        let storage = match tensor.data {
            Data::Storage { len, .. } => Some(len),
            Data::Inline(_) | Data::Latin1(_) | Data::Escaped(_) => product(),
        };
        let storage = storage.unwrap_or(-1);
        let inside = count_inside(tensor, storage, dtype.bytes());
        let (storage, count) = inside.ok_or_else(|| WeightsError::Window {
            path: self.path.to_path_buf(),
            tensor: self.name.to_string(),
            offset: tensor.offset,
            size: tensor.size.clone(),
            stride: tensor.stride.clone(),
            storage,
        })?;
        Ok(Window { dtype, storage, count })
    }

    /// Whether the storage has as many bytes as its elements take.
    pub(super) fn check(&self, bytes: &[u8], window: &Window) -> Result<(), WeightsError> {
        let (need, have) = (window.storage * window.dtype.bytes(), bytes.len());
        if have >= need {
            return Ok(());
        }
        Err(WeightsError::Storage {
            path: self.path.to_path_buf(),
            tensor: self.name.to_string(),
            record: match &self.tensor.data {
                Data::Storage { key, .. } => format!("data/{key}"),
                data => format!("at byte {}", inline(data).0.start),
            },
            need,
            have,
        })
    }

    /// Takes bytes from what may still be read.
    pub(super) fn spend(&self, left: &mut u64, bytes: usize) -> Result<(), WeightsError> {
        *left = left.checked_sub(bytes as u64).ok_or_else(|| WeightsError::Repeated {
            path: self.path.to_path_buf(),
            tensor: self.name.to_string(),
            len: self.len,
        })?;
        Ok(())
    }

    /// The elements in row-major order, of a window that was checked.
    pub(super) fn gather(&self, storage: &[u8], window: &Window) -> RawTensor {
        let (each, mut at) = (window.dtype.bytes(), self.tensor.offset);
        let size = self.tensor.size.clone();
        // An axis of one element may have any stride.
        let axes = size.iter().zip(&self.tensor.stride).filter(|(size, _)| **size != 1);
        let axes: Vec<(i64, i64)> = axes.map(|(size, stride)| (*size, *stride)).collect();
        let mut bytes = Vec::with_capacity(window.count * each);
        let mut index = vec![0; axes.len()];
        for _ in 0..window.count {
            let from = at as usize * each;
            bytes.extend_from_slice(&storage[from..from + each]);
            for (index, (size, stride)) in index.iter_mut().zip(&axes).rev() {
                *index += 1;
                at += stride;
                if *index < *size {
                    break;
                }
                at -= stride * size;
                *index = 0;
            }
        }
        RawTensor { dtype: window.dtype, size, bytes }
    }
}

/// Elements of the storage and of the tensor, if the tensor lies inside and is no larger.
fn count_inside(tensor: &TensorRef, storage: i64, each: usize) -> Option<(usize, usize)> {
    let len = usize::try_from(storage).ok()?;
    // The byte length must be a size as well.
    len.checked_mul(each)?;
    if tensor.size.len() != tensor.stride.len() || tensor.offset < 0 {
        return None;
    }
    let (mut count, mut last): (i64, i64) = (1, tensor.offset);
    for (size, stride) in tensor.size.iter().zip(&tensor.stride) {
        if *size < 0 || *stride < 0 {
            return None;
        }
        count = count.checked_mul(*size)?;
        last = last.checked_add((size - 1).max(0).checked_mul(*stride)?)?;
    }
    let inside = count == 0 || (last < storage && count <= storage);
    inside.then_some((len, usize::try_from(count).ok()?))
}

/// What bytes of a pickle stand for.
pub(super) type Unpack = fn(Vec<u8>) -> Vec<u8>;

/// Where bytes of a pickle are, and what they stand for. Those that stand for nothing are none, which
/// is too short for any tensor.
pub(super) fn inline(data: &Data) -> (Range<usize>, Unpack) {
    match data {
        Data::Storage { .. } => (0..0, |raw| raw),
        Data::Inline(range) => (range.clone(), |raw| raw),
        Data::Latin1(range) => (range.clone(), |raw| latin1(&raw).unwrap_or_default()),
        Data::Escaped(range) => (range.clone(), |raw| escaped(&raw).unwrap_or_default()),
    }
}

/// The bytes that UTF-8 stands for, one a character.
pub(super) fn latin1(text: &[u8]) -> Option<Vec<u8>> {
    std::str::from_utf8(text).ok()?.chars().map(|c| u8::try_from(c).ok()).collect()
}

/// The bytes that Latin-1 with `\u00ff` stands for, one a character.
pub(super) fn escaped(mut text: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    while let [first, rest @ ..] = text {
        if let (b'\\', [b'u', digits @ ..]) = (first, rest) {
            let number = std::str::from_utf8(digits.get(..4)?).ok()?;
            bytes.push(u8::try_from(u32::from_str_radix(number, 16).ok()?).ok()?);
            text = &digits[4..];
        } else {
            bytes.push(*first);
            text = rest;
        }
    }
    Some(bytes)
}
