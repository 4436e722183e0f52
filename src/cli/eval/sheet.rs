//! A grid of pictures as a PNG.

use std::path::Path;

use anyhow::{Context, bail};
use detco_shards::files::write_atomically;
use image::{ImageEncoder as _, Rgb, RgbImage};

/// Pixels between cells.
const GAP: u32 = 6;
const BACKGROUND: Rgb<u8> = Rgb([34, 34, 38]);
/// Bytes of a grid's pixels; no viewer shows more.
const BYTES_MAX: u64 = 2 << 30;

/// Rows of cells: each row as high as its picture, all columns as wide as the widest.
pub(super) struct Sheet {
    pixels: RgbImage,
    tops: Vec<u32>,
    column: u32,
}

impl Sheet {
    /// For a row of cells for each of these sizes, width and height.
    ///
    /// # Errors
    /// When the grid would be too large.
    pub(super) fn new(sizes: &[[u32; 2]], columns: usize) -> anyhow::Result<Sheet> {
        let column = sizes.iter().map(|size| size[0]).max().unwrap_or(1);
        let width = u64::from(GAP) + columns as u64 * u64::from(column + GAP);
        let mut height = u64::from(GAP);
        let mut tops = Vec::with_capacity(sizes.len());
        for size in sizes {
            tops.push(height as u32); // checked below
            height += u64::from(size[1] + GAP);
        }
        let bytes = width.saturating_mul(height).saturating_mul(3);
        let room = |side: u64| u32::try_from(side).ok();
        match (room(width), room(height)) {
            (Some(width), Some(height)) if bytes <= BYTES_MAX => {
                let pixels = RgbImage::from_pixel(width, height, BACKGROUND);
                Ok(Sheet { pixels, tops, column })
            }
            _ => bail!(
                "the grid would have {width} x {height} pixels: give fewer pictures, or lower --size"
            ),
        }
    }

    /// Draws pixels `[height, width, 3]` into a cell.
    pub(super) fn draw(&mut self, row: usize, column: usize, width: u32, pixels: &[u8]) {
        let left = GAP + column as u32 * (self.column + GAP);
        for (at, pixel) in (0_u32..).zip(pixels.as_chunks::<3>().0) {
            let (x, y) = (left + at % width, self.tops[row] + at / width);
            if let Some(cell) = self.pixels.get_pixel_mut_checked(x, y) {
                *cell = Rgb(*pixel);
            }
        }
    }

    /// Writes the PNG, which appears whole.
    pub(super) fn write(&self, path: &Path) -> anyhow::Result<()> {
        let mut png = Vec::new();
        let encoder = image::codecs::png::PngEncoder::new(&mut png);
        let (width, height) = self.pixels.dimensions();
        encoder
            .write_image(self.pixels.as_raw(), width, height, image::ExtendedColorType::Rgb8)
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(write_atomically(path, &png)?)
    }
}
