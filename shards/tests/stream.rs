//! Opened shards: ours and other people's, and everything that can be wrong with them.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{jpeg, run_python};
use detco_shards::format::writer::ShardWriter;
use detco_shards::format::{SampleFault, ShardError, SpecFault, StaleFault, verify};
use detco_shards::stream::ShardSet;

fn shard(folder: &Path, name: &str, samples: std::ops::Range<u32>) {
    let mut writer = ShardWriter::create(folder, name).expect("creates");
    for number in samples {
        writer.append(&format!("c/{number}.jpg"), &jpeg(number, 24, 16)).expect("appends");
        let class = (number % 3).to_string();
        writer.append(&format!("c/{number}.cls"), class.as_bytes()).expect("appends");
    }
    writer.finish().expect("finishes").seal().expect("seals");
}

fn open(spec: &str) -> Result<ShardSet, ShardError> {
    ShardSet::open(&[spec.to_owned()])
}

fn three() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    shard(folder.path(), "train-000000.tar", 0..4);
    shard(folder.path(), "train-000001.tar", 4..5);
    shard(folder.path(), "train-000002.tar", 5..12);
    folder
}

fn check_twelve(set: &ShardSet) {
    assert_eq!(set.len(), 12);
    for id in 0..12 {
        let sample = set.sample(id).expect("a sample");
        assert_eq!(sample.id, id);
        assert_eq!(sample.key, format!("c/{id}"));
        let class = sample.class().expect("a class");
        assert_eq!(class, Some(id as u32 % 3));
        assert_eq!(set.class(id).expect("a class"), class);
        assert_eq!(sample.jpeg(), jpeg(id as u32, 24, 16));
        assert_eq!(set.image_size(id), Some(sample.jpeg().len() as u64));
        let shard = &set.shards()[sample.shard];
        assert_eq!(set.shard_of(id), sample.shard);
        assert_eq!(shard.first() + sample.index as u64, id);
        // Nothing was copied: the slice lies in the map, at its offset.
        let (map, jpeg) = (sample.map_range(), sample.jpeg().as_ptr_range());
        assert!(map.start <= jpeg.start && jpeg.end <= map.end);
        assert_eq!(jpeg.start.addr() - map.start.addr(), sample.offset as usize);
        assert!(set.ready(id, &|| false).expect("ready").is_none(), "nothing to hold");
    }
    assert!(set.ready(u64::MAX, &|| false).is_err());
    assert!(matches!(set.sample(12), Err(ShardError::NoSuchSample { id: 12, samples: 12 })));
}

#[test]
fn samples_are_slices_of_the_map_with_and_without_an_index() {
    let folder = three();
    let spec = folder.path().display().to_string();
    let indexed = open(&spec).expect("opens");
    check_twelve(&indexed);
    for shard in indexed.shards() {
        std::fs::remove_file(shard.path().with_extension("idx")).expect("removes");
    }
    let walked = open(&spec).expect("opens");
    check_twelve(&walked);
    assert_eq!(indexed.fingerprint(), walked.fingerprint());

    let shared = Arc::new(walked);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let set = Arc::clone(&shared);
            scope.spawn(move || check_twelve(&set));
        }
    });
}

#[test]
fn data_is_named_by_folder_file_glob_or_braces() {
    let folder = three();
    let path = |rest: &str| folder.path().join(rest).display().to_string();
    check_twelve(&open(&path("train-*.tar")).expect("a glob"));
    check_twelve(&open(&path("train-{000000..000002}.tar")).expect("braces"));
    let files = ["train-000000.tar", "train-00000[12].tar"].map(path);
    check_twelve(&ShardSet::open(&files).expect("a list"));
    assert_eq!(open(&path("train-000002.tar")).expect("a file").len(), 7);

    let reversed = ["train-000002.tar", "train-000000.tar"].map(path);
    let reversed = ShardSet::open(&reversed).expect("a list");
    assert_eq!(reversed.sample(0).expect("a sample").key, "c/5");

    let fault = |spec: &[String]| match ShardSet::open(spec) {
        Err(ShardError::Spec { fault, .. }) => fault,
        other => panic!("{other:?}"),
    };
    assert_eq!(fault(&[path("train-{000000..000003}.tar")]), SpecFault::Missing);
    assert_eq!(fault(&[path("test-*.tar")]), SpecFault::NoMatch);
    assert_eq!(fault(&[path("nowhere")]), SpecFault::Missing);
    assert_eq!(fault(&[]), SpecFault::NoSamples);
    let twice = [path("train-000000.tar"), path("train-*.tar")];
    assert!(matches!(fault(&twice), SpecFault::Twice { .. }));
    let empty = tempfile::tempdir().expect("a folder");
    assert_eq!(fault(&[empty.path().display().to_string()]), SpecFault::Empty);
}

#[test]
fn the_fingerprint_changes_with_the_data_and_not_with_the_folder() {
    let (one, other) = (three(), three());
    let print = |folder: &Path| open(&folder.display().to_string()).expect("opens").fingerprint();
    assert_eq!(print(one.path()), print(other.path()));
    shard(other.path(), "train-000003.tar", 12..13);
    assert_ne!(print(one.path()), print(other.path()));
}

/// Python's webdataset writes a shard with several members a sample and keys in folders.
const FOREIGN: &str = r#"
import io, sys, pathlib, tarfile, webdataset
root = pathlib.Path(sys.argv[1]); image = (root / "a.jpg").read_bytes()
with webdataset.TarWriter(str(root / "foreign.tar")) as sink:
    for i in range(3):
        sink.write({"__key__": f"deep/folder.v1/{i:04d}", "jpeg": image, "cls": i, "json": {"i": i}, "seg.png": b"x"})
def make(name, members):
    with tarfile.open(root / name, "w") as tar:
        for path, data in members:
            info = tarfile.TarInfo(path); info.size = len(data); tar.addfile(info, io.BytesIO(data))
make("upper.tar", [("a/X.JPG", image), ("a/X.CLS", b"7\n"), ("__meta__/notes.txt", b"?"), ("README", b"no dot"), ("a/._X.jpg", b"apple")])
make("noimage.tar", [("a/0.jpg", image), ("a/1.cls", b"1"), ("a/2.jpg", image)])
make("badclass.tar", [("a/0.jpg", image), ("a/0.cls", b"cat")])
make("twice.tar", [("a/0.jpg", image), ("a/0.JPG", image)])
make("classless.tar", [("train/cat/0.jpg", image), ("train/dog/0.jpg", image)])
make("nothing.tar", [])
"#;

#[test]
fn other_peoples_shards_are_read() {
    let folder = tempfile::tempdir().expect("a folder");
    let root = folder.path();
    let image = jpeg(1, 32, 24);
    std::fs::write(root.join("a.jpg"), &image).expect("writes");
    run_python(FOREIGN, &[root]);
    let open = |name: &str| open(&root.join(name).display().to_string());

    let set = open("foreign.tar").expect("opens");
    assert_eq!(set.len(), 3);
    let sample = set.sample(2).expect("a sample");
    assert_eq!(sample.key, "deep/folder.v1/0002");
    assert_eq!(sample.class().expect("a class"), Some(2));
    assert_eq!(sample.jpeg(), image);
    assert!(set.classes().is_empty());

    let set = open("upper.tar").expect("opens");
    assert_eq!(set.len(), 1);
    assert_eq!(set.sample(0).expect("a sample").class().expect("a class"), Some(7));
    let set = open("classless.tar").expect("opens");
    assert_eq!(set.sample(1).expect("a sample").class().expect("none"), None);
    assert_eq!(set.sample(1).expect("a sample").key, "train/dog/0");

    match open("noimage.tar") {
        Err(ShardError::Sample { key, offset, fault, shard }) => {
            assert_eq!((key.as_str(), fault), ("a/1", SampleFault::NoImage));
            assert!(offset > 0 && offset % 512 == 0);
            assert!(shard.ends_with("noimage.tar"));
        }
        other => panic!("{other:?}"),
    }
    let twice = open("twice.tar").expect_err("twice");
    assert!(twice.to_string().contains("two members with the extension .jpg"), "{twice}");
    let set = open("badclass.tar").expect("opens");
    // Those who need no label read it; those who ask are told where and what.
    let sample = set.sample(0).expect("a sample all the same");
    assert_eq!(sample.jpeg(), image);
    for error in [sample.class().expect_err("no number"), set.class(0).expect_err("no number")] {
        assert!(error.to_string().contains("sample `a/0`"), "{error}");
        assert!(error.to_string().contains("holds `cat`, a class number"), "{error}");
    }
    let nothing = open("nothing.tar").expect_err("nothing");
    assert!(matches!(nothing, ShardError::Spec { fault: SpecFault::NoSamples, .. }));
}

#[test]
fn a_stale_index_is_named() {
    let folder = three();
    let spec = folder.path().display().to_string();
    let (tar, index) =
        (folder.path().join("train-000000.tar"), folder.path().join("train-000000.idx"));
    // The index of another shard.
    let text = std::fs::read(&index).expect("reads");
    std::fs::copy(folder.path().join("train-000002.idx"), &index).expect("copies");
    let error = open(&spec).expect_err("stale");
    assert!(matches!(&error, ShardError::Disagree { .. }), "{error}");
    assert!(error.to_string().contains("train-000000.idx"), "{error}");
    std::fs::write(&index, &text).expect("writes");
    check_twelve(&open(&spec).expect("opens"));

    // A shard written after its index, with other members of the same sizes.
    let mut bytes = std::fs::read(&tar).expect("reads");
    let set = open(&spec).expect("opens");
    let second = set.sample(1).expect("a sample").offset as usize;
    drop(set);
    bytes[second - 512..second].fill(0xaa);
    std::fs::write(&tar, &bytes).expect("writes");
    let future = std::time::SystemTime::now() + std::time::Duration::from_secs(60);
    let file = std::fs::File::options().write(true).open(&tar).expect("opens");
    file.set_modified(future).expect("sets the time");
    assert!(matches!(open(&spec), Err(ShardError::Tar { .. })), "walked, since it is newer");
    // With the old time the fault is met when the sample is read.
    let file = std::fs::File::options().write(true).open(&index).expect("opens");
    file.set_modified(future).expect("sets the time");
    let set = open(&spec).expect("opens");
    assert!(set.sample(0).is_ok());
    let error = set.sample(1).expect_err("no header");
    let neither = matches!(&error, ShardError::Disagree { fault: StaleFault::Header { .. }, .. });
    assert!(neither, "{error}");
    assert!(error.to_string().contains("shard damaged or index stale"), "{error}");
    assert!(error.to_string().contains("detco verify"), "{error}");
    assert!(set.ready(1, &|| false).is_ok(), "reading ahead judges nothing");
}

/// At every block, a byte before it and a byte after it: no set opens, so no loader starts.
#[test]
fn a_shard_cut_at_any_block_or_a_byte_beside_it_is_an_error_with_and_without_an_index() {
    let folder = three();
    let tar = folder.path().join("train-000002.tar");
    let spec = folder.path().display().to_string();
    let whole = std::fs::read(&tar).expect("reads");
    let mut cases = 0;
    for indexed in [true, false] {
        if !indexed {
            std::fs::remove_file(tar.with_extension("idx")).expect("removes");
        }
        for boundary in (0..=whole.len()).step_by(512) {
            for cut in [boundary.saturating_sub(1), boundary, boundary + 1] {
                if cut >= whole.len() {
                    continue;
                }
                std::fs::write(&tar, &whole[..cut]).expect("writes");
                let error = open(&spec).expect_err("cut");
                assert!(error.to_string().contains("train-000002"), "{cut}: {error}");
                let kind = matches!(error, ShardError::Tar { .. } | ShardError::Disagree { .. });
                assert!(kind, "{cut}: {error}");
                cases += 1;
            }
        }
    }
    println!("{cases} cuts of a shard of {} bytes", whole.len());
    // The last boundary is the end itself: only the byte before it is a cut.
    assert_eq!(cases, 2 * (3 * (whole.len() / 512) + 1));
    std::fs::write(&tar, &whole).expect("writes");
    check_twelve(&open(&spec).expect("whole again"));
}

#[test]
fn what_is_no_file_is_an_error() {
    let error = open("/dev/null").expect_err("a device");
    assert!(error.to_string().starts_with("cannot map"), "{error}");
}

#[test]
fn a_folder_of_images_is_to_be_packed_first() {
    let folder = tempfile::tempdir().expect("a folder");
    let (flat, classes) = (folder.path().join("flat"), folder.path().join("classes"));
    for path in [flat.join("1.JPEG"), classes.join("cat/1.png")] {
        std::fs::create_dir_all(path.parent().expect("below")).expect("creates");
        std::fs::write(path, b"an image by its name").expect("writes");
    }
    for images in [&flat, &classes] {
        let error = open(&images.display().to_string()).expect_err("not packed").to_string();
        assert!(error.contains(&format!("detco pack {} OUT", images.display())), "{error}");
    }
    // Two folders down nothing says that all of it is one data set.
    std::fs::remove_dir_all(&flat).expect("removes");
    std::fs::write(folder.path().join("notes.txt"), b"hello").expect("writes");
    let error = open(&folder.path().display().to_string()).expect_err("neither");
    assert!(matches!(error, ShardError::Spec { fault: SpecFault::Empty, .. }), "{error}");
}

#[test]
fn verify_asks_for_the_folder_of_a_shard() {
    let folder = three();
    let tar = folder.path().join("train-000001.tar");
    let error = verify::folder(&tar, 1, &0.into()).expect_err("a file").to_string();
    assert!(error.contains("train-000001.tar") && error.contains("not a folder"), "{error}");
    assert!(error.ends_with(&folder.path().display().to_string()), "{error}");
}

/// Of shards by others: boxes, captions, masks, a second picture. With an index and without.
#[test]
fn members_are_reached_by_their_extensions() {
    let folder = tempfile::tempdir().unwrap();
    let mut shard = ShardWriter::create(folder.path(), "000000.tar").unwrap();
    for (name, bytes) in [
        ("a.txt", &b"a caption"[..]),
        ("a.PNG", b"not the image"),
        ("a.jpg", b"\xff\xd8 a"),
        ("a.json", b"{}"),
        ("a.seg.png", b"a mask"),
        ("b.jpg", b"\xff\xd8 b"),
        ("b.cls", b"3"),
        ("c.jpg", b"\xff\xd8 c"),
        ("c.json", b"[1]"),
    ] {
        shard.append(name, bytes).unwrap();
    }
    shard.finish().unwrap().seal().unwrap();
    for indexed in [true, false] {
        if !indexed {
            for entry in std::fs::read_dir(folder.path()).unwrap() {
                let path = entry.unwrap().path();
                if path.extension().is_some_and(|extension| extension == "idx") {
                    std::fs::remove_file(path).unwrap();
                }
            }
        }
        let set = ShardSet::open(&[folder.path().display().to_string()]).unwrap();
        let member = |id: u64, extension: &str| {
            let sample = set.sample(id).unwrap();
            sample.member(extension).unwrap().map(<[u8]>::to_vec)
        };
        for (id, extension, expected) in [
            (0, "txt", Some(&b"a caption"[..])),
            (0, "json", Some(b"{}")),
            (0, "JSON", Some(b"{}")),
            (0, "seg.png", Some(b"a mask")),
            (0, "png", Some(b"not the image")),
            (0, "jpg", None),
            (0, "cls", None),
            (1, "cls", Some(b"3")),
            (1, "json", None),
            (2, "json", Some(b"[1]")),
            (2, "txt", None),
        ] {
            assert_eq!(member(id, extension).as_deref(), expected, "{id} {extension} {indexed}");
        }
        assert_eq!(set.sample(0).unwrap().jpeg(), b"\xff\xd8 a");
    }
}
