//! Makes the JPEGs of `corpus/decode`: small ones of every kind, odd ones and damaged ones.
//!
//! `cargo run --bin odd_jpegs` writes them anew; the same bytes, for these versions of the encoders.
//! A name begins with `ok-` where the decoder reads the file, as libjpeg does, with `no-` where it must
//! refuse it.

use std::path::Path;

use jpeg_encoder::{ColorType, SamplingFactor};
use libjpeg_turbo_rs::{ColorSpace, Encoder, PixelFormat};

const WIDTH: usize = 37;
const HEIGHT: usize = 21;

/// Stripes, steps and grain, without a function whose last digit depends on the machine.
fn picture(width: usize, height: usize, channels: usize) -> Vec<u8> {
    let mut pixels = Vec::with_capacity(width * height * channels);
    for y in 0..height {
        for x in 0..width {
            for channel in 0..channels {
                let grain = ((x * 31 + y * 17 + channel * 7) * 2_654_435_761 >> 7) % 23;
                let step = if (x / 9 + y / 7 + channel).is_multiple_of(2) { 70 } else { 0 };
                pixels.push((40 + x * 3 + y * 2 * channel + step + grain).min(255) as u8);
            }
        }
    }
    pixels
}

fn segment(marker: u8, body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(body.len() + 2).expect("a segment's length");
    [&[0xFF, marker], &length.to_be_bytes()[..], body].concat()
}

fn find(bytes: &[u8], marker: u8) -> usize {
    bytes.windows(2).position(|pair| pair == [0xFF, marker]).expect("the marker")
}

/// `bytes` with something in front of their first segment of this kind.
fn before(bytes: &[u8], marker: u8, put: &[u8]) -> Vec<u8> {
    let at = find(bytes, marker);
    [&bytes[..at], put, &bytes[at..]].concat()
}

/// By the encoder that writes one scan for each component where its tables are made for the picture.
fn plain(factor: SamplingFactor, scans: bool, restart: u16, progressive: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = jpeg_encoder::Encoder::new(&mut bytes, 85);
    encoder.set_sampling_factor(factor);
    encoder.set_optimized_huffman_tables(scans);
    encoder.set_restart_interval(restart);
    encoder.set_progressive(progressive);
    let pixels = picture(WIDTH, HEIGHT, 3);
    encoder.encode(&pixels, WIDTH as u16, HEIGHT as u16, ColorType::Rgb).expect("encodes");
    bytes
}

/// A baseline JPEG of flat blocks, each component in a scan of its own, with a restart marker after
/// every so many blocks. (The encoder above counts restarts wrongly in such scans.)
fn flat(factors: [u8; 2], restart: u16) -> Vec<u8> {
    let [across, down] = factors.map(usize::from);
    let mut bytes = vec![0xFF, 0xD8];
    bytes.extend(segment(0xDB, &[&[0][..], &[8; 64]].concat()));
    let both = factors[0] << 4 | factors[1];
    let (h, w) = ((HEIGHT as u16).to_be_bytes(), (WIDTH as u16).to_be_bytes());
    let frame = [8, h[0], h[1], w[0], w[1], 3, 1, both, 0, 2, 0x11, 0, 3, 0x11, 0];
    bytes.extend(segment(0xC0, &frame));
    // Twelve codes of four bits for the sizes of means, one of one bit for the end of a block.
    let means: Vec<u8> = [0, 0, 0, 0, 12].into_iter().chain([0; 12]).chain(0..12).collect();
    bytes.extend(segment(0xC4, &means));
    let ends: Vec<u8> = [0x10, 1].into_iter().chain([0; 16]).collect();
    bytes.extend(segment(0xC4, &ends));
    bytes.extend(segment(0xDD, &restart.to_be_bytes()));
    for component in 0..3u8 {
        bytes.extend(segment(0xDA, &[1, component + 1, 0, 0, 63, 0]));
        let [across, down] = if component == 0 { [1, 1] } else { [across, down] };
        let columns = WIDTH.div_ceil(across).div_ceil(8);
        let rows = HEIGHT.div_ceil(down).div_ceil(8);
        let (mut bits, mut last, mut markers) = (String::new(), 0, 0);
        for block in 0..rows * columns {
            if restart > 0 && block > 0 && block.is_multiple_of(usize::from(restart)) {
                push_bits(&mut bytes, &bits);
                bytes.extend([0xFF, 0xD0 + markers % 8]);
                (bits, last, markers) = (String::new(), 0, markers + 1);
            }
            let mean = ((block * 37 + usize::from(component) * 59) % 200) as i32 - 100;
            let (difference, size) =
                (mean - last, 32 - (mean - last).unsigned_abs().leading_zeros());
            last = mean;
            bits += &format!("{size:04b}");
            if size > 0 {
                let value = if difference > 0 { difference } else { difference + (1 << size) - 1 };
                bits += &format!("{value:0width$b}", width = size as usize);
            }
            bits.push('0');
        }
        push_bits(&mut bytes, &bits);
    }
    bytes.extend([0xFF, 0xD9]);
    bytes
}

/// Bits as coded data, filled up with ones.
fn push_bits(bytes: &mut Vec<u8>, bits: &str) {
    for eight in bits.as_bytes().chunks(8) {
        let byte = (0..8)
            .fold(0, |byte, at| byte << 1 | u8::from(*eight.get(at).unwrap_or(&b'1') == b'1'));
        bytes.push(byte);
        if byte == 0xFF {
            bytes.push(0);
        }
    }
}

struct Files(Vec<(String, Vec<u8>)>);

impl Files {
    fn put(&mut self, name: &str, bytes: Vec<u8>) {
        self.0.push((name.to_owned(), bytes));
    }

    /// One file of each kind of coding.
    fn coded(&mut self, name: &str, encoder: &dyn Fn() -> Encoder<'static>) {
        let kinds: [(&str, fn(Encoder<'static>) -> Encoder<'static>); 4] = [
            ("", |e| e),
            ("-progressive", |e| e.progressive(true)),
            ("-arithmetic", |e| e.arithmetic(true).restart_blocks(3)),
            ("-arithmetic-progressive", |e| e.arithmetic(true).progressive(true)),
        ];
        for (kind, set) in kinds {
            self.put(&format!("ok-{name}{kind}"), set(encoder()).encode().expect("encodes"));
        }
    }
}

fn leaked(width: usize, height: usize, channels: usize) -> &'static [u8] {
    Box::leak(picture(width, height, channels).into_boxed_slice())
}

fn kinds(files: &mut Files) {
    let (rgb, cmyk, gray) =
        (leaked(WIDTH, HEIGHT, 3), leaked(WIDTH, HEIGHT, 4), leaked(WIDTH, HEIGHT, 1));
    let ycc = |factors: &[(u8, u8)]| {
        let factors = factors.to_vec();
        move || {
            let encoder = Encoder::new(rgb, WIDTH, HEIGHT, PixelFormat::Rgb).quality(85);
            encoder.sampling_factors(factors.clone())
        }
    };
    for (name, first) in [
        ("444", (1, 1)),
        ("422", (2, 1)),
        ("440", (1, 2)),
        ("420", (2, 2)),
        ("411", (4, 1)),
        ("441", (1, 4)),
        ("410", (4, 2)),
        ("311", (3, 1)),
    ] {
        files.coded(name, &ycc(&[first, (1, 1), (1, 1)]));
    }
    files.coded("chroma-finer", &ycc(&[(1, 1), (2, 2), (2, 1)]));
    files.coded("chroma-mixed", &ycc(&[(2, 2), (2, 1), (1, 2)]));
    let rgb_as_rgb = |first| {
        let encoder = Encoder::new(rgb, WIDTH, HEIGHT, PixelFormat::Rgb).quality(85);
        encoder.colorspace(ColorSpace::Rgb).sampling_factors(vec![first, (1, 1), (1, 1)])
    };
    files.coded("rgb", &|| rgb_as_rgb((1, 1)));
    files.coded("rgb-420", &|| rgb_as_rgb((2, 2)));
    let grays = || Encoder::new(gray, WIDTH, HEIGHT, PixelFormat::Grayscale).quality(85);
    files.coded("gray", &grays);
    files.coded("gray-22", &|| grays().sampling_factors(vec![(2, 2)]));
    for (space, name) in [(ColorSpace::Cmyk, "cmyk"), (ColorSpace::Ycck, "ycck")] {
        for (sampling, first) in
            [("444", (1, 1)), ("422", (2, 1)), ("440", (1, 2)), ("420", (2, 2))]
        {
            files.coded(&format!("{name}-{sampling}"), &|| {
                let encoder = Encoder::new(cmyk, WIDTH, HEIGHT, PixelFormat::Cmyk).quality(85);
                let factors = vec![first, (1, 1), (1, 1), first];
                encoder.colorspace(space).sampling_factors(factors)
            });
        }
    }
    for predictor in 1..=7 {
        let encoder = Encoder::new(rgb, WIDTH, HEIGHT, PixelFormat::Rgb).lossless(true);
        let bytes = encoder.lossless_predictor(predictor).encode().expect("encodes");
        files.put(&format!("ok-lossless-{predictor}"), bytes);
    }
    let encoder = Encoder::new(gray, WIDTH, HEIGHT, PixelFormat::Grayscale).lossless(true);
    files.put("ok-lossless-gray", encoder.encode().expect("encodes"));
    let encoder = Encoder::new(rgb, WIDTH, HEIGHT, PixelFormat::Rgb).lossless(true).restart_rows(4);
    files.put("ok-lossless-restarts", encoder.encode().expect("encodes"));
    for (width, height) in [(1, 1), (2, 9), (3, 9), (4, 9), (5, 2)] {
        let pixels = leaked(width, height, 3);
        files.coded(&format!("{width}x{height}"), &|| {
            let encoder = Encoder::new(pixels, width, height, PixelFormat::Rgb).quality(85);
            encoder.sampling_factors(vec![(2, 2), (1, 1), (1, 1)])
        });
    }
}

/// What libjpeg skips or bears.
fn lenient(files: &mut Files) {
    use SamplingFactor::{F_1_1, F_2_1, F_2_2};
    let base = plain(F_2_2, false, 0, false);
    for (name, factor) in [("444", F_1_1), ("422", F_2_1), ("420", F_2_2)] {
        files.put(&format!("ok-scans-{name}"), plain(factor, true, 0, false));
        files.put(&format!("ok-restarts-{name}"), plain(factor, false, 3, false));
        files.put(&format!("ok-restarts-{name}-progressive"), plain(factor, true, 3, true));
    }
    for (name, factors) in [("444", [1, 1]), ("422", [2, 1]), ("440", [1, 2]), ("420", [2, 2])] {
        files.put(&format!("ok-flat-scans-{name}"), flat(factors, 0));
        files.put(&format!("ok-flat-scans-{name}-restarts"), flat(factors, 2));
    }
    files.put("ok-bytes-between-segments", before(&base, 0xDB, &[b'A'; 16]));
    files.put("ok-bytes-before-scan", before(&base, 0xDA, b"junk"));
    files.put("ok-ff00-in-header", before(&base, 0xDB, &[0xFF, 0x00, 0xFF, 0x00, 1, 2]));
    let frame = find(&base, 0xC0);
    let hidden = [&[0xFF, 0x00], &base[frame + 1..frame + 19]].concat();
    files.put("ok-frame-behind-stuffing", before(&base, 0xC0, &hidden));
    files.put("ok-fill-bytes", before(&base, 0xC0, &[0xFF; 9]));
    files.put("ok-short-app14", before(&base, 0xDB, &segment(0xEE, b"Adobe\0d")));
    files.put("ok-empty-app14", before(&base, 0xDB, &segment(0xEE, b"")));
    files.put("ok-adobe-after-jfif", before(&base, 0xDB, &segment(0xEE, b"Adobe\0d\0\0\0\0\0")));
    let exif = |tiff: &[u8]| segment(0xE1, &[b"Exif\0\0", tiff].concat());
    files.put("ok-broken-exif", before(&base, 0xDB, &exif(b"MM\0*\xFF\xFF\xFF\xFF\xFF\xD9")));
    files.put("ok-empty-exif", before(&base, 0xDB, &exif(b"")));
    let tiff = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0";
    files.put("ok-orientation-6", before(&base, 0xDB, &exif(tiff)));
    let thumbnail = segment(0xE0, b"JFXX\0\x10\xFF\xD8\xFF\xC0\0\x04\xFF\xDA\xFF\xD9");
    files.put("ok-broken-thumbnail", before(&base, 0xDB, &thumbnail));
    let profile = segment(0xE2, b"ICC_PROFILE\0\x07\x02broken");
    files.put("ok-broken-profile", before(&base, 0xDB, &profile.repeat(3)));
    files.put("ok-comment", before(&base, 0xDB, &segment(0xFE, b"\xFF\xD9 not the end \xFF\xDA")));
    files.put("ok-bytes-behind", [&base[..], b"\0\0behind\xFF\xD8"].concat());
    files.put("ok-two-pictures", [&base[..], &plain(F_1_1, false, 0, true)].concat());
    let end = base.len() - 2;
    files.put("ok-bytes-before-end", [&base[..end], b"\x12\x34", &base[end..]].concat());
    files.put("ok-without-end", base[..end].to_vec());
}

/// What lacks pixels, contradicts itself, or is of a kind that is not read.
fn refused(files: &mut Files) {
    use SamplingFactor::{F_1_1, F_2_2};
    let base = plain(F_2_2, false, 0, false);
    let progressive = plain(F_2_2, true, 0, true);
    let restarts = plain(F_2_2, false, 1, false);
    files.put("no-half", base[..base.len() / 2].to_vec());
    let half = &base[..(base.len() + find(&base, 0xDA)) / 2];
    files.put("no-half-with-end", [half, &[0xFF, 0xD9]].concat());
    let last = progressive.windows(2).rposition(|pair| pair == [0xFF, 0xDA]).expect("a scan");
    files.put("no-last-scan", progressive[..last].to_vec());
    files.put("no-progressive-end", progressive[..progressive.len() - 2].to_vec());
    let marker = |bytes: &[u8], n: u8| find(bytes, 0xD0 + n);
    let (first, second) = (marker(&restarts, 0), marker(&restarts, 1));
    files.put("no-restart-0", [&restarts[..first], &restarts[second..]].concat());
    let mut swapped = restarts.clone();
    (swapped[first + 1], swapped[second + 1]) = (0xD1, 0xD0);
    files.put("no-swapped-restarts", swapped);
    let scan = find(&base, 0xDA);
    let mut hurt = base.clone();
    // No code is all ones.
    hurt[scan + 40..scan + 48].copy_from_slice(&[0xFF, 0, 0xFF, 0, 0xFF, 0, 0xFF, 0]);
    files.put("no-such-code", hurt);
    let frame = find(&base, 0xC0);
    let with = |at: usize, value: &[u8]| {
        let mut bytes = base.clone();
        bytes[frame + at..frame + at + value.len()].copy_from_slice(value);
        bytes
    };
    files.put("no-huge", with(5, &[0xFF, 0xDC, 0xFF, 0xDC]));
    files.put("no-side-of-65501", with(5, &[0xFF, 0xDD, 0, 1]));
    files.put("no-side-of-0", with(5, &[0, 0]));
    files.put("no-12-bits-said", with(4, &[12]));
    files.put("no-uneven-sampling", with(11, &[0x31, 0, 2, 0x21]));
    files.put("no-sampling-of-5", with(11, &[0x51]));
    files.put("no-second-frame", before(&base, 0xDA, &base[frame..frame + 19]));
    files.put("no-second-start", before(&base, 0xDB, &[0xFF, 0xD8]));
    files.put("no-tables", {
        let mut bytes = base.clone();
        while let Some(at) = bytes.windows(2).position(|pair| pair == [0xFF, 0xDB]) {
            bytes[at + 1] = 0xFE;
        }
        bytes
    });
    let scans = plain(F_1_1, true, 0, false);
    let second = scans.windows(2).rposition(|pair| pair == [0xFF, 0xDA]).expect("a scan");
    files.put("no-third-component", [&scans[..second], &[0xFF, 0xD9]].concat());
    let rgb = leaked(WIDTH, HEIGHT, 3);
    let lossless = Encoder::new(rgb, WIDTH, HEIGHT, PixelFormat::Rgb).lossless(true);
    files.put("no-lossless-arithmetic", lossless.arithmetic(true).encode().expect("encodes"));
    let mut sampled = Encoder::new(rgb, WIDTH, HEIGHT, PixelFormat::Rgb)
        .lossless(true)
        .encode()
        .expect("encodes");
    let frame = find(&sampled, 0xC3);
    sampled[frame + 11] = 0x22;
    files.put("no-lossless-sampled", sampled);
    let twelve: Vec<i16> = rgb.iter().map(|value| i16::from(*value) * 16).collect();
    let sampling = libjpeg_turbo_rs::Subsampling::S420;
    let twelve =
        libjpeg_turbo_rs::precision::compress_12bit(&twelve, WIDTH, HEIGHT, 3, 85, sampling);
    files.put("no-12-bits", twelve.expect("encodes"));
}

fn main() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/decode");
    let mut files = Files(Vec::new());
    kinds(&mut files);
    lenient(&mut files);
    refused(&mut files);
    for (name, bytes) in &files.0 {
        std::fs::write(folder.join(format!("{name}.jpg")), bytes).expect("writes");
    }
    println!("{} files", files.0.len());
}
