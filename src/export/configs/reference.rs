//! The reference of `check.py`: an image, and the maps of Res2 to Res5 that this program computes of it, as `.npz`.

use std::io::{Cursor, Write};
use std::path::Path;

use detco_shards::views;
use tch::{Device, Kind, Tensor};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::super::{ExportError, bytes, whole};
use super::ConfigsError;
use crate::config::{self, Config};
use crate::model::Model;

/// Height and width of the image: other than each other, and divisible by 32, so that nobody pads it.
const SIZE: [i64; 2] = [96, 128];

/// The arrays of `reference.npz`: `image`, RGB, uint8 `[96, 128, 3]`, and `res2` to `res5`, float32 `[1, c, h, w]`, of
/// the normalised image, with running statistics.
pub(super) fn arrays(
    shape: &config::Model,
    backbone: &[(String, Tensor)],
) -> Result<Vec<(String, Tensor)>, ConfigsError> {
    let mut config = Config { model: shape.clone(), ..Config::default() };
    config.train.device = config::Device::Cpu;
    let mut model = Model::bare(&config, Device::Cpu)?;
    model.start_from(backbone)?;
    let image = image();
    let per_channel = |values: [f32; 3]| Tensor::from_slice(&values).view([1, 3, 1, 1]);
    let pixels = image.permute([2, 0, 1]).unsqueeze(0).to_kind(Kind::Float) / 255.0;
    let pixels = (pixels - per_channel(views::MEAN)) / per_channel(views::STD);
    let maps = model.query.maps(&pixels)?;
    let named = (2..).zip(maps).map(|(level, map)| (format!("res{level}"), map));
    Ok([("image".to_owned(), image)].into_iter().chain(named).collect())
}

/// Coloured squares with noise: every channel, row and column differs from its neighbours.
fn image() -> Tensor {
    let mut state = 1_u32;
    let mut noise = || {
        // Numerical Recipes' generator; its high bits are good enough for an image.
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 26
    };
    let [height, width] = SIZE;
    let mut pixels = Vec::new();
    for y in 0..height {
        for x in 0..width {
            for channel in 0..3 {
                let square = (37 * (y / 12) + 61 * (x / 16) + 83 * channel) % 192;
                pixels.push(u8::try_from(square).unwrap_or_default() + noise() as u8);
            }
        }
    }
    Tensor::from_slice(&pixels).view([height, width, 3])
}

/// Writes arrays as NumPy's `savez` does: a zip of stored `.npy` files
/// (<https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>).
pub(super) fn write(path: &Path, arrays: &[(String, Tensor)]) -> Result<(), ExportError> {
    let fault = |source| ExportError::Write { path: path.to_path_buf(), source };
    let zip_fault = |source| ExportError::Zip { path: path.to_path_buf(), source };
    whole::write(path, fault, |file| {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        for (name, tensor) in arrays {
            let options =
                SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
            zip.start_file(format!("{name}.npy"), options).map_err(zip_fault)?;
            zip.write_all(&header(name, tensor)?).map_err(fault)?;
            zip.write_all(&bytes(name, tensor)?).map_err(fault)?;
        }
        file.write_all(zip.finish().map_err(zip_fault)?.get_ref()).map_err(fault)
    })
}

/// The head of a `.npy` file of version 1.0: its length is a multiple of 64.
fn header(name: &str, tensor: &Tensor) -> Result<Vec<u8>, ExportError> {
    let dtype = match tensor.kind() {
        Kind::Float => "<f4",
        Kind::Uint8 => "|u1",
        kind => {
            return Err(ExportError::Kind { tensor: name.to_owned(), kind, format: ".npz" });
        }
    };
    let sides: Vec<String> = tensor.size().iter().map(|side| format!("{side}, ")).collect();
    let sides = sides.concat();
    let mut text = format!("{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({sides}), }}");
    let before = 10;
    let padded = (before + text.len() + 1).next_multiple_of(64) - before - 1;
    text.extend(std::iter::repeat_n(' ', padded - text.len()));
    text.push('\n');
    let mut head = b"\x93NUMPY\x01\x00".to_vec();
    // At most five dimensions of nineteen digits: far below 65,536.
    head.extend((text.len() as u16).to_le_bytes());
    head.extend(text.as_bytes());
    Ok(head)
}
