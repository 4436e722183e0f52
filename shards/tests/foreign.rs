//! Shards as others write them, with what others put beside them; and samples that cannot be used,
//! which are the policy's to judge.

#[expect(dead_code, reason = "no need of Python here")]
mod common;

use std::path::Path;
use std::sync::Mutex;

use common::jpeg;
use detco_shards::format::writer::ShardWriter;
use detco_shards::format::{SampleFault, ShardError, SpecFault, verify};
use detco_shards::pack::{self, Job, Options, Progress};
use detco_shards::stream::ShardSet;
use detco_shards::stream::remote::RemoteOptions;

/// What opening said, of all tests: each looks for its own paths.
static SAID: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn say(text: &str) {
    SAID.lock().expect("not poisoned").push(text.to_owned());
}

fn said(path: &Path) -> Vec<String> {
    let all = SAID.lock().expect("not poisoned");
    all.iter().filter(|text| text.contains(path.to_str().expect("UTF-8"))).cloned().collect()
}

/// As a trainer opens: bad samples are part of the set.
fn open(specs: &[&Path]) -> Result<ShardSet, ShardError> {
    let spec: Vec<String> = specs.iter().map(|path| path.display().to_string()).collect();
    let cache = tempfile::tempdir().expect("a folder");
    let options = RemoteOptions { notice: Some(say), ..RemoteOptions::new(cache.path(), 1 << 20) };
    ShardSet::open_with(&spec, Some(&options))
}

fn image(number: u32) -> Vec<u8> {
    jpeg(number, 24, 16)
}

/// A tar of files with these names and bytes.
fn tar(path: &Path, members: &[(&[u8], &[u8])]) {
    use std::os::unix::ffi::OsStrExt as _;
    std::fs::create_dir_all(path.parent().expect("below")).expect("creates");
    let mut builder = tar::Builder::new(std::fs::File::create(path).expect("creates"));
    for (name, bytes) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        let name = std::ffi::OsStr::from_bytes(name);
        builder.append_data(&mut header, name, *bytes).expect("appends");
    }
    builder.finish().expect("finishes");
}

fn shard(folder: &Path, name: &str) {
    let mut writer = ShardWriter::create(folder, name).expect("creates");
    for number in 0..3 {
        writer.append(&format!("{number}.jpg"), &image(number)).expect("appends");
        writer.append(&format!("{number}.cls"), b"1").expect("appends");
    }
    writer.finish().expect("finishes").seal().expect("seals");
}

fn sound(folder: &Path) -> verify::Report {
    let report = verify::folder(folder, 2, &0.into()).expect("lists");
    assert_eq!(report.faults, []);
    report
}

#[test]
fn indexes_of_others_are_passed_over_with_a_word() {
    for (kind, text) in [
        ("DALI 1.1", &b"v1.1 3\njpg 512 900 cls 2048 1\n"[..]),
        ("empty", b""),
        ("MXNet", b"0\t0\n1\t1024\n"),
        ("carriage returns", b"v1.2 3\r\njpg 512 900 0.jpg cls 2048 1 0.cls\r\n"),
        ("bytes", b"\x00\xff\xfe\x01"),
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["0.tar", "1.tar"] {
            shard(folder.path(), name);
            std::fs::write(folder.path().join(name).with_extension("idx"), text).expect("writes");
        }
        let set = open(&[folder.path()]).expect(kind);
        assert_eq!(set.len(), 6, "{kind}");
        assert_eq!(set.sample(4).expect("a sample").jpeg(), image(1), "{kind}");
        let said = said(folder.path());
        assert_eq!(said.len(), 1, "once: {said:?}");
        assert!(said[0].contains(".idx: an index of another program"), "{said:?}");
        assert_eq!(sound(folder.path()).notes.len(), 2, "{kind}");
    }
    // One that claims to be ours and describes another shard stays an error, with advice.
    let folder = tempfile::tempdir().expect("a folder");
    shard(folder.path(), "0.tar");
    std::fs::write(folder.path().join("0.idx"), "v1.2 1\njpg 1024 9 0.jpg\n").expect("writes");
    let error = open(&[folder.path()]).expect_err("stale").to_string();
    assert!(error.contains("0.idx") && error.contains("detco verify"), "{error}");
    std::fs::write(folder.path().join("0.idx"), "v1.2 1\njpg 1024\n").expect("writes");
    let error = open(&[folder.path()]).expect_err("malformed").to_string();
    assert!(error.contains("line 2") && error.contains("delete this index"), "{error}");
}

#[test]
fn manifests_of_others_are_passed_over_with_a_word() {
    for text in ["{\"shards\": [\"0.tar\"]}", "[]", "<html>", "", "{\"name\": \"a web app\"}"] {
        let folder = tempfile::tempdir().expect("a folder");
        shard(folder.path(), "0.tar");
        std::fs::write(folder.path().join("manifest.json"), text).expect("writes");
        std::fs::write(folder.path().join("index.json"), "{\"wids_version\": 1}").expect("writes");
        std::fs::write(folder.path().join("0.json"), "{}").expect("writes");
        assert_eq!(open(&[folder.path()]).expect("opens").len(), 3, "{text}");
        let said = said(folder.path());
        assert_eq!(said.len(), 1, "{said:?}");
        assert!(said[0].contains("manifest.json: a manifest of another program"), "{said:?}");
        assert!(!sound(folder.path()).manifest);
    }
    // A damaged one of ours is an error.
    let folder = tempfile::tempdir().expect("a folder");
    shard(folder.path(), "0.tar");
    std::fs::write(folder.path().join("manifest.json"), "{\n  \"format\": 1,\n  \"sam")
        .expect("writes");
    let error = open(&[folder.path()]).expect_err("damaged").to_string();
    assert!(error.contains("manifest.json: not a manifest"), "{error}");
}

#[test]
fn names_with_dots_are_read_where_they_are_plain_and_refused_with_the_rule() {
    let folder = tempfile::tempdir().expect("a folder");
    let read = |members: &[(&[u8], &[u8])]| {
        let path = folder.path().join("0.tar");
        tar(&path, members);
        open(&[&path]).expect("opens")
    };
    let (one, two) = (image(1), image(2));
    // A single picture whose extension is longer is the sample's picture.
    for name in ["cat.v2.JPG", "photo.jpg.jpg", "IMG_1.2.jpg", "left.image.jpeg"] {
        let set = read(&[(name.as_bytes(), &one), (b"x.jpg", &two)]);
        assert_eq!((set.len(), set.bad_samples()), (2, 0), "{name}");
        assert_eq!(set.sample(0).expect("a sample").jpeg(), one, "{name}");
    }
    // Beside a plain one it is not read, and that is said.
    let set = read(&[(b"a.seg.png", &two), (b"a.jpg", &one), (b"a.json", b"{}")]);
    assert_eq!(set.sample(0).expect("a sample").jpeg(), one);
    let words = "1 sample has several pictures, one of which is read: of `a` in";
    assert!(
        said(folder.path()).iter().any(|text| text.contains(words)),
        "{:?}",
        said(folder.path())
    );
    // Of twenty, none is the sample's.
    let names: Vec<String> = (0..20).map(|i| format!("22.{i:02}.jpg")).collect();
    let members: Vec<(&[u8], &[u8])> =
        names.iter().map(|name| (name.as_bytes(), one.as_slice())).collect();
    let set = read(&members);
    let error = set.first_bad().expect("bad").to_string();
    for words in [
        "a key ends at the first dot",
        "`22.00.jpg` was split into the key `22` and the extension `00.jpg`",
        "20 pictures",
        "detco pack THE.tar OUT",
    ] {
        assert!(error.contains(words), "{error}");
    }
    let strict = ShardSet::open(&[folder.path().join("0.tar").display().to_string()]);
    assert_eq!(strict.expect_err("strict").to_string(), error);
}

#[test]
fn names_with_blanks_are_in_an_index_as_they_are() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("0.tar");
    let names = ["my cat 1", "235342 Track 2", "a  b", " c "];
    let members: Vec<(Vec<u8>, Vec<u8>)> = (0..)
        .zip(names)
        .flat_map(|(i, key)| {
            [
                (format!("{key}.jpg").into_bytes(), image(i)),
                (format!("{key}.cls").into_bytes(), b"7".to_vec()),
            ]
        })
        .collect();
    let members: Vec<(&[u8], &[u8])> =
        members.iter().map(|(name, bytes)| (name.as_slice(), bytes.as_slice())).collect();
    tar(&path, &members);
    let bytes = std::fs::read(&path).expect("reads");
    let text = detco_shards::format::index::IndexText::of(&bytes).expect("a tar").finish();
    for indexed in [false, true] {
        if indexed {
            std::fs::write(path.with_extension("idx"), &text).expect("writes");
        }
        let set = open(&[&path]).expect("opens");
        for (id, key) in (0..).zip(names) {
            let sample = set.sample(id).expect("a sample");
            assert_eq!((sample.key, sample.class().expect("a class")), (key, Some(7)));
            assert_eq!(sample.jpeg(), image(id as u32));
        }
    }
}

/// One sample of each kind that cannot be used, among good ones: with and without an index.
#[test]
fn bad_samples_are_the_policys_to_judge() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("0.tar");
    let one = image(1);
    tar(
        &path,
        &[
            (b"0.jpg", &one),
            (b"1.json", b"{}"),
            (b"2.jpg", &one),
            (b"2.JPG", &one),
            (b"3.webp", b"RIFF"),
            (b"4\xff.jpg", &one),
            (b"5.1.jpg", &one),
            (b"5.2.jpg", &one),
            (b"6.jpg", &one),
        ],
    );
    let check = |set: &ShardSet, named: bool| {
        assert_eq!(set.bad_samples(), if named { 5 } else { 4 });
        let fault = |id| match set.sample(id) {
            Err(ShardError::Sample { fault, offset, .. }) => {
                assert_eq!(set.place(id).expect("known").2, offset);
                fault
            }
            other => panic!("{id}: {other:?}"),
        };
        assert_eq!(fault(1), SampleFault::NoImage);
        assert_eq!(fault(2), SampleFault::DuplicateMember { extension: "jpg".into() });
        assert_eq!(fault(3), SampleFault::OtherFormat { extension: "webp".into() });
        let dots = if named { 5 } else { 4 };
        if named {
            assert_eq!(fault(4), SampleFault::Name);
        }
        assert!(matches!(fault(dots), SampleFault::Dots { pictures: 2, .. }));
        for id in [0, dots + 1] {
            assert_eq!(set.sample(id).expect("good").jpeg(), one);
        }
        assert!(set.ready(1, &|| false).is_ok() && set.class(1).is_ok());
        assert_eq!((set.image_size(1), set.image_size(0)), (None, Some(one.len() as u64)));
    };
    check(&open(&[&path]).expect("opens"), true);
    let bytes = std::fs::read(&path).expect("reads");
    // An index cannot name what is not UTF-8.
    let index = detco_shards::format::index::IndexText::of(&bytes).expect("a tar").finish();
    std::fs::write(path.with_extension("idx"), index).expect("writes");
    check(&open(&[&path]).expect("opens"), false);
    std::fs::remove_file(path.with_extension("idx")).expect("removes");
    let faults = verify::folder(folder.path(), 1, &0.into()).expect("lists").faults;
    assert_eq!(faults.len(), 5, "{faults:?}");
    assert!(ShardSet::open(&[path.display().to_string()]).is_err(), "strict");
}

#[test]
fn a_link_in_a_shard_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("0.tar");
    let mut builder = tar::Builder::new(std::fs::File::create(&path).expect("creates"));
    let one = image(1);
    let mut add = |name: &str, kind: tar::EntryType| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o644);
        if kind == tar::EntryType::Regular {
            header.set_size(one.len() as u64);
            builder.append_data(&mut header, name, &one[..]).expect("appends");
        } else {
            header.set_size(0);
            builder.append_link(&mut header, name, "0.jpg").expect("appends");
        }
    };
    add("0.jpg", tar::EntryType::Regular);
    add("1.jpg", tar::EntryType::Link);
    add("2.jpg", tar::EntryType::Symlink);
    builder.finish().expect("finishes");
    drop(builder);
    let set = open(&[&path]).expect("opens");
    assert_eq!((set.len(), set.bad_samples()), (3, 2));
    let error = set.sample(1).expect_err("a link").to_string();
    assert!(
        error.contains("`1.jpg` is a link to `0.jpg`") && error.contains("detco pack"),
        "{error}"
    );
    // And that mends it.
    let out = folder.path().join("out");
    let job = Job {
        source: path,
        out: out.clone(),
        options: Options::default(),
        part: detco_shards::format::manifest::Part::WHOLE,
        workers: 1,
        resume: false,
    };
    assert_eq!(pack::run(&job, &Progress::default()).expect("packs").samples, 3);
    assert_eq!(open(&[&out]).expect("opens").bad_samples(), 0);
}

/// Packs a source of these classes, three pictures each, numbered from `first`.
fn packed(root: &Path, name: &str, classes: &[&str], first: u32) -> std::path::PathBuf {
    let (source, out) = (root.join(format!("{name}-source")), root.join(name));
    for (class, number) in classes.iter().zip(0..) {
        let folder = source.join(class);
        std::fs::create_dir_all(&folder).expect("creates");
        for i in 0..3 {
            let file = folder.join(format!("{i}.jpg"));
            std::fs::write(file, image(first + number * 3 + i)).expect("writes");
        }
    }
    let job = Job {
        source,
        out: out.clone(),
        options: Options::default(),
        part: detco_shards::format::manifest::Part::WHOLE,
        workers: 1,
        resume: false,
    };
    pack::run(&job, &Progress::default()).expect("packs");
    out
}

#[test]
fn sets_of_other_classes_are_one_for_those_who_need_no_classes() {
    let folder = tempfile::tempdir().expect("a folder");
    let root = folder.path();
    let pets = packed(root, "pets", &["cat", "dog"], 0);
    let cars = packed(root, "cars", &["bus", "car"], 10);
    let none = packed(root, "none", &[""], 20);
    let more = packed(root, "more", &["cat", "dog"], 30);
    for other in [&cars, &none] {
        let set = open(&[&pets, other]).expect("opens");
        assert!(set.len() >= 9 && set.classes().is_empty());
        let error = set.one_numbering().expect_err("two numberings");
        let named = matches!(&error, ShardError::Spec { fault: SpecFault::Classes { .. }, .. });
        assert!(named && error.to_string().contains("list different classes"), "{error}");
    }
    let set = open(&[&pets, &more]).expect("opens");
    set.one_numbering().expect("one");
    assert_eq!(set.classes(), ["cat", "dog"]);
    assert_eq!(said(root), [""; 0], "nothing is odd about any of them");
}

#[test]
fn sets_that_share_images_are_told_of_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let root = folder.path();
    let one = packed(root, "one", &["cat", "dog"], 0);
    // Its last class is the first one's first.
    let two = packed(root, "two", &["ant", "bee"], 97);
    let three = packed(root, "three", &["eel", "fox"], 3);
    open(&[&one, &two]).expect("opens");
    assert_eq!(said(root), [""; 0]);
    open(&[&one, &three]).expect("opens");
    let texts = said(root);
    assert_eq!(texts.len(), 1, "{texts:?}");
    assert!(texts[0].contains("have the same 3 images"), "{texts:?}");
    // A folder that was copied.
    let copy = root.join("copy");
    std::fs::create_dir(&copy).expect("creates");
    for entry in std::fs::read_dir(&one).expect("lists") {
        let path = entry.expect("lists").path();
        std::fs::copy(&path, copy.join(path.file_name().expect("a name"))).expect("copies");
    }
    open(&[&one, &copy]).expect("opens");
    let texts = said(&copy);
    assert_eq!(texts.len(), 1, "{texts:?}");
    assert!(texts[0].contains("are the same shard"), "{texts:?}");
}
