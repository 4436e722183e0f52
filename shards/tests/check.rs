//! Images that training would refuse are found before it: by their headers whenever they are packed,
//! by their pixels with `pack --check`, in shards that exist with `verify --decode`. And what packing
//! does with EXIF orientations.

use std::path::Path;
use std::sync::Arc;

use detco_shards::decode::{Decoder, Image, probe};
use detco_shards::format::manifest::{Manifest, Part};
use detco_shards::format::verify::{self, Images};
use detco_shards::order::Order;
use detco_shards::pack::{self, Job, OnError, Options, PackError, Progress};
use detco_shards::pipeline::{Loader, LoaderOptions};
use detco_shards::stream::ShardSet;
use detco_shards::views::Recipe;

#[path = "support/corpus.rs"]
mod corpus;

/// The odd files whose names say so, in class folders.
fn odd(root: &Path, wanted: impl Fn(&str) -> bool) -> Vec<String> {
    std::fs::create_dir_all(root.join("odd")).unwrap();
    let mut names = Vec::new();
    for (name, bytes) in corpus::files().into_iter().filter(|(name, _)| wanted(name)) {
        std::fs::write(root.join("odd").join(format!("{name}.jpg")), bytes).unwrap();
        names.push(name);
    }
    names
}

fn pack(source: &Path, out: &Path, options: Options) -> Result<pack::Summary, PackError> {
    let job = Job {
        source: source.to_path_buf(),
        out: out.to_path_buf(),
        options,
        part: Part::WHOLE,
        workers: 2,
        resume: false,
    };
    pack::run(&job, &Progress::default())
}

fn skipping(check: bool) -> Options {
    Options { on_error: OnError::Skip, check, ..Options::default() }
}

fn faults(folder: &Path, images: Images) -> Vec<verify::Fault> {
    verify::folder_with(folder, images, 2, &0.into()).unwrap().faults
}

fn keys(folder: &Path) -> Vec<String> {
    let set = ShardSet::open(&[folder.display().to_string()]).unwrap();
    let mut keys: Vec<_> =
        (0..set.len()).map(|id| set.sample(id).unwrap().key.replace("odd/", "")).collect();
    keys.sort();
    keys
}

#[test]
fn what_the_header_shows_is_refused_without_decoding() {
    let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let names = odd(source.path(), |_| true);
    pack(source.path(), out.path(), skipping(false)).unwrap();
    let packed = keys(out.path());
    for name in &names {
        let bytes = std::fs::read(source.path().join("odd").join(format!("{name}.jpg"))).unwrap();
        let known = probe(&bytes).is_err();
        assert!(!known || !packed.contains(name), "{name} is packed");
        assert!(!name.starts_with("ok-") || packed.contains(name), "{name} is not packed");
    }
    let skipped = std::fs::read_to_string(out.path().join("skipped.jsonl")).unwrap();
    assert!(skipped.contains("a lossless JPEG of arithmetic coding is not supported"), "{skipped}");
}

#[test]
fn check_leaves_out_what_verify_decode_names() {
    let source = tempfile::tempdir().unwrap();
    let [plain, checked] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let names = odd(source.path(), |_| true);
    pack(source.path(), plain.path(), skipping(false)).unwrap();
    pack(source.path(), checked.path(), skipping(true)).unwrap();
    let good: Vec<_> = names.iter().filter(|name| name.starts_with("ok-")).cloned().collect();
    assert_eq!(keys(checked.path()), good);
    assert_eq!(faults(checked.path(), Images::Decode), []);
    // Damaged, and packed: every byte is as it was, until somebody decodes it.
    let damaged: Vec<_> =
        keys(plain.path()).into_iter().filter(|name| name.starts_with("no-")).collect();
    assert!(damaged.contains(&"no-such-code".to_owned()), "{damaged:?}");
    assert_eq!(faults(plain.path(), Images::Read), []);
    let mut named = Vec::new();
    for fault in faults(plain.path(), Images::Decode) {
        assert!(fault.file.ends_with("000000.tar") && fault.offset.is_some(), "{fault:?}");
        assert!(fault.fault.starts_with("cannot be decoded: "), "{fault:?}");
        named.push(fault.member.unwrap().replace("odd/", ""));
    }
    named.sort();
    assert_eq!(named, damaged);
    // Without `skip` the first one stops it, by name.
    let out = tempfile::tempdir().unwrap();
    let options = Options { check: true, on_error: OnError::Fail, ..Options::default() };
    let error = pack(source.path(), out.path(), options).unwrap_err().to_string();
    assert!(error.contains("odd/no-") && error.contains("--on-error skip"), "{error}");
    // The options stand in the manifest where they are on, and change nothing where they are not.
    let text = |folder: &Path| std::fs::read_to_string(folder.join("manifest.json")).unwrap();
    assert!(!text(plain.path()).contains("\"check\""));
    assert!(
        text(checked.path()).contains("\"check\": true")
            || text(checked.path()).contains("\"check\":true")
    );
}

#[test]
fn training_names_the_commands_that_find_bad_images() {
    let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    odd(source.path(), |name| name.starts_with("ok-4") || name == "no-such-code");
    pack(source.path(), out.path(), Options::default()).unwrap();
    let set = Arc::new(ShardSet::open(&[out.path().display().to_string()]).unwrap());
    let order = Order::shuffled(set.len(), 4, 1).unwrap();
    let recipe = Recipe::detco().with_size(24);
    let options = LoaderOptions { workers: 1, ..LoaderOptions::train(recipe, order, 1, 1) };
    let error = Loader::start(set, options).unwrap().find_map(Result::err).expect("one is bad");
    let text = error.to_string();
    let command = format!("detco verify --decode {}", out.path().display());
    assert!(text.contains("no-such-code") && text.contains(&command), "{text}");
    assert!(text.contains("detco pack --check"), "{text}");
}

/// Quarters of a picture in four colours, so that each turn can be told.
fn quarters() -> image::RgbImage {
    image::RgbImage::from_fn(48, 32, |x, y| match (x < 24, y < 16) {
        (true, true) => image::Rgb([230, 20, 20]),
        (false, true) => image::Rgb([20, 200, 20]),
        (true, false) => image::Rgb([20, 20, 220]),
        (false, false) => image::Rgb([240, 240, 20]),
    })
}

/// The same picture stored for each orientation: what a camera held so would have written.
fn stored(orientation: u8) -> Vec<u8> {
    use image::imageops::{flip_horizontal, flip_vertical, rotate90, rotate180, rotate270};
    let upright = quarters();
    // The inverse of what TIFF 6.0 says of each value.
    let picture = match orientation {
        2 => flip_horizontal(&upright),
        3 => rotate180(&upright),
        4 => flip_vertical(&upright),
        5 => rotate270(&flip_horizontal(&upright)),
        6 => rotate270(&upright),
        7 => rotate90(&flip_horizontal(&upright)),
        8 => rotate90(&upright),
        _ => upright,
    };
    let mut bytes = Vec::new();
    let encoder = jpeg_encoder::Encoder::new(&mut bytes, 95);
    let (width, height) = (picture.width() as u16, picture.height() as u16);
    encoder.encode(&picture, width, height, jpeg_encoder::ColorType::Rgb).unwrap();
    let mut exif =
        b"\xFF\xE1\0\x22Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0".to_vec();
    exif.extend([orientation, 0, 0, 0, 0, 0, 0]);
    [&bytes[..2], &exif, &bytes[2..]].concat()
}

#[test]
fn orientation_is_ignored_unless_upright_is_asked_for() {
    let source = tempfile::tempdir().unwrap();
    std::fs::create_dir(source.path().join("a")).unwrap();
    for orientation in 1..=8 {
        let bytes = stored(orientation);
        assert_eq!(probe(&bytes).unwrap().orientation, orientation);
        std::fs::write(source.path().join(format!("a/{orientation}.jpg")), bytes).unwrap();
    }
    for upright in [false, true] {
        let out = tempfile::tempdir().unwrap();
        let summary =
            pack(source.path(), out.path(), Options { upright, ..Options::default() }).unwrap();
        assert_eq!(summary.oddities.get("turned_upright").copied(), upright.then_some(7));
        let set = ShardSet::open(&[out.path().display().to_string()]).unwrap();
        for id in 0..set.len() {
            let sample = set.sample(id).unwrap();
            let orientation: u8 = sample.key.trim_start_matches("a/").parse().unwrap();
            let untouched = !upright || orientation == 1;
            assert_eq!(sample.jpeg() == stored(orientation), untouched, "{orientation}");
            if upright {
                assert_eq!(probe(sample.jpeg()).unwrap().orientation, 1);
                let mut image = Image::new();
                Decoder::new().decode(sample.jpeg(), &mut image).unwrap();
                assert_eq!((image.width, image.height), (48, 32), "{orientation}");
                let upright = quarters().into_raw();
                let off = image.pixels.iter().zip(&upright).map(|(a, b)| a.abs_diff(*b));
                let sum: u64 = off.map(u64::from).sum();
                // Another turn is off by a hundred levels.
                assert!(sum < 4 * image.pixels.len() as u64, "{orientation}: {sum}");
            }
        }
    }
    let manifest = Manifest::all_in(source.path()).unwrap();
    assert!(manifest.is_empty(), "the source is left alone");
}
