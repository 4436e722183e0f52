//! Four-component JPEG to RGB, by Pillow's formula.

use super::{Components, Probe};

/// Converts stored inks, `[height, width, 4]`, to RGB.
///
/// Pillow takes every four-component JPEG for Adobe's, whose inks are stored inverted (255 is no
/// ink), and multiplies: RGB = (255 - ink) * (255 - black) / 255. YCCK holds the inverted first three
/// inks as luma and chroma.
pub(super) fn to_rgb(inks: &[u8], header: &Probe, rgb: &mut Vec<u8>) {
    rgb.resize(inks.len() / 4 * 3, 0);
    let (inks, _) = inks.as_chunks::<4>();
    let (rgb, _) = rgb.as_chunks_mut::<3>();
    let ycck = header.components == Components::Ycck;
    for (to, &[a, b, c, light]) in rgb.iter_mut().zip(inks) {
        let ink = if ycck { ycc_to_rgb(a, b, c) } else { [255 - a, 255 - b, 255 - c] };
        *to = ink.map(|ink| light.saturating_sub(multiply(ink, light)));
    }
}

/// `a * b / 255`, rounded, without a division.
fn multiply(a: u8, b: u8) -> u8 {
    let product = u32::from(a) * u32::from(b) + 128;
    ((product + (product >> 8)) >> 8) as u8
}

/// JFIF's conversion in 16-bit fixed point, each product rounded as libjpeg does.
fn ycc_to_rgb(y: u8, cb: u8, cr: u8) -> [u8; 3] {
    const HALF: i32 = 1 << 15;
    let (y, cb, cr) = (i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128);
    let r = y + ((91881 * cr + HALF) >> 16);
    let g = y + ((-22554 * cb - 46802 * cr + HALF) >> 16);
    let b = y + ((116_130 * cb + HALF) >> 16);
    [r, g, b].map(|value| value.clamp(0, 255) as u8)
}
