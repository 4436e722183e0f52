//! Packing: every kind of source, every oddity, the same bytes however it is run.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{jpeg, picture, run_python};
use detco_shards::format::manifest::{Manifest, Part};
use detco_shards::format::{ShardError, verify};
use detco_shards::pack::{self, Job, OnError, Options, PackError, Progress, Resize, ShardSize};
use detco_shards::stream::ShardSet;

/// The same as PNG.
fn png(number: u32, width: u32, height: u32) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    picture(number, width, height).write_to(&mut bytes, image::ImageFormat::Png).expect("encodes");
    bytes.into_inner()
}

/// Every file below a folder, by relative path.
fn tree(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    fn walk(root: &Path, folder: &Path, files: &mut BTreeMap<String, Vec<u8>>) {
        for entry in std::fs::read_dir(folder).expect("lists") {
            let path = entry.expect("lists").path();
            if path.is_dir() {
                walk(root, &path, files);
            } else {
                let name = path.strip_prefix(root).expect("below").display().to_string();
                files.insert(name, std::fs::read(&path).expect("reads"));
            }
        }
    }
    let mut files = BTreeMap::new();
    walk(folder, folder, &mut files);
    files
}

fn job(source: &Path, out: &Path) -> Job {
    Job {
        source: source.to_path_buf(),
        out: out.to_path_buf(),
        options: Options { shard_size: ShardSize::Samples(4), ..Options::default() },
        part: Part::WHOLE,
        workers: 2,
        resume: false,
    }
}

fn run(job: &Job) -> Result<pack::Summary, PackError> {
    pack::run(job, &Progress::default())
}

fn write(root: &Path, name: &str, bytes: &[u8]) {
    let path = root.join(name);
    std::fs::create_dir_all(path.parent().expect("below the root")).expect("creates");
    std::fs::write(path, bytes).expect("writes");
}

/// Three classes, 23 images.
fn class_folders(root: &Path) -> BTreeMap<String, Vec<u8>> {
    for number in 0..23 {
        let class = ["cat", "dog", "wild cat"][number as usize % 3];
        write(root, &format!("{class}/{number:03}.jpg"), &jpeg(number, 20 + number, 16));
    }
    tree(root)
}

fn samples(out: &Path) -> BTreeMap<String, (Option<u32>, Vec<u8>)> {
    let set = ShardSet::open(&[out.display().to_string()]).expect("opens");
    let all = (0..set.len()).map(|id| {
        let sample = set.sample(id).expect("a sample");
        (sample.key.to_owned(), (sample.class().expect("a class"), sample.jpeg().to_vec()))
    });
    all.collect()
}

fn sound(out: &Path) {
    let report = verify::folder(out, 2, &std::sync::atomic::AtomicU64::new(0)).expect("lists");
    assert_eq!(report.faults, []);
    assert!(report.manifest);
}

#[test]
fn class_folders_become_shards() {
    let (source, out) = (tempfile::tempdir().expect("in"), tempfile::tempdir().expect("out"));
    let files = class_folders(source.path());
    let summary = run(&job(source.path(), out.path())).expect("packs");
    assert_eq!((summary.samples, summary.shards, summary.classes), (23, 6, 3));
    sound(out.path());
    let set = ShardSet::open(&[out.path().display().to_string()]).expect("opens");
    assert_eq!(set.classes(), ["cat", "dog", "wild cat"]);
    let packed = samples(out.path());
    assert_eq!(packed.len(), files.len());
    let manifest = Manifest::read(&summary.manifest).expect("reads");
    assert_eq!(manifest.class_samples, [8, 8, 7]);
    for (name, bytes) in files {
        let key = name.trim_end_matches(".jpg").replace(' ', "%20");
        let (class, stored) = &packed[&key];
        assert_eq!(*stored, bytes, "untouched");
        let expected =
            set.classes().iter().position(|class| name.starts_with(&format!("{class}/")));
        assert_eq!(class.map(|class| class as usize), expected);
    }
    let names: Vec<String> = tree(out.path()).into_keys().collect();
    assert_eq!(names.len(), 6 + 6 + 1, "{names:?}");
}

#[test]
fn the_same_bytes_at_any_worker_count() {
    let source = tempfile::tempdir().expect("in");
    class_folders(source.path());
    write(source.path(), "cat/broken.jpg", b"not an image");
    write(source.path(), "dog/really.jpg", &png(3, 40, 30));
    let packed = [1, 2, 5].map(|workers| {
        let out = tempfile::tempdir().expect("out");
        let mut job = Job { workers, ..job(source.path(), out.path()) };
        job.options.on_error = OnError::Skip;
        run(&job).expect("packs");
        sound(out.path());
        tree(out.path())
    });
    assert_eq!(packed[0], packed[1]);
    assert_eq!(packed[0], packed[2]);
}

#[test]
fn the_order_is_shuffled_by_seed_or_kept() {
    let source = tempfile::tempdir().expect("in");
    let files = class_folders(source.path());
    let order = |shuffle| {
        let out = tempfile::tempdir().expect("out");
        let mut job = job(source.path(), out.path());
        job.options.shuffle = shuffle;
        run(&job).expect("packs");
        let set = ShardSet::open(&[out.path().display().to_string()]).expect("opens");
        let key = |id| set.sample(id).expect("a sample").key.to_owned();
        (0..set.len()).map(key).collect::<Vec<_>>()
    };
    let sorted: Vec<String> =
        files.keys().map(|name| name.trim_end_matches(".jpg").replace(' ', "%20")).collect();
    assert_eq!(order(None), sorted);
    let (zero, one) = (order(Some(0)), order(Some(1)));
    assert_ne!(zero, sorted);
    assert_ne!(zero, one);
    let mut back = zero;
    back.sort();
    let mut expected = sorted;
    expected.sort();
    assert_eq!(back, expected);
}

#[test]
fn a_flat_folder_has_no_classes() {
    let (source, out) = (tempfile::tempdir().expect("in"), tempfile::tempdir().expect("out"));
    for number in 0..3 {
        write(source.path(), &format!("{number}.v2.jpg"), &jpeg(number, 20, 16));
    }
    run(&job(source.path(), out.path())).expect("packs");
    sound(out.path());
    let packed = samples(out.path());
    assert_eq!(packed.keys().collect::<Vec<_>>(), ["0%2Ev2", "1%2Ev2", "2%2Ev2"]);
    assert!(packed.values().all(|(class, _)| class.is_none()));
}

/// The same images as class folders, as a tar of them, and as a tar of a tar for each class.
const TARS: &str = r#"
import io, pathlib, sys, tarfile
root, out = map(pathlib.Path, sys.argv[1:3])
files = sorted(p for p in root.rglob("*") if p.is_file())
with tarfile.open(out / "plain.tar", "w") as tar:
    tar.add(root, "some/where")
with tarfile.open(out / "nested.tar", "w") as outer:
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        inner = io.BytesIO()
        with tarfile.open(fileobj=inner, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for p in sorted(folder.iterdir()): tar.add(p, p.name)
        info = tarfile.TarInfo(folder.name + ".tar"); info.size = len(inner.getvalue()); inner.seek(0)
        outer.addfile(info, inner)
"#;

#[test]
fn tars_and_a_tar_of_tars_hold_what_the_folders_hold() {
    let (source, tars) = (tempfile::tempdir().expect("in"), tempfile::tempdir().expect("tars"));
    class_folders(source.path());
    run_python(TARS, &[source.path(), tars.path()]);
    let packed = |from: &Path| {
        let out = tempfile::tempdir().expect("out");
        run(&job(from, out.path())).expect("packs");
        sound(out.path());
        let set = ShardSet::open(&[out.path().display().to_string()]).expect("opens");
        (set.classes().to_vec(), samples(out.path()), tree(out.path()))
    };
    let (classes, folders, bytes) = packed(source.path());
    let (nested_classes, nested, nested_bytes) = packed(&tars.path().join("nested.tar"));
    assert_eq!((&nested_classes, &nested), (&classes, &folders));
    assert_eq!(nested_bytes, bytes, "not only the samples: every byte, the manifest too");
    let (plain_classes, plain, _) = packed(&tars.path().join("plain.tar"));
    assert_eq!(plain_classes, classes);
    let moved: BTreeMap<_, _> =
        folders.into_iter().map(|(key, value)| (format!("some/where/{key}"), value)).collect();
    assert_eq!(plain, moved);
}

#[test]
fn a_webdataset_shard_is_a_source_too() {
    let (source, first, second) = (
        tempfile::tempdir().expect("in"),
        tempfile::tempdir().expect("out"),
        tempfile::tempdir().expect("again"),
    );
    class_folders(source.path());
    let mut whole = job(source.path(), first.path());
    whole.options.shard_size = ShardSize::Samples(100);
    run(&whole).expect("packs");
    let again = job(&first.path().join("000000.tar"), second.path());
    run(&again).expect("packs a shard");
    let (one, two) = (samples(first.path()), samples(second.path()));
    assert_eq!(
        one.into_values().collect::<std::collections::BTreeSet<_>>(),
        two.into_values().collect::<std::collections::BTreeSet<_>>(),
        "class numbers of .cls members are kept"
    );
    let set = ShardSet::open(&[second.path().display().to_string()]).expect("opens");
    assert_eq!(set.classes(), ["0", "1", "2"]);
}

/// ImageNet's oddities, made by Pillow.
const ODD: &str = r#"
import pathlib, sys
import numpy as np
from PIL import Image
root = pathlib.Path(sys.argv[1]); root.mkdir(exist_ok=True)
rng = np.random.default_rng(0)
rgb = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((64, 48), Image.BICUBIC)
rgb.save(root / "plain.JPEG", quality=90)
rgb.convert("L").save(root / "gray.JPEG", quality=90)
rgb.convert("CMYK").save(root / "cmyk.JPEG", quality=90)
rgb.save(root / "progressive.JPEG", quality=90, progressive=True)
exif = Image.Exif(); exif[0x0112] = 6
rgb.save(root / "turned.JPEG", quality=90, exif=exif)
rgb.save(root / "png.JPEG", format="PNG")
rgb.convert("RGBA").save(root / "alpha.png")
rgb.convert("P").save(root / "palette.png")
Image.fromarray(np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 20).save(root / "deep.png")
rgb.save(root / "bitmap.bmp")
rgb.save(root / "web.webp", lossless=True)
(root / "jpeg.png").write_bytes((root / "plain.JPEG").read_bytes())
(root / "tail.JPEG").write_bytes((root / "plain.JPEG").read_bytes() + b"of another program")
"#;

#[test]
fn oddities_are_handled_and_counted() {
    let (source, out) = (tempfile::tempdir().expect("in"), tempfile::tempdir().expect("out"));
    run_python(ODD, &[source.path()]);
    let summary = run(&job(source.path(), out.path())).expect("packs");
    let expected = [
        ("bmp", 1),
        ("cmyk", 1),
        ("exif_orientation", 1),
        ("gray", 1),
        ("jpeg_under_another_name", 1),
        ("other_format_under_a_jpeg_name", 1),
        ("png", 4),
        ("progressive", 1),
        ("trailing_bytes", 1),
        ("webp", 1),
    ];
    let found: Vec<(&str, u64)> =
        summary.oddities.iter().map(|(name, count)| (name.as_str(), *count)).collect();
    let cmyk_or_ycck = found
        .iter()
        .map(|(name, count)| if *name == "ycck" { ("cmyk", *count) } else { (*name, *count) })
        .collect::<Vec<_>>();
    let mut cmyk_or_ycck = cmyk_or_ycck;
    cmyk_or_ycck.sort_unstable();
    assert_eq!(cmyk_or_ycck, expected);

    let packed = samples(out.path());
    for name in ["plain", "gray", "cmyk", "progressive", "turned", "tail"] {
        let file = std::fs::read(source.path().join(format!("{name}.JPEG"))).expect("reads");
        assert_eq!(packed[name].1, file, "{name}: bytes are kept");
    }
    // Pillow says how far a transcoded image is from its source, and how far its own would be.
    let program = r#"
import io, sys, tarfile, pathlib
import numpy as np
from PIL import Image
source, out = map(pathlib.Path, sys.argv[1:3])
def error(a, b): return abs(np.asarray(a.convert("RGB"), float) - np.asarray(b, float)).mean()
def pillow(image, quality):
    file = io.BytesIO(); image.save(file, "JPEG", quality=quality, subsampling=0); return Image.open(file)
stored = {}
for shard in sorted(out.glob("*.tar")):
    with tarfile.open(shard) as tar:
        for m in tar: stored[m.name] = tar.extractfile(m).read()
for name, file in [("png", "png.JPEG"), ("alpha", "alpha.png"), ("palette", "palette.png"), ("bitmap", "bitmap.bmp"), ("web", "web.webp")]:
    image = Image.open(io.BytesIO(stored[name + ".jpg"]))
    assert image.format == "JPEG", image.format
    assert image.layer == [(1, 1, 1, 0), (2, 1, 1, 1), (3, 1, 1, 1)] or all(l[1:3] == (1, 1) for l in image.layer), image.layer
    first = Image.open(source / file).convert("RGB")
    ours, theirs = error(image, first), error(pillow(first, 95), first)
    print(name, ours, theirs); assert ours <= 1.1 * theirs + 0.1, name
assert Image.open(io.BytesIO(stored["deep.jpg"])).mode == "L"
"#;
    println!("{}", run_python(program, &[source.path(), out.path()]));
}

#[test]
fn faults_stop_or_are_listed() {
    let source = tempfile::tempdir().expect("in");
    class_folders(source.path());
    write(source.path(), "cat/broken.jpg", b"not an image");
    write(source.path(), "cat/empty.jpg", b"");
    write(source.path(), "cat/cut.jpg", &jpeg(1, 40, 30)[..30]);
    write(source.path(), "cat/000.png", &png(0, 20, 16));
    write(source.path(), "stray.jpg", &jpeg(9, 20, 16));
    let late = jpeg(5, 64, 48);
    write(source.path(), "cat/late.jpg", &late[..late.len() - 40]);
    write(source.path(), "cat/notes.txt", b"hello");
    write(source.path(), "cat/.hidden.jpg", b"x");
    write(source.path(), "cat/flower.gif", b"GIF89a????????????????????");

    let out = tempfile::tempdir().expect("out");
    let mut stops = job(source.path(), out.path());
    let error = run(&stops).expect_err("stops");
    assert!(matches!(&error, PackError::File { .. }), "{error}");
    assert!(error.to_string().contains("--on-error skip"), "{error}");

    stops.options.on_error = OnError::Skip;
    let summary = run(&stops).expect("skips");
    // `cat/000.png` has a stem with `cat/000.jpg`: both are packed.
    assert_eq!(summary.samples, 24);
    assert!(samples(out.path()).contains_key("cat/000%2Epng"));
    sound(out.path());
    let list = std::fs::read_to_string(out.path().join("skipped.jsonl")).expect("reads");
    let mut skips: Vec<(String, String)> = list
        .lines()
        .map(|line| {
            let skip: pack::Skip = serde_json::from_str(line).expect("JSON");
            (skip.path, skip.reason)
        })
        .collect();
    skips.sort();
    let paths: Vec<&str> = skips.iter().map(|(path, _)| path.as_str()).collect();
    let expected = [
        "cat/.hidden.jpg",
        "cat/broken.jpg",
        "cat/cut.jpg",
        "cat/empty.jpg",
        "cat/flower.gif",
        "cat/late.jpg",
        "cat/notes.txt",
        "stray.jpg",
    ];
    assert_eq!(paths, expected);
    let cut = ["cut off", "Premature end"]; // pure Rust's words, libjpeg's
    assert!(cut.iter().any(|words| skips[5].1.contains(words)), "{skips:?}");
    assert!(skips[7].1.starts_with("no class"), "{skips:?}");
    assert_eq!((summary.skipped, summary.faults), (8, 6));
}

/// Pillow writes what it can; the others by their first bytes.
const UNSUPPORTED: &str = r#"
import pathlib, sys
from PIL import Image
root = pathlib.Path(sys.argv[1]); image = Image.new("RGB", (32, 24), (200, 90, 30))
for name in ["GIF.gif", "TIFF.tif", "PNM.ppm", "AVIF.avif"]: image.save(root / name)
(root / "JPEG 2000.jpg").write_bytes(b"\0\0\0\x0cjP  \r\n\x87\n")
(root / "JPEG XL.jpg").write_bytes(b"\xff\x0a\xba\x21")
(root / "HEIC.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
(root / "not an image.heic").write_bytes(b"\0\0\0\x18ftypmp42\0\0\0\0isommp42")
"#;

#[test]
fn a_format_that_is_not_packed_is_named_with_those_that_are() {
    let (source, out) = (tempfile::tempdir().expect("in"), tempfile::tempdir().expect("out"));
    run_python(UNSUPPORTED, &[source.path()]);
    let names: Vec<String> = tree(source.path()).into_keys().collect();
    write(source.path(), "good.jpg", &jpeg(1, 20, 16));
    let mut job = job(source.path(), out.path());
    job.options.on_error = OnError::Skip;
    assert_eq!(run(&job).expect("packs").samples, 1);
    let list = std::fs::read_to_string(out.path().join("skipped.jsonl")).expect("reads");
    let skips: Vec<pack::Skip> =
        list.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(skips.len(), names.len(), "{skips:?}");
    for pack::Skip { path, reason, .. } in &skips {
        let format = path.split_once('.').expect("a name").0;
        let expected = match format {
            "not an image" => format.to_owned(),
            _ => format!("{format} is not supported: JPEG, PNG, WebP and BMP are"),
        };
        assert_eq!(*reason, expected, "{path}");
    }
}

#[test]
fn an_unreadable_file_is_a_fault() {
    let (source, out) = (tempfile::tempdir().expect("in"), tempfile::tempdir().expect("out"));
    class_folders(source.path());
    std::os::unix::fs::symlink("nowhere", source.path().join("cat/dangling.jpg")).expect("links");
    std::os::unix::fs::symlink("..", source.path().join("cat/loop")).expect("links");
    let mut job = job(source.path(), out.path());
    let error = run(&job).expect_err("stops").to_string();
    assert!(error.starts_with("cat/dangling.jpg: unreadable"), "{error}");
    assert_eq!(tree(out.path()).len(), 0, "nothing was written");
    job.options.on_error = OnError::Skip;
    assert_eq!(run(&job).expect("skips").skipped, 2);
}

#[test]
fn images_are_made_smaller_and_never_larger() {
    let (source, out) = (tempfile::tempdir().expect("in"), tempfile::tempdir().expect("out"));
    run_python(ODD, &[source.path()]);
    write(source.path(), "wide.jpg", &jpeg(1, 200, 101));
    write(source.path(), "small.jpg", &jpeg(2, 30, 31));
    let mut job = job(source.path(), out.path());
    job.options.resize = Some(Resize { short: 32, quality: 90 });
    run(&job).expect("packs");
    let packed = samples(out.path());
    assert_eq!(packed["small"].1, jpeg(2, 30, 31), "smaller already");
    let program = r#"
import io, sys, tarfile, pathlib
import numpy as np
from PIL import Image
source, out = map(pathlib.Path, sys.argv[1:3])
def error(a, b): return abs(np.asarray(a.convert("RGB"), float) - np.asarray(b, float)).mean()
def pillow(image, quality):
    file = io.BytesIO(); image.save(file, "JPEG", quality=quality, subsampling=0); return Image.open(file)
for shard in sorted(out.glob("*.tar")):
    with tarfile.open(shard) as tar:
        for m in tar:
            image = Image.open(io.BytesIO(tar.extractfile(m).read())); stem = m.name[:-4]
            file = next(p for p in source.iterdir() if p.stem == stem); first = Image.open(file)
            w, h = first.size; s = min(w, h)
            expected = (w, h) if s <= 32 else (round(w * 32 / s), round(h * 32 / s))
            assert abs(image.size[0] - expected[0]) <= 1 and abs(image.size[1] - expected[1]) <= 1, (stem, image.size, expected)
            assert min(image.size) == min(s, 32), (stem, image.size)
            if stem == "gray": assert image.mode == "L", image.mode
            if first.mode in ("I;16", "I"): continue
            small = first.convert("RGB").resize(image.size, Image.LANCZOS)
            ours, theirs = error(image, small), error(pillow(small, 90), small)
            print(stem, image.size, image.mode, ours, theirs); assert ours <= 1.1 * theirs + 0.3, stem
"#;
    println!("{}", run_python(program, &[source.path(), out.path()]));
}

#[test]
fn a_part_of_another_total_is_refused_before_anything_is_written() {
    let (source, out) = (tempfile::tempdir().expect("in"), tempfile::tempdir().expect("out"));
    class_folders(source.path());
    let (root, spec) = (out.path(), [out.path().display().to_string()]);
    let part = |number, of| Job { part: Part { number, of }, ..job(source.path(), root) };
    run(&part(1, 2)).expect("packs the first");
    let before = tree(root);
    for (number, of) in [(2, 3), (1, 3), (1, 1)] {
        for resume in [false, true] {
            let error = run(&Job { resume, ..part(number, of) }).expect_err("another total");
            assert!(matches!(error, PackError::OtherParts { .. }), "{error}");
            let text = error.to_string();
            assert!(text.contains("manifest-00001-of-00002.json"), "{text}");
            assert!(text.contains(&format!("--part {number}/{of}")), "{text}");
            assert_eq!(tree(root), before);
            assert!(!root.join(".pack").exists());
        }
    }

    // A part is missing: whoever opens the folder is told, and so is `verify`.
    let report = |root| verify::folder(root, 1, &0.into()).expect("lists").faults;
    let faults = report(root);
    assert_eq!(faults.len(), 1, "{faults:?}");
    assert!(faults[0].fault.contains("part 2 is missing"), "{faults:?}");
    let error = ShardSet::open(&spec).expect_err("a part is missing").to_string();
    assert!(error.contains(&faults[0].fault), "{error}");

    run(&part(2, 2)).expect("the right one packs");
    sound(root);

    // What an earlier version let happen is no data set.
    let (one, two) = ("manifest-00002-of-00002.json", "manifest-00002-of-00003.json");
    let text = std::fs::read_to_string(root.join(one)).expect("reads");
    std::fs::remove_file(root.join(one)).expect("removes");
    write(root, two, text.replace("\"of\": 2", "\"of\": 3").as_bytes());
    for text in
        [ShardSet::open(&spec).expect_err("2 and 3").to_string(), report(root)[0].fault.clone()]
    {
        assert!(text.contains("00001-of-00002") && text.contains("00002-of-00003"), "{text}");
    }
}

#[test]
fn an_unfinished_part_of_another_total_is_named() {
    let (source, out) = (tempfile::tempdir().expect("in"), tempfile::tempdir().expect("out"));
    class_folders(source.path());
    write(source.path(), "cat/broken.jpg", b"not an image");
    let part = |number, of| Job { part: Part { number, of }, ..job(source.path(), out.path()) };
    let stopped = (1..=2).find(|number| run(&part(*number, 2)).is_err()).expect("one stops");
    std::fs::remove_file(source.path().join("cat/broken.jpg")).expect("removes");
    let before = tree(out.path());
    let error = run(&part(1, 1)).expect_err("another total").to_string();
    // Where the second one stopped, the first one's manifest is named.
    let name = ["part-00001-of-00002.d", "manifest-00001-of-00002.json"][stopped as usize - 1];
    assert!(error.contains(name), "{error}");
    assert_eq!(tree(out.path()), before);
}

#[test]
fn parts_together_are_the_whole() {
    let (source, whole, parts) = (
        tempfile::tempdir().expect("in"),
        tempfile::tempdir().expect("out"),
        tempfile::tempdir().expect("parts"),
    );
    class_folders(source.path());
    run(&job(source.path(), whole.path())).expect("packs");
    for number in [3, 1, 2] {
        let part = Part { number, of: 3 };
        run(&Job { part, ..job(source.path(), parts.path()) }).expect("packs a part");
        let opened = ShardSet::open(&[parts.path().display().to_string()]);
        assert_eq!(opened.is_ok(), number == 2, "only all parts are a data set: {opened:?}");
    }
    sound(parts.path());
    let data = |folder: &Path| {
        let mut files = tree(folder);
        files.retain(|name, _| !name.starts_with("manifest"));
        files
    };
    assert_eq!(data(whole.path()), data(parts.path()));
    let print = |folder: &Path| {
        ShardSet::open(&[folder.display().to_string()]).expect("opens").fingerprint()
    };
    assert_eq!(print(whole.path()), print(parts.path()));
    let manifests = Manifest::all_in(parts.path()).expect("reads");
    assert_eq!(manifests.iter().map(|(_, one)| one.samples).sum::<u64>(), 23);
}

/// The manifest has the index's checksum: what differs from the index is the shard.
#[test]
fn a_damaged_header_is_the_shards_fault_and_hides_none_behind_it() {
    let (source, out) = (tempfile::tempdir().expect("in"), tempfile::tempdir().expect("out"));
    class_folders(source.path());
    run(&job(source.path(), out.path())).expect("packs");
    let spec = [out.path().display().to_string()];
    let set = ShardSet::open(&spec).expect("opens");
    let places: Vec<usize> =
        (0..4).map(|id| set.sample(id).expect("a sample").offset as usize).collect();
    drop(set);
    let tar = out.path().join("000000.tar");
    let whole = std::fs::read(&tar).expect("reads");
    let damage = |at: &[usize]| {
        let mut bytes = whole.clone();
        at.iter().for_each(|at| bytes[*at..*at + 8].fill(0xaa));
        std::fs::write(&tar, bytes).expect("writes");
        verify::folder(out.path(), 1, &0.into()).expect("lists").faults
    };
    let named = |error: ShardError, offset: usize| {
        assert!(matches!(error, ShardError::Damaged { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("000000.tar: shard damaged"), "{text}");
        assert!(text.contains(&format!("offset {offset}:")), "{text}");
        assert!(text.contains("detco verify") && !text.contains("delete"), "{text}");
    };

    // A header in the middle is met when its sample is read; one at an end when the set is opened.
    damage(&[places[1] - 512 + 148]);
    named(ShardSet::open(&spec).expect("opens").sample(1).expect_err("damaged"), places[1]);
    damage(&[places[0] - 512 + 148]);
    named(ShardSet::open(&spec).expect_err("damaged"), places[0]);

    // A header, a picture behind it, another header, another picture.
    let faults = damage(&[places[0] + 40, places[1] - 512 + 148, places[2] + 40, places[3] - 400]);
    assert!(faults.iter().all(|fault| fault.file == tar), "the index is sound: {faults:?}");
    let offsets: Vec<usize> =
        faults.iter().filter_map(|fault| fault.offset).map(|offset| offset as usize).collect();
    assert_eq!(offsets, [places[0], places[1] - 512, places[2], places[3] - 512], "{faults:?}");

    // Nothing vouches for the index: verify names the tar, and not the index as well.
    std::fs::remove_file(out.path().join("manifest.json")).expect("removes");
    let faults = damage(&[places[1] - 512 + 148]);
    assert_eq!(faults.len(), 1, "{faults:?}");
    assert_eq!((&faults[0].file, faults[0].offset), (&tar, Some(places[1] as u64 - 512)));
}

#[test]
fn shards_can_be_cut_by_bytes() {
    let (source, out) = (tempfile::tempdir().expect("in"), tempfile::tempdir().expect("out"));
    let files = class_folders(source.path());
    let most = 3000;
    let mut job = job(source.path(), out.path());
    job.options.shard_size = ShardSize::Bytes(most);
    let summary = run(&job).expect("packs");
    assert_eq!(summary.samples, 23);
    let largest = files.values().map(|bytes| bytes.len() as u64).max().expect("files");
    let set = ShardSet::open(&[out.path().display().to_string()]).expect("opens");
    for (number, shard) in set.shards().iter().enumerate() {
        let ids = shard.first()..shard.first() + shard.samples();
        let bytes: u64 = ids.map(|id| set.sample(id).expect("a sample").jpeg().len() as u64).sum();
        assert!(bytes < most + largest, "{bytes}");
        assert!(bytes >= most || number + 1 == set.shards().len(), "{bytes}");
    }
}

#[test]
fn a_run_goes_on_where_a_fault_stopped_it() {
    let (source, out, whole) = (
        tempfile::tempdir().expect("in"),
        tempfile::tempdir().expect("out"),
        tempfile::tempdir().expect("whole"),
    );
    class_folders(source.path());
    write(source.path(), "wild cat/broken.jpg", b"not an image");
    let mut interrupted = Job { workers: 1, ..job(source.path(), out.path()) };
    interrupted.options.shuffle = None;
    run(&interrupted).expect_err("stops at the last class");
    let before = tree(out.path());
    assert!(before.contains_key("000000.tar") && !before.contains_key("manifest.json"));
    let unfinished = ShardSet::open(&[out.path().display().to_string()]).expect_err("unfinished");
    assert!(unfinished.to_string().contains("--resume"), "{unfinished}");
    let again = run(&interrupted).expect_err("needs --resume");
    assert!(matches!(again, PackError::Interrupted { .. }), "{again}");

    // Other options, another source: refused, with the difference.
    let mut other = Job { resume: true, ..interrupted.clone() };
    other.options.shuffle = Some(3);
    let error = run(&other).expect_err("another run").to_string();
    assert!(error.contains("shuffle was null, now it is 3"), "{error}");
    write(source.path(), "cat/new.jpg", &jpeg(1, 20, 16));
    other.options = interrupted.options.clone();
    let error = run(&other).expect_err("another source").to_string();
    assert!(error.contains("number of images was 24, now it is 25"), "{error}");
    std::fs::remove_file(source.path().join("cat/new.jpg")).expect("removes");

    // Skipping what stopped it is what one wants to do.
    other.options.on_error = OnError::Skip;
    let progress = Progress::default();
    pack::run(&other, &progress).expect("goes on");
    assert!(progress.resumed.load(std::sync::atomic::Ordering::Relaxed) >= 4);
    let mut straight = Job { out: whole.path().to_path_buf(), ..other.clone() };
    straight.resume = false;
    run(&straight).expect("packs");
    assert_eq!(tree(out.path()), tree(whole.path()));

    // Another run cannot resume a finished one either, and leaves it whole.
    let mut different = other.clone();
    different.options.shard_size = ShardSize::Samples(5);
    let error = run(&different).expect_err("another run");
    assert!(matches!(error, PackError::Mismatch { .. }), "{error}");
    assert_eq!(tree(out.path()), tree(whole.path()));

    // Once finished, `resume` has nothing to do and a fresh run is refused.
    assert_eq!(run(&other).expect("finished").samples, 23);
    let error = run(&straight).expect_err("finished");
    assert!(matches!(error, PackError::Finished { .. }), "{error}");
}

#[test]
fn two_runs_do_not_share_an_output() {
    let (source, out) = (tempfile::tempdir().expect("in"), tempfile::tempdir().expect("out"));
    class_folders(source.path());
    let state = out.path().join(".pack/part.d");
    std::fs::create_dir_all(&state).expect("creates");
    let held = std::fs::File::create(state.join("lock")).expect("creates");
    held.lock().expect("locks");
    let error = run(&job(source.path(), out.path())).expect_err("busy");
    assert!(matches!(error, PackError::Busy { .. }), "{error}");
    drop(held);
    run(&job(source.path(), out.path())).expect("packs");
}

#[test]
fn a_shard_of_someone_else_is_not_overwritten() {
    let (source, out) = (tempfile::tempdir().expect("in"), tempfile::tempdir().expect("out"));
    class_folders(source.path());
    write(out.path(), "000003.tar", b"precious");
    let error = run(&job(source.path(), out.path())).expect_err("in the way").to_string();
    assert!(error.contains("000003.tar") && error.contains("never overwritten"), "{error}");
    assert_eq!(std::fs::read(out.path().join("000003.tar")).expect("reads"), b"precious");
}

#[test]
fn broken_tars_are_named() {
    let (source, tars) = (tempfile::tempdir().expect("in"), tempfile::tempdir().expect("tars"));
    class_folders(source.path());
    run_python(TARS, &[source.path(), tars.path()]);
    let whole = std::fs::read(tars.path().join("plain.tar")).expect("reads");
    std::fs::write(tars.path().join("cut.tar"), &whole[..whole.len() / 2]).expect("writes");
    let out = tempfile::tempdir().expect("out");
    let error = run(&job(&tars.path().join("cut.tar"), out.path())).expect_err("cut").to_string();
    assert!(error.contains("cut.tar: offset") && error.contains("truncated"), "{error}");

    // An inner tar that is cut: its images up to there, and all of the others.
    let program = r#"
import io, pathlib, sys, tarfile
root = pathlib.Path(sys.argv[1])
with tarfile.open(root / "nested.tar") as tar, tarfile.open(root / "hurt.tar", "w") as out:
    for m in tar:
        data = tar.extractfile(m).read()
        if m.name == "dog.tar": data = data[:3000]; m.size = 3000
        out.addfile(m, io.BytesIO(data))
"#;
    run_python(program, &[tars.path()]);
    let mut hurt = job(&tars.path().join("hurt.tar"), out.path());
    let error = run(&hurt).expect_err("hurt").to_string();
    assert!(error.starts_with("dog.tar: broken tar: offset"), "{error}");
    hurt.options.on_error = OnError::Skip;
    let summary = run(&hurt).expect("skips");
    assert!(summary.samples > 15 && summary.samples < 23 && summary.classes == 3, "{summary:?}");
}

#[test]
fn senseless_jobs_are_refused() {
    let (source, out) = (tempfile::tempdir().expect("in"), tempfile::tempdir().expect("out"));
    let empty = run(&job(source.path(), out.path())).expect_err("nothing there");
    assert!(matches!(empty, PackError::NoImages { .. }), "{empty}");
    class_folders(source.path());
    let inside = run(&job(source.path(), &source.path().join("shards"))).expect_err("inside");
    assert!(matches!(inside, PackError::OutInside { .. }), "{inside}");
    let mut zero = job(source.path(), out.path());
    zero.options.shard_size = ShardSize::Samples(0);
    assert!(matches!(run(&zero), Err(PackError::Option { .. })));
    let nowhere = job(Path::new("/nowhere"), out.path());
    assert!(run(&nowhere).expect_err("missing").to_string().contains("/nowhere"));
}

/// The folder of DETCO_TEST_IMAGES.
#[test]
#[ignore = "needs a folder of JPEGs named by DETCO_TEST_IMAGES"]
fn real_images_pack_untouched() {
    let source = std::env::var_os("DETCO_TEST_IMAGES").expect("DETCO_TEST_IMAGES is set");
    let out = tempfile::tempdir().expect("out");
    let mut job = job(Path::new(&source), out.path());
    job.options = Options { on_error: OnError::Skip, ..Options::default() };
    let summary = run(&job).expect("packs");
    sound(out.path());
    println!("{summary:?}");
    assert!(summary.samples > 0);
}
