//! Images that are decoded component by component: CMYK and YCCK, and chroma sampled more finely than luma. The
//! decoder gives each component as it is stored; this module upsamples it to the size of the image and converts
//! it to RGB, both as libjpeg and Pillow do.

use libjpeg_turbo_rs::{ComponentInfo, FrameHeader, RawImage};

use super::{Components, DecodeError, Probe};

/// Turns the planes of a picture with three or four components into `[height, width, 3]` RGB.
///
/// Pillow takes every four-component JPEG for Adobe's, whose inks are stored inverted (255 is no
/// ink), and multiplies: RGB = (255 - ink) * (255 - black) / 255. YCCK holds the inverted first three
/// inks as luma and chroma.
///
/// # Errors
/// [`DecodeError::Damaged`] where the planes are not as large as the header says.
pub(super) fn to_rgb(
    raw: &RawImage,
    frame: &FrameHeader,
    header: &Probe,
    rgb: &mut Vec<u8>,
) -> Result<(), DecodeError> {
    let planes = Plane::all(raw, frame, header)?;
    let (width, height) = (header.width as usize, header.height as usize);
    // A sample stands for up to four pixels, of which the last three may lie outside.
    let mut rows = vec![vec![0; width + 4]; planes.len()];
    rgb.resize(width * height * 3, 0);
    for (y, line) in rgb.chunks_exact_mut(width * 3).enumerate() {
        for (plane, row) in planes.iter().zip(&mut rows) {
            plane.row(y, row);
        }
        let at = |component: usize, x: usize| rows[component][x];
        for (x, pixel) in line.as_chunks_mut::<3>().0.iter_mut().enumerate() {
            let [a, b, c] = [at(0, x), at(1, x), at(2, x)];
            *pixel = match header.components {
                Components::Ycc => ycc_to_rgb(a, b, c),
                Components::Ycck => over_black(ycc_to_rgb(a, b, c), at(3, x)),
                Components::Cmyk => over_black([255 - a, 255 - b, 255 - c], at(3, x)),
                Components::Rgb | Components::Gray => [a, b, c],
            };
        }
    }
    Ok(())
}

/// CMY and `light`, the inverted black, as RGB.
fn over_black(cmy: [u8; 3], light: u8) -> [u8; 3] {
    cmy.map(|ink| light.saturating_sub(multiply(ink, light)))
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

/// The samples of one component.
struct Plane<'a> {
    samples: &'a [u8],
    stride: usize,
    /// Columns and rows that belong to the picture; the rest fills up the last blocks.
    size: [usize; 2],
    /// Pixels that a sample stands for, across and down.
    factors: [usize; 2],
}

impl<'a> Plane<'a> {
    fn all(
        raw: &'a RawImage,
        frame: &FrameHeader,
        header: &Probe,
    ) -> Result<Vec<Plane<'a>>, DecodeError> {
        let most = |factor: fn(&ComponentInfo) -> u8| {
            frame.components.iter().map(factor).max().map_or(1, usize::from)
        };
        let most = [most(|c| c.horizontal_sampling), most(|c| c.vertical_sampling)];
        let sides = [header.width as usize, header.height as usize];
        let planes = raw.planes.iter().zip(&raw.plane_widths).zip(&frame.components);
        let planes: Vec<_> = planes
            .map(|((samples, &stride), component)| {
                let own = [component.horizontal_sampling, component.vertical_sampling];
                let own = own.map(|factor| usize::from(factor).max(1));
                let size = [0, 1].map(|side| (sides[side] * own[side]).div_ceil(most[side]));
                let factors = [0, 1].map(|side| most[side] / own[side]);
                Plane { samples, stride, size, factors }
            })
            .collect();
        let whole = |plane: &Plane<'_>| {
            plane.size[0] <= plane.stride && plane.stride * plane.size[1] <= plane.samples.len()
        };
        if planes.len() == frame.components.len() && planes.len() >= 3 && planes.iter().all(whole) {
            return Ok(planes);
        }
        Err(DecodeError::Damaged { reason: "planes smaller than the picture".to_owned() })
    }

    fn line(&self, y: usize) -> &'a [u8] {
        &self.samples[y * self.stride..][..self.size[0]]
    }

    /// Row `y` of the picture. Halved components are interpolated with weights of 3 and 1 (libjpeg's
    /// "fancy upsampling"), all others repeated; so are rows of one or two samples.
    fn row(&self, y: usize, into: &mut [u8]) {
        let [across, down] = self.factors;
        let own = self.line((y / down).min(self.size[1] - 1));
        // Of two rows of pixels the upper one leans to the samples above, the lower to those below.
        let next = match y % 2 {
            0 => (y / 2).saturating_sub(1),
            _ => (y / 2 + 1).min(self.size[1] - 1),
        };
        let interpolated = self.size[0] > 2;
        match (across, down) {
            (1, 1) => into[..own.len()].copy_from_slice(own),
            (1, 2) => {
                let bias = 1 + (y % 2) as u16;
                for ((to, &near), &far) in into.iter_mut().zip(own).zip(self.line(next)) {
                    *to = ((3 * u16::from(near) + u16::from(far) + bias) >> 2) as u8;
                }
            }
            (2, 1) if interpolated => widen(own, |x| 4 * u16::from(own[x]), [4, 8], into),
            (2, 2) if interpolated => {
                let far = self.line(next);
                widen(own, |x| 3 * u16::from(own[x]) + u16::from(far[x]), [8, 7], into);
            }
            _ => {
                for (to, &sample) in into.chunks_mut(across).zip(own) {
                    to.fill(sample);
                }
            }
        }
    }
}

/// Two pixels of each sample, which `sum` gives four times too large: each is three quarters of its
/// own and one of its neighbour's. `biases` round the left and the right pixel.
fn widen(own: &[u8], sum: impl Fn(usize) -> u16, biases: [u16; 2], into: &mut [u8]) {
    let last = own.len() - 1;
    for (x, pair) in into.as_chunks_mut::<2>().0.iter_mut().take(own.len()).enumerate() {
        let sides = [x.saturating_sub(1), (x + 1).min(last)];
        for ((to, side), bias) in pair.iter_mut().zip(sides).zip(biases) {
            *to = ((3 * sum(x) + sum(side) + bias) >> 4) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The conversion against its definition in real numbers, for every colour.
    #[test]
    fn colours_are_jfifs_within_a_level() {
        for value in (0..1u32 << 24).step_by(7) {
            let [y, cb, cr] = [value as u8, (value >> 8) as u8, (value >> 16) as u8];
            let (fy, fb, fr) = (f64::from(y), f64::from(cb) - 128.0, f64::from(cr) - 128.0);
            let exact = [fy + 1.402 * fr, fy - 0.344_136 * fb - 0.714_136 * fr, fy + 1.772 * fb];
            for (got, exact) in ycc_to_rgb(y, cb, cr).into_iter().zip(exact) {
                let off = (f64::from(got) - exact.clamp(0.0, 255.0)).abs();
                assert!(off <= 1.0, "{y} {cb} {cr}: {got} for {exact}");
            }
        }
    }

    #[test]
    fn products_are_rounded() {
        for a in 0..=255u8 {
            for b in 0..=255u8 {
                let exact = (f64::from(a) * f64::from(b) / 255.0).round();
                assert_eq!(f64::from(multiply(a, b)), exact, "{a} * {b}");
            }
        }
    }
}
