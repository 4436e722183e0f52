//! The decoder against Pillow, and against bytes that are no picture.

#[path = "support/corpus.rs"]
mod corpus;
mod support;

use std::ffi::OsStr;
use std::path::Path;

use detco_shards::decode::{Components, DecodeError, Decoder, Format, Image, probe};
use jpeg_encoder::{ColorType, Encoder, SamplingFactor};
use serde_json::Value;

/// Decodes a file that Pillow has read and compares: size, EXIF, progressive, pixels.
/// The largest difference of a byte.
fn compare(folder: &Path, seen: &Value) -> u8 {
    let text = |key: &str| seen[key].as_str().unwrap();
    let number = |key: &str| seen[key].as_u64().unwrap();
    let bytes = std::fs::read(folder.join(text("file"))).unwrap();
    let name = text("file");
    let header = probe(&bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
    let size = (u64::from(header.width), u64::from(header.height));
    assert_eq!(size, (number("width"), number("height")), "{name}");
    assert_eq!(u64::from(header.orientation), number("orientation"), "{name}");
    if header.format == Format::Jpeg {
        assert_eq!(Some(header.progressive), seen["progressive"].as_bool(), "{name}");
        let mode = match header.components {
            Components::Gray => "L",
            Components::Ycc | Components::Rgb => "RGB",
            Components::Cmyk | Components::Ycck => "CMYK",
        };
        assert_eq!(mode, text("mode"), "{name}");
    }
    let mut image = Image::new();
    Decoder::new().decode(&bytes, &mut image).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!((image.width, image.height), (header.width, header.height), "{name}");
    let want = std::fs::read(folder.join(text("rgb"))).unwrap();
    assert_eq!(image.pixels.len(), want.len(), "{name}");
    image.pixels.iter().zip(&want).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

fn seen(output: &str) -> Vec<Value> {
    output.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Compares all files: each has Pillow's pixels to the byte.
fn hold(folder: &Path, files: &[Value]) {
    let off: Vec<_> = files
        .iter()
        .map(|file| (file["file"].as_str().unwrap(), compare(folder, file)))
        .filter(|(_, worst)| *worst > 0)
        .collect();
    assert!(off.is_empty(), "{} of {} files: {off:#?}", off.len(), files.len());
}

#[test]
fn every_kind_of_file_looks_as_in_pillow() {
    let folder = tempfile::tempdir().unwrap();
    let made = support::oracle("decode.py", &["make".as_ref(), folder.path().as_os_str()]);
    let files = seen(&made);
    assert!(files.len() > 200, "{} files", files.len());
    hold(folder.path(), &files);
}

/// Samplings that Pillow does not write, by another encoder, at sizes that end inside a block.
#[test]
fn every_chroma_sampling_looks_as_in_pillow() {
    use SamplingFactor::{F_1_1, F_1_2, F_2_1, F_2_2, F_4_1, F_4_2};
    let folder = tempfile::tempdir().unwrap();
    let mut names = Vec::new();
    for (width, height) in [(1, 1), (5, 7), (17, 33), (31, 16), (64, 64), (131, 77)] {
        let picture = support::images::textured(width, height, 8);
        let samplings = [
            ("444", F_1_1),
            ("422", F_2_1),
            ("440", F_1_2),
            ("420", F_2_2),
            ("411", F_4_1),
            ("410", F_4_2),
        ];
        for (sampling, factor) in samplings {
            for progressive in [false, true] {
                for restart in [0, 3] {
                    let kind = if progressive { "p" } else { "b" };
                    let name = format!("{width}x{height}-{sampling}{kind}{restart}.jpg");
                    let path = folder.path().join(&name);
                    let mut encoder = Encoder::new_file(&path, 90).unwrap();
                    encoder.set_sampling_factor(factor);
                    encoder.set_progressive(progressive);
                    encoder.set_restart_interval(restart);
                    let (w, h) = (width as u16, height as u16);
                    encoder.encode(&picture.pixels, w, h, ColorType::Rgb).unwrap();
                    names.push(path.into_os_string());
                }
            }
        }
    }
    let mut arguments = vec![OsStr::new("read"), folder.path().as_os_str()];
    arguments.extend(names.iter().map(|name| name.as_os_str()));
    let files = seen(&support::oracle("decode.py", &arguments));
    assert_eq!(files.len(), names.len());
    hold(folder.path(), &files);
}

/// Every kind of coding and of four inks, what libjpeg skips, and pictures of few columns.
#[test]
fn odd_files_look_as_in_pillow() {
    let folder = tempfile::tempdir().unwrap();
    let mut names = Vec::new();
    for (name, bytes) in corpus::files() {
        if name.starts_with("ok-") {
            let path = folder.path().join(format!("{name}.jpg"));
            std::fs::write(&path, bytes).unwrap();
            names.push(path.into_os_string());
        }
    }
    let mut arguments = vec![OsStr::new("read"), folder.path().as_os_str()];
    arguments.extend(names.iter().map(|name| name.as_os_str()));
    let files = seen(&support::oracle("decode.py", &arguments));
    assert!(files.len() == names.len() && files.len() > 120, "{} files", files.len());
    hold(folder.path(), &files);
}

/// The files of DETCO_TEST_IMAGES.
#[test]
#[ignore = "needs a folder of JPEGs named by DETCO_TEST_IMAGES"]
fn real_files_look_as_in_pillow() {
    let folder = tempfile::tempdir().unwrap();
    let real: Vec<_> =
        support::images::real_files().into_iter().map(|f| f.into_os_string()).collect();
    assert!(!real.is_empty(), "DETCO_TEST_IMAGES names no folder of JPEGs");
    let mut arguments = vec![OsStr::new("read"), folder.path().as_os_str()];
    arguments.extend(real.iter().map(|name| name.as_os_str()));
    hold(folder.path(), &seen(&support::oracle("decode.py", &arguments)));
}

fn jpeg(width: u32, height: u32, progressive: bool, color: ColorType, restart: u16) -> Vec<u8> {
    let picture = support::images::textured(width, height, 3);
    let pixels = match color {
        ColorType::Luma => picture.pixels.iter().step_by(3).copied().collect(),
        ColorType::Cmyk | ColorType::CmykAsYcck => {
            picture.pixels.chunks(3).flat_map(|p| [p[0], p[1], p[2], 99]).collect()
        }
        _ => picture.pixels,
    };
    let mut bytes = Vec::new();
    let mut encoder = Encoder::new(&mut bytes, 80);
    encoder.set_progressive(progressive);
    encoder.set_sampling_factor(SamplingFactor::F_2_2);
    encoder.set_restart_interval(restart);
    encoder.encode(&pixels, width as u16, height as u16, color).unwrap();
    bytes
}

fn kinds() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("baseline", jpeg(90, 70, false, ColorType::Rgb, 0)),
        ("restarts", jpeg(90, 70, false, ColorType::Rgb, 2)),
        ("progressive", jpeg(90, 70, true, ColorType::Rgb, 0)),
        ("gray", jpeg(90, 70, false, ColorType::Luma, 0)),
        ("cmyk", jpeg(90, 70, false, ColorType::Cmyk, 0)),
    ]
}

/// Cut anywhere, a file is an error: no picture ends in gray, however late the cut.
#[test]
fn truncated_anywhere_is_an_error() {
    let (mut decoder, mut image) = (Decoder::new(), Image::new());
    for (name, bytes) in kinds() {
        decoder.decode(&bytes, &mut image).unwrap_or_else(|e| panic!("{name}: {e}"));
        let whole = image.clone();
        // The last two bytes are the end marker. Without it nothing of the picture is missing.
        for end in 0..bytes.len() - 2 {
            if let Ok(()) = decoder.decode(&bytes[..end], &mut image) {
                // The bits before the end may all be padding: then the picture must be whole.
                assert!(end + 3 >= bytes.len(), "{name} cut at {end} of {} decodes", bytes.len());
                assert_eq!(image, whole, "{name} cut at {end} of {}", bytes.len());
            }
        }
    }
}

/// Every kind of file there is a path for in the decoder, small enough for thousands of tries.
fn more_kinds() -> Vec<(&'static str, Vec<u8>)> {
    let picture = support::images::textured(90, 70, 3);
    let sampled = |factor, progressive| {
        let mut bytes = Vec::new();
        let mut encoder = Encoder::new(&mut bytes, 80);
        encoder.set_sampling_factor(factor);
        encoder.set_progressive(progressive);
        encoder.encode(&picture.pixels, 90, 70, ColorType::Rgb).unwrap();
        bytes
    };
    let mut png = Vec::new();
    let pixels = image::RgbImage::from_raw(90, 70, picture.pixels.clone()).unwrap();
    pixels.write_to(&mut std::io::Cursor::new(&mut png), image::ImageFormat::Png).unwrap();
    let mut kinds = kinds();
    kinds.extend([
        ("4:4:4", sampled(SamplingFactor::F_1_1, false)),
        ("4:1:1", sampled(SamplingFactor::F_4_1, false)),
        ("4:1:1 progressive", sampled(SamplingFactor::F_4_1, true)),
        ("ycck", jpeg(90, 70, false, ColorType::CmykAsYcck, 0)),
        ("png", png),
    ]);
    kinds
}

/// Bent anywhere, a file gives a picture of the size in its header or an error, in bounded time,
/// and the decoder is as good as new after it.
#[test]
fn bent_10_000_times_nothing_panics_hangs_or_outlasts_its_file() {
    let mut state = 1u64;
    let mut next = |below: usize| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let kinds = more_kinds();
    let mut decoder = Decoder::new();
    let (mut image, mut whole) = (Image::new(), Vec::new());
    for (_, bytes) in &kinds {
        decoder.decode(bytes, &mut image).unwrap();
        whole.push(image.clone());
    }
    let (mut cases, mut decoded, mut slowest) = (0, 0, std::time::Duration::ZERO);
    for round in 0..1000 {
        for (kind, (name, bytes)) in kinds.iter().enumerate() {
            let mut bent = bytes.clone();
            for _ in 0..=next(3) {
                // Half of the flips in the headers, where they do most.
                let at = if next(2) == 0 { next(bent.len().min(700)) } else { next(bent.len()) };
                bent[at] ^= 1 << next(8);
            }
            // A third is cut as well.
            if next(3) == 0 {
                bent.truncate(next(bent.len()));
            }
            let start = std::time::Instant::now();
            match decoder.decode(&bent, &mut image) {
                Ok(()) => {
                    decoded += 1;
                    let header = probe(&bent).unwrap();
                    let size = (header.width, header.height);
                    assert_eq!((image.width, image.height), size, "{name}, round {round}");
                    let bytes = size.0 as usize * size.1 as usize * 3;
                    assert_eq!(image.pixels.len(), bytes, "{name}, round {round}");
                }
                Err(error) => assert!(!error.to_string().is_empty()),
            }
            slowest = slowest.max(start.elapsed());
            cases += 1;
            // The next kind, so that each follows each.
            let after = (kind + round) % kinds.len();
            decoder.decode(&kinds[after].1, &mut image).unwrap();
            assert!(image == whole[after], "{} after a bent {name}", kinds[after].0);
        }
    }
    println!("{}: {cases} bent files, {decoded} decoded, slowest {slowest:.1?}", decoder.name());
    assert_eq!(cases, 10_000);
    // A flip in a table of quantization or among the bits of a picture often leaves a picture.
    assert!((1000..9000).contains(&decoded), "{decoded} decoded");
}

#[test]
fn what_is_no_image_is_named() {
    let error = |bytes: &[u8]| Decoder::new().decode(bytes, &mut Image::new()).unwrap_err();
    assert!(matches!(error(b""), DecodeError::NotAnImage { len: 0, .. }));
    assert!(matches!(error(b"<html>not found</html>"), DecodeError::NotAnImage { len: 22, .. }));
    assert!(matches!(error(&[0xFF, 0xD8]), DecodeError::Truncated { offset: 2, .. }));
    assert!(matches!(error(&[0xFF, 0xD8, 0xFF, 0xD9]), DecodeError::Malformed { offset: 2, .. }));
    assert!(matches!(error(&[0xFF, 0xD8, 0xFF, 0xC5, 0, 2]), DecodeError::Unsupported { .. }));
}

/// A header that claims 65500 x 65500 is refused before its 12 GB are allocated.
#[test]
fn huge_images_are_refused() {
    let mut bytes = jpeg(16, 16, false, ColorType::Rgb, 0);
    let frame = bytes.windows(2).position(|w| w == [0xFF, 0xC0]).unwrap();
    bytes[frame + 5..frame + 9].copy_from_slice(&[0xFF, 0xDC, 0xFF, 0xDC]);
    let error = Decoder::new().decode(&bytes, &mut Image::new()).unwrap_err();
    assert!(matches!(error, DecodeError::TooLarge { width: 65500, height: 65500 }), "{error}");
}

/// Memory is reused: a smaller image leaves no trace of a larger one.
#[test]
fn an_image_is_reused() {
    let (mut decoder, mut image, mut fresh) = (Decoder::new(), Image::new(), Image::new());
    decoder.decode(&jpeg(90, 70, false, ColorType::Rgb, 0), &mut image).unwrap();
    let small = jpeg(20, 30, false, ColorType::Luma, 0);
    decoder.decode(&small, &mut image).unwrap();
    Decoder::new().decode(&small, &mut fresh).unwrap();
    assert_eq!(image, fresh);
    assert!(Decoder::new().name().contains(char::is_numeric));
}

/// A decoder that met a damaged file decodes the next one as a fresh one does.
#[test]
fn damage_does_not_outlast_its_file() {
    let kinds = kinds();
    let (mut decoder, mut image, mut fresh) = (Decoder::new(), Image::new(), Image::new());
    for (name, bytes) in &kinds {
        Decoder::new().decode(bytes, &mut fresh).unwrap();
        let table = bytes.windows(2).position(|pair| pair == [0xFF, 0xDB]).unwrap();
        let mut header = bytes.clone();
        header[table + 4] = 0x0F; // of 4 tables, the 16th
        for damaged in [&bytes[..bytes.len() / 2], &header] {
            assert!(decoder.decode(damaged, &mut image).is_err(), "{name}");
            decoder.decode(bytes, &mut image).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(image, fresh, "{name}");
        }
    }
}

/// A file without its tables of quantization is refused after whatever file: nothing is decoded with
/// another's. (Codes without tables are read by the standard's, as Motion JPEG has it.)
#[test]
fn a_file_without_tables_is_an_error_after_one_that_has_them() {
    let mut image = Image::new();
    let mut decoder = Decoder::new();
    for (name, bytes) in &kinds() {
        let mut lacking = bytes.clone();
        // All of them become comments.
        while let Some(at) = lacking.windows(2).position(|pair| pair == [0xFF, 0xDB]) {
            lacking[at + 1] = 0xFE;
        }
        decoder.decode(bytes, &mut image).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(decoder.decode(&lacking, &mut image).is_err(), "{name}");
    }
}
