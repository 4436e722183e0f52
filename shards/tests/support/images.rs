//! Images for tests and benchmarks: generated, and those of DETCO_TEST_IMAGES.

#![expect(dead_code, reason = "no test or benchmark uses all of it")]

use std::path::{Path, PathBuf};

use detco_shards::decode::{Decoder, Image};

/// A small generator of its own, so that images do not depend on the code under test.
fn hash(mut x: u64) -> u64 {
    x = (x ^ (x >> 32)).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    x = (x ^ (x >> 32)).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    x ^ (x >> 32)
}

/// Independent bytes: the hardest image for anything that averages.
pub(crate) fn noise(width: u32, height: u32, seed: u64) -> Image {
    let bytes = u64::from(width) * u64::from(height) * 3;
    let pixels = (0..bytes).map(|i| hash(i ^ (seed << 40)) as u8).collect();
    Image { width, height, pixels }
}

/// Soft gradients, hard edges, fine texture and a little noise, in colour.
pub(crate) fn textured(width: u32, height: u32, seed: u64) -> Image {
    let mut pixels = Vec::with_capacity((width * height * 3) as usize);
    for y in 0..height {
        for x in 0..width {
            let (fx, fy) = (f64::from(x), f64::from(y));
            let noise = hash(u64::from(x) ^ (u64::from(y) << 20) ^ (seed << 40));
            for channel in 0..3u64 {
                let phase = (seed * 3 + channel) as f64;
                let wave = (fx * 0.031 + phase).sin() + (fy * 0.047 - phase).cos();
                let fine = ((fx + fy * 0.7) * 0.9 + phase).sin() * 0.3;
                let edge = if (u64::from((x / 37) ^ (y / 29)) + channel).is_multiple_of(2) {
                    0.5
                } else {
                    -0.3
                };
                let grain = ((noise >> (channel * 8)) & 15) as f64 - 7.5;
                let value = 128.0 + 45.0 * (wave + fine + edge) + grain;
                pixels.push(value.clamp(0.0, 255.0) as u8);
            }
        }
    }
    Image { width, height, pixels }
}

/// A file's picture, for the crate `image`.
pub(crate) fn rgb(file: &[u8]) -> image::RgbImage {
    let mut image = Image::new();
    Decoder::new().decode(file, &mut image).unwrap();
    image::RgbImage::from_raw(image.width, image.height, image.pixels).unwrap()
}

/// The files below DETCO_TEST_IMAGES, sorted.
pub(crate) fn real_files() -> Vec<PathBuf> {
    fn walk(folder: &Path, into: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { walk(&path, into) } else { into.push(path) }
        }
    }
    let mut files = Vec::new();
    if let Some(folder) = std::env::var_os("DETCO_TEST_IMAGES") {
        walk(Path::new(&folder), &mut files);
    }
    files.sort();
    files
}

/// Up to `count` JPEG files: of DETCO_TEST_IMAGES, else generated ones of ImageNet's common size.
pub(crate) fn jpegs(count: usize) -> Vec<Vec<u8>> {
    let real: Vec<_> =
        real_files().iter().take(count).map(|path| std::fs::read(path).unwrap()).collect();
    if !real.is_empty() {
        return real;
    }
    let encode = |seed: usize| {
        let (width, height) = if seed.is_multiple_of(3) { (375, 500) } else { (500, 375) };
        let image = textured(width, height, seed as u64);
        let mut bytes = Vec::new();
        let mut encoder = jpeg_encoder::Encoder::new(&mut bytes, 90);
        encoder.set_sampling_factor(jpeg_encoder::SamplingFactor::F_2_2);
        encoder
            .encode(&image.pixels, width as u16, height as u16, jpeg_encoder::ColorType::Rgb)
            .unwrap();
        bytes
    };
    (0..count.min(16)).map(encode).collect()
}
