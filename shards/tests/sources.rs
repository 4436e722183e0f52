//! What `detco pack` makes of sources as people have them: nothing is lost and nothing renumbered
//! without a word.

#[expect(dead_code, reason = "no need of Python here")]
mod common;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{jpeg, picture};
use detco_shards::format::manifest::{Manifest, Part};
use detco_shards::pack::{
    self, Job, LabelFault, OnError, Options, PackError, Progress, ShardSize, Skip, Summary,
};
use detco_shards::stream::ShardSet;

thread_local! {
    /// What packing on this thread said.
    static SAID: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// A packed source.
#[derive(Debug)]
struct Packed {
    summary: Summary,
    /// Key to class and file.
    samples: BTreeMap<String, (Option<u32>, Vec<u8>)>,
    classes: Vec<String>,
    skips: Vec<Skip>,
    notes: Vec<String>,
    /// Every file that was written.
    bytes: BTreeMap<PathBuf, Vec<u8>>,
}

impl Packed {
    fn keys(&self) -> Vec<&str> {
        self.samples.keys().map(String::as_str).collect()
    }

    /// Path and reason of what was left out and looked like something to pack.
    fn faults(&self) -> Vec<(&str, &str)> {
        let faults = self.skips.iter().filter(|skip| skip.fault);
        faults.map(|skip| (skip.path.as_str(), skip.reason.as_str())).collect()
    }
}

fn pack_with(source: &Path, options: Options) -> Result<Packed, PackError> {
    let out = tempfile::tempdir().expect("out");
    let job = |workers, out: &Path| Job {
        source: source.to_path_buf(),
        out: out.to_path_buf(),
        options: options.clone(),
        part: Part::WHOLE,
        workers,
        resume: false,
    };
    SAID.take();
    let notice: fn(&str) = |text| SAID.with_borrow_mut(|said| said.push(text.to_owned()));
    let progress = Progress { notice: Some(notice), ..Progress::default() };
    let summary = pack::run(&job(1, out.path()), &progress)?;
    let notes = SAID.take();
    let set = ShardSet::open(&[out.path().display().to_string()]).expect("opens");
    let samples = (0..set.len()).map(|id| {
        let sample = set.sample(id).expect("a sample");
        (sample.key.to_owned(), (sample.class().expect("a class"), sample.jpeg().to_vec()))
    });
    let samples: BTreeMap<_, _> = samples.collect();
    assert_eq!(samples.len() as u64, set.len(), "each key once");
    let list = std::fs::read_to_string(out.path().join("skipped.jsonl")).unwrap_or_default();
    let skips: Vec<Skip> =
        list.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(summary.faults, skips.iter().filter(|skip| skip.fault).count() as u64);
    let files = |folder: &Path| {
        let list = std::fs::read_dir(folder).expect("lists");
        let paths = list.map(|entry| entry.expect("lists").path());
        paths
            .map(|path| {
                (path.file_name().expect("a name").into(), std::fs::read(&path).expect("reads"))
            })
            .collect::<BTreeMap<PathBuf, Vec<u8>>>()
    };
    let bytes = files(out.path());
    // The same at any number of workers.
    let again = tempfile::tempdir().expect("out");
    pack::run(&job(3, again.path()), &Progress::default()).expect("packs");
    assert!(files(again.path()) == bytes, "other bytes with three workers");
    Ok(Packed { summary, samples, classes: set.classes().to_vec(), skips, notes, bytes })
}

fn options(on_error: OnError) -> Options {
    Options { shard_size: ShardSize::Samples(5), on_error, ..Options::default() }
}

fn packed(source: &Path) -> Packed {
    pack_with(source, options(OnError::Fail)).expect("packs")
}

fn skipping(source: &Path) -> Packed {
    pack_with(source, options(OnError::Skip)).expect("packs")
}

fn refused(source: &Path) -> String {
    pack_with(source, options(OnError::Fail)).expect_err("refuses").to_string()
}

fn write(root: &Path, name: &str, bytes: &[u8]) {
    let path = root.join(name);
    std::fs::create_dir_all(path.parent().expect("below the root")).expect("creates");
    std::fs::write(path, bytes).expect("writes");
}

fn image(number: u32) -> Vec<u8> {
    jpeg(number, 24, 16)
}

fn encoded(number: u32, format: image::ImageFormat) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    picture(number, 24, 16).write_to(&mut bytes, format).expect("encodes");
    bytes.into_inner()
}

fn classes_of(root: &Path, names: &[&str], count: u32) {
    for (class, name) in (0..).zip(names) {
        for i in 0..count {
            write(root, &format!("{name}/{i:03}.jpg"), &image(class * count + i));
        }
    }
}

fn gnu_tar(arguments: &[&str]) {
    let status = Command::new("tar").args(arguments).status();
    assert!(status.unwrap_or_else(|error| panic!("GNU tar is needed: {error}")).success());
}

/// A tar of files with these names and bytes.
fn tar(path: &Path, members: &[(&str, &[u8])]) {
    std::fs::create_dir_all(path.parent().expect("below")).expect("creates");
    let mut builder = tar::Builder::new(std::fs::File::create(path).expect("creates"));
    for (name, bytes) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, *bytes).expect("appends");
    }
    builder.finish().expect("finishes");
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a UTF-8 path")
}

/// A data set without duplicates on disk: hard links, a linked class, links to files.
#[test]
fn a_tar_with_links_holds_what_its_folder_holds() {
    let folder = tempfile::tempdir().expect("a folder");
    let set = folder.path().join("h");
    classes_of(&set, &["cat", "dog"], 4);
    std::fs::hard_link(set.join("cat/000.jpg"), set.join("dog/copy.jpg")).expect("links");
    std::fs::create_dir(set.join("cow")).expect("creates");
    for i in 0..4 {
        let name = format!("{i:03}.jpg");
        std::fs::hard_link(set.join("cat").join(&name), set.join("cow").join(&name))
            .expect("links");
    }
    std::os::unix::fs::symlink("../dog/001.jpg", set.join("cat/soft.jpg")).expect("links");
    std::os::unix::fs::symlink("dog", set.join("wolf")).expect("links");
    let path = folder.path().join("h.tar");
    for format in ["gnu", "posix"] {
        let label = ["-V", "pictures"];
        gnu_tar(
            &[&["--format", format, "-cf", text(&path), "-C", text(&set)][..], &label, &["."]]
                .concat(),
        );
        let (tar, folder) = (packed(&path), packed(&set));
        assert_eq!(tar.classes, ["cat", "cow", "dog", "wolf"], "{format}");
        assert_eq!((tar.classes, tar.samples), (folder.classes, folder.samples), "{format}");
        assert_eq!(tar.summary.samples, 5 + 4 + 5 + 5);
        assert_eq!(tar.skips, []);
    }
    // A second copy of a member, as `tar -r` adds it, replaces the first.
    write(&set, "cat/001.jpg", &image(77));
    gnu_tar(&["-rf", text(&path), "-C", text(&set), "./cat/001.jpg"]);
    let again = packed(&path);
    assert_eq!(again.samples["cat/001"].1, image(77));
    assert_eq!(again.summary.samples, 19);
    assert_eq!(again.faults(), []);
    assert!(again.skips.iter().any(|skip| skip.path == "cat/001.jpg"), "{:?}", again.skips);
}

#[test]
fn a_link_that_leads_nowhere_is_a_fault_with_its_reason() {
    let folder = tempfile::tempdir().expect("a folder");
    let set = folder.path().join("s");
    classes_of(&set, &["cat", "dog"], 3);
    std::os::unix::fs::symlink("/elsewhere/x.jpg", set.join("cat/x.jpg")).expect("links");
    std::os::unix::fs::symlink("gone.jpg", set.join("cat/y.jpg")).expect("links");
    let path = folder.path().join("s.tar");
    gnu_tar(&["-cf", text(&path), "-C", text(&set), "."]);
    let error = refused(&path);
    assert!(
        error.starts_with("cat/x.jpg: a link to `/elsewhere/x.jpg`, which lies outside"),
        "{error}"
    );
    let left = skipping(&path);
    assert_eq!(left.summary.samples, 6);
    assert_eq!(
        left.faults(),
        [
            ("cat/x.jpg", "a link to `/elsewhere/x.jpg`, which lies outside of the archive"),
            ("cat/y.jpg", "a link to `gone.jpg`, which is not in the archive"),
        ]
    );
}

#[test]
fn a_sparse_picture_is_a_fault_and_the_others_are_packed() {
    let folder = tempfile::tempdir().expect("a folder");
    let set = folder.path().join("s");
    classes_of(&set, &["cat", "dog"], 3);
    let holes = std::fs::File::options().append(true).open(set.join("cat/001.jpg")).expect("opens");
    holes.set_len(1 << 20).expect("sets the length");
    let path = folder.path().join("s.tar");
    gnu_tar(&["--sparse", "-cf", text(&path), "-C", text(&set), "."]);
    assert!(refused(&path).starts_with("cat/001.jpg: a sparse file"));
    let left = skipping(&path);
    assert_eq!((left.summary.samples, left.summary.faults), (5, 1));
}

#[test]
fn a_tar_that_ends_early_gives_what_is_whole() {
    let folder = tempfile::tempdir().expect("a folder");
    let set = folder.path().join("s");
    classes_of(&set, &["cat", "dog"], 4);
    let path = folder.path().join("s.tar");
    gnu_tar(&["--sort=name", "-cf", text(&path), "-C", text(&set), "."]);
    let whole = std::fs::read(&path).expect("reads");
    let at = whole.windows(9).rposition(|name| name == b"./dog/003").expect("its header");
    std::fs::write(&path, &whole[..at + 600]).expect("writes");
    assert!(refused(&path).contains("s.tar: offset"), "as ever");
    let left = skipping(&path);
    assert_eq!((left.summary.samples, left.summary.classes), (7, 2));
    let [(name, reason)] = left.faults()[..] else { panic!("{:?}", left.skips) };
    assert_eq!(name, "s.tar");
    assert!(reason.contains("truncated") && reason.contains("left out"), "{reason}");
    // Nothing whole: the tar's own fault, whatever the policy.
    std::fs::write(&path, &whole[..700]).expect("writes");
    let error = pack_with(&path, options(OnError::Skip)).expect_err("nothing").to_string();
    assert!(error.contains("s.tar: offset"), "{error}");
}

/// ImageNet's outer tar, unpacked half-way.
#[test]
fn a_folder_of_class_tars_is_what_the_tar_of_them_is() {
    let folder = tempfile::tempdir().expect("a folder");
    let il = folder.path().join("il");
    for class in 0..3 {
        let names: Vec<(String, Vec<u8>)> =
            (0..4).map(|i| (format!("n0{class}_{i}.JPEG"), image(class * 4 + i))).collect();
        let members: Vec<(&str, &[u8])> =
            names.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
        tar(&il.join(format!("n0{class}.tar")), &members);
    }
    let outer = folder.path().join("il.tar");
    gnu_tar(&["-cf", text(&outer), "-C", text(&il), "."]);
    let (inside, unpacked) = (packed(&outer), packed(&il));
    assert_eq!(unpacked.classes, ["n00", "n01", "n02"]);
    assert_eq!(unpacked.bytes, inside.bytes, "every byte, the manifest too");
    assert_eq!(unpacked.notes.len(), 1, "{:?}", unpacked.notes);
    assert!(unpacked.notes[0].contains("3 tars are read as classes"), "{:?}", unpacked.notes);

    // Some of it unpacked already: what is there in both forms counts once.
    std::fs::create_dir(il.join("n01")).expect("creates");
    gnu_tar(&["-xf", text(&il.join("n01.tar")), "-C", text(&il.join("n01"))]);
    let mixed = packed(&il);
    assert_eq!((&mixed.classes, &mixed.samples), (&unpacked.classes, &unpacked.samples));
    assert_eq!(mixed.faults(), []);
    // A picture beside them has no class, and none of theirs is lost.
    write(&il, "stray.jpg", &image(99));
    assert!(refused(&il).starts_with("stray.jpg: no class"));
    assert_eq!(skipping(&il).summary.samples, 12);
    // A broken one is named; the whole ones are packed.
    std::fs::remove_file(il.join("stray.jpg")).expect("removes");
    std::fs::write(il.join("n03.tar"), b"not a tar").expect("writes");
    assert!(refused(&il).starts_with("n03.tar: broken tar: offset 0"));
    let left = skipping(&il);
    assert_eq!((left.summary.samples, left.classes.len()), (12, 4), "a class all the same");
}

#[test]
fn a_folder_of_shards_is_packed_with_its_keys_and_labels() {
    let folder = tempfile::tempdir().expect("a folder");
    // WebP with labels and texts, as img2dataset writes them.
    let wb = folder.path().join("wb");
    for shard in 0..3u32 {
        let mut members = Vec::new();
        for i in 0..4u32 {
            let key = format!("{shard:05}{i:04}");
            members.push((format!("{key}.webp"), encoded(shard * 4 + i, image::ImageFormat::WebP)));
            members.push((format!("{key}.json"), b"{}".to_vec()));
            members.push((format!("{key}.cls"), (i % 2 * 10).to_string().into_bytes()));
        }
        let members: Vec<(&str, &[u8])> =
            members.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
        tar(&wb.join(format!("{shard:05}.tar")), &members);
    }
    let shards = packed(&wb);
    assert_eq!((shards.summary.samples, shards.classes.len()), (12, 11));
    assert_eq!(shards.samples["000020003"].0, Some(10), "numbers of .cls are kept");
    assert_eq!(shards.summary.oddities["webp"], 12);
    assert!(shards.notes[0].contains("3 tars are read as shards: labels"), "{:?}", shards.notes);

    // Without labels, numbers name no class.
    let plain = folder.path().join("plain");
    for shard in 0..2u32 {
        let name = format!("train-{shard:06}.tar");
        tar(
            &plain.join(name),
            &[("0.webp", &encoded(shard, image::ImageFormat::WebP)), ("1.jpg", &image(shard))],
        );
    }
    let plain = packed(&plain);
    assert_eq!(plain.classes, [""; 0]);
    // Two shards that count from 0: both are kept.
    assert_eq!(plain.keys(), ["0", "1", "train-000001/0", "train-000001/1"]);
    assert!(plain.notes[0].contains("consecutive numbers"), "{:?}", plain.notes);

    // Our own: keys, names of classes, labels.
    let (first, source) = (folder.path().join("first"), folder.path().join("source"));
    classes_of(&source, &["cat", "wild cat"], 3);
    write(&source, "cat/v1.2 %.jpg", &image(50));
    let job = Job {
        source,
        out: first.clone(),
        options: options(OnError::Fail),
        part: Part::WHOLE,
        workers: 1,
        resume: false,
    };
    pack::run(&job, &Progress::default()).expect("packs");
    let again = packed(&first);
    let set = ShardSet::open(&[text(&first).to_owned()]).expect("opens");
    let mut keys: Vec<&str> = (0..set.len()).map(|id| set.sample(id).expect("one").key).collect();
    keys.sort_unstable();
    assert_eq!(again.keys(), keys);
    assert!(keys.contains(&"cat/v1%2E2%20%25"), "{keys:?}");
    assert_eq!(again.classes, ["cat", "wild cat"]);
    assert_eq!(again.samples["wild%20cat/001"].0, Some(1));
}

#[test]
fn pictures_of_one_stem_are_all_kept() {
    let folder = tempfile::tempdir().expect("a folder");
    let set = folder.path();
    classes_of(set, &["cat"], 2);
    let png = encoded(9, image::ImageFormat::Png);
    write(set, "cat/000.png", &png);
    // Names that the extension in a key could be taken for.
    write(set, "cat/000.png.jpg", &image(20));
    write(set, "cat/001.JPG", &image(21));
    let packed = packed(set);
    assert_eq!(
        packed.keys(),
        ["cat/000", "cat/000%2Epng", "cat/000%2Epng%2Epng", "cat/001", "cat/001%2Ejpg"]
    );
    assert_eq!(packed.samples["cat/000"].1, image(0), "the JPEG has the plain key");
    assert_eq!(packed.samples["cat/000%2Epng"].1, image(20));
    assert_eq!(packed.summary.skipped, 0);
}

/// Telephones write both, scrapers too.
#[test]
fn a_file_that_cannot_be_packed_costs_no_other_its_key() {
    let folder = tempfile::tempdir().expect("a folder");
    let set = folder.path();
    for i in 0..8 {
        write(set, &format!("IMG_{i}.JPG"), &image(i));
    }
    for i in 0..5 {
        write(set, &format!("IMG_{i}.HEIC"), b"\0\0\0\x18ftypheic\0\0\0\0mif1heic");
    }
    write(set, "IMG_6.gif", b"GIF89a????????????????????");
    write(set, "IMG_7.png", b"not an image");
    let left = skipping(set);
    let keys: Vec<String> = (0..8).map(|i| format!("IMG_{i}")).collect();
    assert_eq!(left.keys(), keys);
    assert!((0..8).all(|i| left.samples[&keys[i as usize]].1 == image(i)));
    assert_eq!(left.summary.faults, 7);
    assert!(left.faults().iter().all(|(_, reason)| !reason.contains("key")), "{:?}", left.skips);
}

#[test]
fn class_numbers_do_not_depend_on_one_odd_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let set = folder.path().join("f");
    classes_of(&set, &["ant", "cow"], 2);
    // Empty; with a picture that is broken; with one that is not there; litter; other files.
    std::fs::create_dir_all(set.join("bee/deep")).expect("creates");
    write(&set, "bat/0.jpg", b"broken");
    std::fs::create_dir(set.join("bug")).expect("creates");
    std::os::unix::fs::symlink("gone", set.join("bug/0.jpg")).expect("links");
    write(&set, "__MACOSX/._0.jpg", b"x");
    std::fs::create_dir(set.join("lost+found")).expect("creates");
    write(&set, "annotations/0.xml", b"<a/>");
    let left = skipping(&set);
    assert_eq!(left.classes, ["ant", "bat", "bee", "bug", "cow"]);
    assert_eq!(left.samples["cow/000"].0, Some(4));
    assert_eq!(left.summary.samples, 4);
    assert!(
        left.notes[0].contains("no pictures") && left.notes[0].contains("`bee`"),
        "{:?}",
        left.notes
    );
    // As a tar, with the same classes.
    let path = folder.path().join("f.tar");
    gnu_tar(&["-cf", text(&path), "-C", text(&set), "ant", "cow", "bat", "bug"]);
    std::fs::create_dir_all(folder.path().join("e/bee")).expect("creates");
    gnu_tar(&["-rf", text(&path), "-C", text(&folder.path().join("e")), "bee"]);
    assert_eq!(skipping(&path).classes, left.classes);
    // A flat folder with an empty one in it has no classes.
    let flat = folder.path().join("flat");
    write(&flat, "0.jpg", &image(0));
    std::fs::create_dir(flat.join("tmp")).expect("creates");
    assert_eq!(packed(&flat).classes, [""; 0]);
}

#[test]
fn most_labels_decide_how_classes_are_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("s.tar");
    let shard = |odd: &[(&str, &[u8])]| {
        let mut members: Vec<(String, Vec<u8>)> = Vec::new();
        for i in 0..12u32 {
            members.push((format!("{i:03}.jpg"), image(i)));
            members.push((format!("{i:03}.cls"), i.to_string().into_bytes()));
        }
        members.extend(odd.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec())));
        let members: Vec<(&str, &[u8])> =
            members.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
        tar(&path, &members);
    };
    let odd = image(90);
    for (member, label, reason) in [
        ("x.jpg", None, "no label, and others have one"),
        ("x.jpg", Some("dog"), "the label `dog` is no class number, as those of most others are"),
    ] {
        let label = label.map(|label: &str| ("x.cls", label.as_bytes()));
        shard(&[&[(member, odd.as_slice())][..], label.as_slice()].concat());
        let left = skipping(&path);
        assert_eq!(left.samples["010"].0, Some(10), "10 is not the class between 1 and 2");
        assert_eq!(left.classes.len(), 12);
        assert_eq!(left.faults(), [("x.jpg", reason)]);
        assert!(refused(&path).starts_with(&format!("x.jpg: {reason}")));
    }
    // Dots: each picture has the label of its own name, and a mask that of its sample.
    let names = ["22.05", "22.06", "22.07"];
    let mut members = Vec::new();
    for (class, name) in (0u32..).zip(names) {
        members.push((format!("{name}.jpg"), image(class)));
        members.push((format!("{name}.cls"), class.to_string().into_bytes()));
    }
    let members: Vec<(&str, &[u8])> =
        members.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    tar(&path, &members);
    let dots = packed(&path);
    let found: Vec<_> =
        dots.samples.iter().map(|(key, (class, _))| (key.as_str(), *class)).collect();
    assert_eq!(found, [("22%2E05", Some(0)), ("22%2E06", Some(1)), ("22%2E07", Some(2))]);
}

#[test]
fn what_is_legal_and_seldom_meant_is_said_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let root = folder.path().join("root");
    for split in ["train", "val", "test"] {
        classes_of(&root.join(split), &["cat", "dog"], 2);
    }
    let splits = packed(&root);
    assert_eq!(splits.classes, ["test", "train", "val"], "legal all the same");
    let [note] = &splits.notes[..] else { panic!("{:?}", splits.notes) };
    assert!(note.contains(&format!("detco pack {} OUT", root.join("train").display())), "{note}");
    let path = folder.path().join("root.tar");
    gnu_tar(&["-cf", text(&path), "-C", text(&root), "."]);
    let [note] = &packed(&path).notes[..] else { panic!("no note of the tar") };
    assert!(note.contains("test, train, val") && note.contains("`train`"), "{note}");
    // Two classes that are called so, without folders in them, are classes.
    assert_eq!(packed(&root.join("train")).notes, [""; 0]);
    let words = folder.path().join("words");
    classes_of(&words, &["test", "train"], 2);
    assert_eq!(packed(&words).notes, [""; 0]);
    // Numbers are sorted as ImageFolder sorts them, and that is said.
    let numbers = folder.path().join("numbers");
    classes_of(&numbers, &["0", "1", "2", "10"], 1);
    let numbers = packed(&numbers);
    assert_eq!(numbers.classes, ["0", "1", "10", "2"]);
    assert!(numbers.notes[0].contains("`10` is class 2"), "{:?}", numbers.notes);
    let padded = folder.path().join("padded");
    classes_of(&padded, &["00", "01", "10"], 1);
    assert_eq!(packed(&padded).notes, [""; 0]);
}

#[test]
fn classes_are_numbered_as_another_set_numbers_them() {
    let folder = tempfile::tempdir().expect("a folder");
    let (train, val) = (folder.path().join("tr"), folder.path().join("va"));
    classes_of(&train, &["cat", "dog", "fox"], 2);
    classes_of(&val, &["fox"], 2);
    let out = folder.path().join("trp");
    let job = Job {
        source: train,
        out: out.clone(),
        options: options(OnError::Fail),
        part: Part::WHOLE,
        workers: 1,
        resume: false,
    };
    let manifest = pack::run(&job, &Progress::default()).expect("packs").manifest;
    write(folder.path(), "names.txt", b"cat\r\ndog\r\n\nfox\n");
    for from in [&out, &manifest, &folder.path().join("names.txt")] {
        let classes = pack::class_names(from).expect("names");
        assert_eq!(classes, ["cat", "dog", "fox"]);
        let given = Options { classes: Some(classes), ..options(OnError::Fail) };
        let packed = pack_with(&val, given).expect("packs");
        assert_eq!(packed.classes, ["cat", "dog", "fox"]);
        assert!(packed.samples.values().all(|(class, _)| *class == Some(2)));
    }
    let given = |names: &[&str], on_error| Options {
        classes: Some(names.iter().map(|name| (*name).to_owned()).collect()),
        ..options(on_error)
    };
    let error = pack_with(&val, given(&["cat"], OnError::Fail)).expect_err("not in the list");
    assert!(
        error.to_string().starts_with("fox/000.jpg: the class `fox` is not in the list"),
        "{error}"
    );
    write(folder.path(), "twice.txt", b"cat\ncat\n");
    let twice = pack::class_names(&folder.path().join("twice.txt")).expect_err("twice");
    assert!(matches!(twice, PackError::Labels { fault: LabelFault::Twice { .. }, .. }), "{twice}");
}

/// ImageNet's validation set: a flat folder, and its labels in a text.
#[test]
fn labels_are_taken_from_a_text() {
    let folder = tempfile::tempdir().expect("a folder");
    let val = folder.path().join("val");
    for i in 0..4 {
        write(&val, &format!("V_{i}.JPEG"), &image(i));
    }
    let file = folder.path().join("labels");
    let labelled = |text: &str, classes: Option<&[&str]>, on_error| {
        std::fs::write(&file, text).expect("writes");
        let classes = classes.map(|names| names.iter().map(|name| (*name).to_owned()).collect());
        let labels = Some(file.clone());
        pack_with(&val, Options { labels, classes, ..options(on_error) })
    };
    let numbers =
        |packed: &Packed| packed.samples.values().map(|(class, _)| *class).collect::<Vec<_>>();
    let expected = [Some(1), Some(0), Some(1), Some(2)];
    let names: &[&str] = &["a", "b", "c"];
    for (text, classes) in [
        ("b\na\nb\nc\n", None),
        ("1\n0\n1\n2", None),
        ("V_3.JPEG c\nV_2.JPEG b\nV_1.JPEG a\nV_0.JPEG b\n", None),
        ("ImageId,PredictionString\nV_0,b 1 2 3 4\nV_1,a 5 6 7 8 a 1 2 3 4 \nV_2,b\nV_3,c\n", None),
        ("V_0.JPEG 1\nV_1.JPEG 0\nV_2.JPEG 1\nV_3.JPEG 2\n", Some(names)),
        ("b\r\na\r\nb\r\nc\r\n", Some(names)),
        ("V_0\tb\nV_1\ta\nV_2\tb\nV_3\tc\n", Some(names)),
    ] {
        let packed = labelled(text, classes, OnError::Fail).expect("packs");
        assert_eq!(numbers(&packed), expected, "{text}");
    }
    let error = labelled("b\na\n", None, OnError::Fail).expect_err("too few").to_string();
    assert!(error.contains("2 labels for 4 pictures"), "{error}");
    let error = labelled("W_0 b\nW_1 a\n", None, OnError::Fail).expect_err("strangers").to_string();
    assert!(error.contains("`W_0`"), "{error}");
    let left = labelled("V_0 b\nV_1 a\nV_2 b\n", None, OnError::Skip).expect("packs");
    assert_eq!(left.faults(), [("V_3.JPEG", "no label, and others have one")]);
    let error =
        labelled("b\na\nb\nd\n", Some(names), OnError::Fail).expect_err("unknown").to_string();
    assert!(error.starts_with("V_3.JPEG: the class `d` is not in the list"), "{error}");
}

#[test]
fn names_of_any_bytes_are_packed() {
    use std::os::unix::ffi::OsStrExt as _;
    let folder = tempfile::tempdir().expect("a folder");
    let set = folder.path().join("s");
    classes_of(&set, &["my cat"], 1);
    for name in [&b"caf\xe9.jpg"[..], b"a\nb.jpg", b"22.05.jpg", b"x y.v2.JPG", b"photo.jpg.jpg"] {
        let path = set.join("my cat").join(std::ffi::OsStr::from_bytes(name));
        std::fs::write(path, image(3)).expect("writes");
    }
    let path = folder.path().join("s.tar");
    gnu_tar(&["-cf", text(&path), "-C", text(&set), "."]);
    let (tar, folder) = (packed(&path), packed(&set));
    assert_eq!(tar.samples, folder.samples);
    assert_eq!(folder.summary.samples, 6);
    assert!(folder.samples.contains_key("my%20cat/caf%E9"), "{:?}", folder.keys());
    assert!(folder.samples.contains_key("my%20cat/photo%2Ejpg"), "{:?}", folder.keys());
}

#[test]
fn a_source_without_images_says_what_is_there() {
    let folder = tempfile::tempdir().expect("a folder");
    write(folder.path(), "images.zip", b"PK");
    write(folder.path(), "notes.txt", b"x");
    let error = refused(folder.path());
    assert!(
        error.contains("no images: only `images.zip` (not an image by its name: unpack"),
        "{error}"
    );
    assert!(error.ends_with("and 1 more"), "{error}");
}

/// The manifest of a finished set lists classes by name, so that others are compared by name.
#[test]
fn manifests_carry_the_names() {
    let folder = tempfile::tempdir().expect("a folder");
    let set = folder.path().join("s");
    classes_of(&set, &["0", "10", "2"], 1);
    std::fs::create_dir(set.join("5")).expect("creates");
    let packed = packed(&set);
    let text = &packed.bytes[Path::new("manifest.json")];
    let manifest = Manifest::parse(text).expect("a manifest");
    assert_eq!(manifest.classes, ["0", "10", "2", "5"]);
    assert_eq!(manifest.class_samples, [1, 1, 1, 0]);
}
