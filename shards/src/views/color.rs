//! Colour, as Pillow's `ImageEnhance` and `convert` do it on 8-bit pixels: blends are computed in
//! `f32` and truncated, and every operation rounds to 8 bits before the next.

/// Blends with black. Factor 1 is the image.
pub(super) fn brightness(pixels: &mut [u8], factor: f32) {
    blend_flat(pixels, 0, factor);
}

/// Blends with the mean of the image's luma. Factor 1 is the image.
pub(super) fn contrast(pixels: &mut [u8], factor: f32) {
    let (pixels_rgb, _) = pixels.as_chunks::<3>();
    let sum: u64 = pixels_rgb.iter().map(|p| u64::from(luma(*p))).sum();
    let mean = (sum as f64 / pixels_rgb.len() as f64 + 0.5) as u8;
    blend_flat(pixels, mean, factor);
}

/// Blends with the image's luma. Factor 1 is the image.
pub(super) fn saturation(pixels: &mut [u8], factor: f32) {
    let (pixels, _) = pixels.as_chunks_mut::<3>();
    for pixel in pixels {
        let gray = luma(*pixel);
        *pixel = pixel.map(|value| blend(gray, value, factor));
    }
}

/// Three equal channels of luma.
pub(super) fn gray(pixels: &mut [u8]) {
    let (pixels, _) = pixels.as_chunks_mut::<3>();
    for pixel in pixels {
        *pixel = [luma(*pixel); 3];
    }
}

/// Turns the hue, through 8-bit HSV as Pillow does: the shift is truncated to 1/255 turns and the
/// sum wraps at 256.
pub(super) fn hue(pixels: &mut [u8], turns: f32) {
    let shift = (f64::from(turns) * 255.0) as i32 as u8;
    let (pixels, _) = pixels.as_chunks_mut::<3>();
    for pixel in pixels {
        let [h, s, v] = to_hsv(*pixel);
        *pixel = to_rgb([h.wrapping_add(shift), s, v]);
    }
}

/// ITU-R 601-2 luma in 16-bit fixed point, rounded.
fn luma([r, g, b]: [u8; 3]) -> u8 {
    ((u32::from(r) * 19595 + u32::from(g) * 38470 + u32::from(b) * 7471 + 0x8000) >> 16) as u8
}

/// `from` at factor 0, `to` at factor 1, truncated and clamped.
fn blend(from: u8, to: u8, factor: f32) -> u8 {
    let (from, to) = (f32::from(from), f32::from(to));
    // The cast saturates and truncates, as Pillow's clamp and cast do.
    (from + factor * (to - from)) as u8
}

fn blend_flat(pixels: &mut [u8], from: u8, factor: f32) {
    let table: [u8; 256] = std::array::from_fn(|value| blend(from, value as u8, factor));
    for value in pixels {
        *value = table[usize::from(*value)];
    }
}

fn to_hsv([r, g, b]: [u8; 3]) -> [u8; 3] {
    let (most, least) = (r.max(g).max(b), r.min(g).min(b));
    if most == least {
        return [0, 0, most];
    }
    let range = f32::from(most - least);
    let distance = |channel: u8| f32::from(most - channel) / range;
    let (r_far, g_far, b_far) = (distance(r), distance(g), distance(b));
    let sector = if r == most {
        b_far - g_far
    } else if g == most {
        (2.0 + f64::from(r_far) - f64::from(b_far)) as f32
    } else {
        (4.0 + f64::from(g_far) - f64::from(r_far)) as f32
    };
    let h = ((f64::from(sector) / 6.0 + 1.0) % 1.0) as f32;
    let s = range / f32::from(most);
    [(f64::from(h) * 255.0) as u8, (f64::from(s) * 255.0) as u8, most]
}

fn to_rgb([h, s, v]: [u8; 3]) -> [u8; 3] {
    if s == 0 {
        return [v; 3];
    }
    let turned = f64::from(h) * 6.0 / 255.0;
    let sector = turned.floor();
    let part = f64::from((turned - sector) as f32);
    let s = f64::from((f64::from(s) / 255.0) as f32);
    let scale = |x: f64| (f64::from(v) * (1.0 - x)).round() as u8;
    let (low, fall, rise) = (scale(s), scale(s * part), scale(s * (1.0 - part)));
    match sector as u8 % 6 {
        0 => [v, rise, low],
        1 => [fall, v, low],
        2 => [low, v, rise],
        3 => [low, fall, v],
        4 => [rise, low, v],
        _ => [v, low, fall],
    }
}
