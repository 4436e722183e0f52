//! The decoder's pixels of some two hundred pictures, as hashes: another decoder, or another version of
//! this one, has to make the same. `tests/decode.rs` holds the same files against Pillow.
//!
//! The files are those of `fuzz/corpus/decode` and pictures made here. Where a hash of `pixels.txt`
//! must change, this test prints the whole new table; CHANGELOG says why the pixels are others.

use std::fmt::Write as _;
use std::path::Path;

use detco_shards::decode::{Decoder, Image, Part, probe};
use jpeg_encoder::{ColorType, Encoder, SamplingFactor};
use sha2::{Digest, Sha256};

#[path = "support/corpus.rs"]
mod corpus;

/// Stripes, steps and grain in whole numbers: the same bytes on every machine.
fn picture(width: usize, height: usize) -> Vec<u8> {
    let mut pixels = Vec::with_capacity(width * height * 3);
    for y in 0..height {
        for x in 0..width {
            for channel in 0..3 {
                let grain = (((x * 31 + y * 17 + channel * 7) * 2_654_435_761) >> 7) % 23;
                let step = if (x / 13 + y / 11 + channel).is_multiple_of(2) { 80 } else { 0 };
                let wave = (x * (channel + 1) + y * 2) % 120;
                pixels.push((20 + wave + step + grain).min(255) as u8);
            }
        }
    }
    pixels
}

/// Every sampling and coding of the encoder, at sizes that end inside a block.
fn made() -> Vec<(String, Vec<u8>)> {
    use SamplingFactor::{F_1_1, F_1_2, F_2_1, F_2_2, F_4_1, F_4_2};
    let mut files = Vec::new();
    for (width, height) in [(53, 71), (160, 120)] {
        let pixels = picture(width, height);
        for (sampling, factor) in [
            ("444", F_1_1),
            ("422", F_2_1),
            ("440", F_1_2),
            ("420", F_2_2),
            ("411", F_4_1),
            ("410", F_4_2),
        ] {
            for (kind, progressive, scans, restart) in [
                ("baseline", false, false, 0),
                ("restarts", false, false, 5),
                ("scans", false, true, 0),
                ("progressive", true, false, 0),
            ] {
                let mut bytes = Vec::new();
                let mut encoder = Encoder::new(&mut bytes, 90);
                encoder.set_sampling_factor(factor);
                encoder.set_progressive(progressive);
                encoder.set_optimized_huffman_tables(scans);
                encoder.set_restart_interval(restart);
                encoder.encode(&pixels, width as u16, height as u16, ColorType::Rgb).unwrap();
                files.push((format!("made-{width}x{height}-{sampling}-{kind}"), bytes));
            }
        }
    }
    files
}

fn hash(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().take(8).fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// File, hash of its bytes, then for 1, 1/2 and 1/4 the hash of the pixels, or the error once.
fn line(name: &str, bytes: &[u8]) -> String {
    let (mut decoder, mut image) = (Decoder::new(), Image::new());
    let mut line = format!("{name} {}", hash(bytes));
    if let Err(error) = decoder.decode(bytes, &mut image) {
        return format!("{line} {error}");
    }
    let header = probe(bytes).unwrap();
    for reduction in [1, 2, 4] {
        let wanted = Part { reduction, ..Part::whole(header.width, header.height) };
        let part = decoder.decode_part(bytes, &header, wanted, &mut image).unwrap();
        let said = if part.reduction == reduction { hash(&image.pixels) } else { "-".to_owned() };
        let _ = write!(line, " {said}");
    }
    line
}

#[test]
fn pixels_are_what_they_were() {
    let mut files = corpus::files();
    files.extend(made());
    let now: Vec<String> = files.iter().map(|(name, bytes)| line(name, bytes)).collect();
    assert!(now.len() > 200, "{} files", now.len());
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pixels.txt");
    let then = std::fs::read_to_string(&path).unwrap();
    let then: Vec<&str> = then.lines().collect();
    let changed: Vec<_> = now.iter().filter(|line| !then.contains(&line.as_str())).collect();
    let same = now == then;
    if !same {
        println!("{}", now.join("\n"));
    }
    assert!(
        same,
        "the table above is not {}; {} lines: {changed:#?}",
        path.display(),
        changed.len()
    );
}

/// A file's name says whether it is a picture.
#[test]
fn odd_files_are_read_or_refused_as_their_names_say() {
    let (mut decoder, mut image) = (Decoder::new(), Image::new());
    for (name, bytes) in corpus::files() {
        let decoded = decoder.decode(&bytes, &mut image);
        match name.starts_with("ok-") {
            true => decoded.unwrap_or_else(|error| panic!("{name}: {error}")),
            false => assert!(decoded.is_err(), "{name} is decoded"),
        }
    }
}

/// Cut at every byte, no file becomes a picture, unless all that is cut off lies behind the pixels.
#[test]
fn no_odd_file_cut_anywhere_becomes_another_picture() {
    let (mut decoder, mut image, mut whole) = (Decoder::new(), Image::new(), Image::new());
    let mut cuts = 0;
    for (name, bytes) in corpus::files() {
        if !name.starts_with("ok-") || bytes.len() > 3000 {
            continue;
        }
        decoder.decode(&bytes, &mut whole).unwrap();
        for end in 0..bytes.len() {
            cuts += 1;
            if decoder.decode(&bytes[..end], &mut image).is_ok() {
                assert!(
                    image == whole,
                    "{name} cut at {end} of {} is another picture",
                    bytes.len()
                );
            }
        }
    }
    println!("{cuts} cuts");
    assert!(cuts > 50_000, "{cuts}");
}
