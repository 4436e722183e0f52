//! One table of archives, four readers: GNU tar, Python's tarfile, the crate `tar` and ours.
//!
//! Where the others agree on names, sizes and bytes, ours agrees with them; where they do not, or
//! where the bytes are not the file's, ours refuses and says why.

mod common;

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::Path;
use std::process::Command;

use common::{jpeg, run_python};
use detco_shards::format::manifest::Part;
use detco_shards::format::tar::{Kind, TarFault, Walker};
use detco_shards::format::writer::ShardWriter;
use detco_shards::format::{SampleFault, ShardError};
use detco_shards::pack;
use detco_shards::stream::ShardSet;

/// A header, to be changed before its checksum is made.
#[derive(Clone)]
struct Header([u8; 512]);

impl Header {
    fn new(name: &[u8], size: u64) -> Header {
        let mut header = Header([0; 512]);
        header.set(0, &name[..name.len().min(100)]);
        header.set(100, b"0000644\0").set(108, b"0000000\0").set(116, b"0000000\0");
        header.set(124, format!("{size:011o}\0").as_bytes()).set(136, b"00000000000\0");
        header.set(156, b"0").set(257, b"ustar\x0000");
        header
    }

    fn set(&mut self, at: usize, bytes: &[u8]) -> &mut Header {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    /// The header with its checksum, and the payload, padded.
    fn with(&self, payload: &[u8]) -> Vec<u8> {
        self.summed(payload, |bytes| bytes.iter().map(|byte| i64::from(*byte)).sum())
    }

    fn summed(&self, payload: &[u8], sum: impl Fn(&[u8]) -> i64) -> Vec<u8> {
        let mut block = self.0.to_vec();
        block[148..156].fill(b' ');
        let sum = sum(&block);
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block.extend(payload);
        block.resize(block.len().next_multiple_of(512), 0);
        block
    }
}

/// Bytes that differ from file to file.
fn body(seed: usize, size: usize) -> Vec<u8> {
    (0..size).map(|i| (i * 7 + seed * 31 + i / 256) as u8).collect()
}

fn file(name: &[u8], payload: &[u8]) -> Vec<u8> {
    Header::new(name, payload.len() as u64).with(payload)
}

fn typed(name: &[u8], flag: u8, payload: &[u8]) -> Vec<u8> {
    Header::new(name, payload.len() as u64).set(156, &[flag]).with(payload)
}

fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = [b" ", key.as_bytes(), b"=", value, b"\n"].concat();
    let length = (1..).find(|digits| (rest.len() + digits).to_string().len() == *digits);
    let length = rest.len() + length.expect("a length that counts itself");
    [length.to_string().as_bytes(), &rest].concat()
}

fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
    let text: Vec<u8> = records.iter().flat_map(|(key, value)| record(key, value)).collect();
    typed(b"pax", b'x', &text)
}

fn long(flag: u8, name: &[u8]) -> Vec<u8> {
    let text = [name, b"\0"].concat();
    let mut header = Header::new(b"././@LongLink", text.len() as u64);
    header.set(156, &[flag]).set(257, b"ustar  \0").with(&text)
}

fn base256(size: u64) -> [u8; 12] {
    let mut field = [0; 12];
    field[0] = 0x80;
    field[4..].copy_from_slice(&size.to_be_bytes());
    field
}

fn gnu(name: &[u8], size: u64) -> Header {
    let mut header = Header::new(name, size);
    header.set(257, b"ustar  \0");
    header
}

/// Names in all their forms.
fn names() -> Vec<(&'static str, Vec<u8>)> {
    let last = || file(b"z/last.jpg", &body(9, 70));
    let with = |front: Vec<u8>| [front, last()].concat();
    let header = |name: &[u8], size| Header::new(name, size);
    let b = |size: usize| body(1, size);
    let long_name = b"d/"
        .iter()
        .copied()
        .chain((0..300u32).map(|i| b'a' + (i % 26) as u8))
        .collect::<Vec<u8>>();
    vec![
        (
            "sorted",
            [0, 1, 511, 512, 513, 1024]
                .map(|size| file(format!("a/{size:04}.jpg").as_bytes(), &b(size)))
                .concat(),
        ),
        (
            "unsorted",
            [5, 3, 9, 1]
                .map(|i| {
                    [
                        file(format!("k/{i}.jpg").as_bytes(), &body(i, 100 + i)),
                        file(format!("k/{i}.cls").as_bytes(), b"3"),
                    ]
                    .concat()
                })
                .concat(),
        ),
        ("one", last()),
        ("nothing", Vec::new()),
        ("a name of 100 bytes", with(file(&[b'n'; 100], &b(10)))),
        ("a prefix", with(header(b"name.jpg", 5).set(345, b"some/folder").with(b"12345"))),
        ("a full prefix", with(header(&[b'n'; 100], 600).set(345, &[b'p'; 155]).with(&b(600)))),
        ("a GNU header", with(gnu(b"g.jpg", 700).with(&b(700)))),
        (
            "a GNU long name",
            with([long(b'L', &long_name), gnu(&long_name, 33).with(&b(33))].concat()),
        ),
        (
            "a GNU long name of a POSIX header",
            with([long(b'L', &long_name), file(&long_name, &b(33))].concat()),
        ),
        (
            "a short GNU long name",
            with([long(b'L', b"short.jpg"), gnu(b"other.jpg", 3).with(b"abc")].concat()),
        ),
        (
            "a GNU long name of 600 bytes",
            with([long(b'L', &[b'x'; 600]), gnu(b"x", 3).with(b"abc")].concat()),
        ),
        (
            "a long link",
            with([long(b'K', &long_name), gnu(b"link", 0).set(156, b"2").with(b"")].concat()),
        ),
        (
            "a long link and a long name",
            with(
                [
                    long(b'K', &long_name),
                    long(b'L', &[b'y'; 200]),
                    gnu(b"link", 0).set(156, b"2").with(b""),
                ]
                .concat(),
            ),
        ),
    ]
}

/// Extended headers.
fn extended() -> Vec<(&'static str, Vec<u8>)> {
    let last = || file(b"z/last.jpg", &body(9, 70));
    let with = |front: Vec<u8>| [front, last()].concat();
    let header = |name: &[u8], size| Header::new(name, size);
    let b = |size: usize| body(1, size);
    vec![
        (
            "a pax path",
            with([pax(&[("path", "grün/straße/0.jpg".as_bytes())]), file(b"x", &b(40))].concat()),
        ),
        ("a long pax path", with([pax(&[("path", &[b'p'; 1200])]), file(b"x", &b(40))].concat())),
        (
            "a pax size over a zero",
            with([pax(&[("size", b"1000")]), header(b"s.jpg", 0).with(&b(1000))].concat()),
        ),
        (
            "a pax size over another",
            with([pax(&[("size", b"1000")]), header(b"s.jpg", 7).with(&b(1000))].concat()),
        ),
        (
            "a pax size of zero",
            with([pax(&[("size", b"0")]), header(b"s.jpg", 700).with(b"")].concat()),
        ),
        (
            "a pax size with zeros in front",
            with([pax(&[("size", b"0000600")]), header(b"s.jpg", 0).with(&b(600))].concat()),
        ),
        (
            "pax path and size",
            with(
                [
                    pax(&[("size", b"513"), ("path", b"far/away.jpg")]),
                    header(b"s.jpg", 0).with(&b(513)),
                ]
                .concat(),
            ),
        ),
        (
            "other pax records",
            with(
                [
                    pax(&[
                        ("mtime", b"1700000000.123456789"),
                        ("SCHILY.xattr.user.note", b"a=b=c"),
                        ("comment", b"line\nline"),
                        ("uid", b"12345678"),
                        ("path", b"p.jpg"),
                    ]),
                    file(b"x", &b(8)),
                ]
                .concat(),
            ),
        ),
        (
            "a pax path with an equals sign",
            with([pax(&[("path", b"a=b/c=d.jpg")]), file(b"x", &b(8))].concat()),
        ),
        ("an empty pax header", with([typed(b"pax", b'x', b""), file(b"x.jpg", &b(8))].concat())),
        (
            "a pax header of a folder",
            with([pax(&[("path", b"folder/")]), typed(b"f/", b'5', b"")].concat()),
        ),
        (
            "a global comment",
            [typed(b"pax_global_header", b'g', &record("comment", &[b'c'; 40])), last()].concat(),
        ),
    ]
}

/// Numbers and headers in all their forms.
fn numbers() -> Vec<(&'static str, Vec<u8>)> {
    let last = || file(b"z/last.jpg", &body(9, 70));
    let with = |front: Vec<u8>| [front, last()].concat();
    let header = |name: &[u8], size| Header::new(name, size);
    let b = |size: usize| body(1, size);
    vec![
        ("a base-256 size", with(header(b"b.jpg", 0).set(124, &base256(1000)).with(&b(1000)))),
        ("a base-256 size of zero", with(header(b"b.jpg", 0).set(124, &base256(0)).with(b""))),
        (
            "base-256 times and owners",
            with(
                header(b"b.jpg", 9)
                    .set(108, &base256(3_000_000)[4..])
                    .set(108, &[0x80])
                    .set(136, &base256(5_000_000_000))
                    .with(&b(9)),
            ),
        ),
        (
            "a base-256 size in a GNU header",
            with(gnu(b"b.jpg", 0).set(124, &base256(513)).with(&b(513))),
        ),
        (
            "blanks in front of a size",
            with(header(b"b.jpg", 0).set(124, b"       1750 ").with(&b(1000))),
        ),
        (
            "a size of twelve digits",
            with(header(b"b.jpg", 0).set(124, b"000000001750").with(&b(1000))),
        ),
        (
            "headers older than ustar",
            with(header(b"old.jpg", 100).set(156, b"\0").set(257, &[0; 8]).with(&b(100))),
        ),
        ("an old folder", with(header(b"old/", 0).set(156, b"\0").set(257, &[0; 8]).with(b""))),
        ("a contiguous file", with(typed(b"c.jpg", b'7', &b(20)))),
    ]
}

/// Members of several kinds.
fn mixtures() -> Vec<(&'static str, Vec<u8>)> {
    let last = || file(b"z/last.jpg", &body(9, 70));
    let with = |front: Vec<u8>| [front, last()].concat();
    let b = |size: usize| body(1, size);
    vec![
        (
            "folders and links between files",
            [
                file(b"a.jpg", &b(30)),
                typed(b"d/", b'5', b""),
                typed(b"s", b'2', b""),
                typed(b"h", b'1', b""),
                typed(b"p", b'6', b""),
                last(),
            ]
            .concat(),
        ),
        ("a dot in front", with(file(b"./a/b.jpg", &b(12)))),
        ("names that are no UTF-8", with(file(b"\xff\xfe/\xe9t\xe9.jpg", &b(12)))),
        ("names with blanks and backslashes", with(file(b"a b/c\\d e.jpg", &b(12)))),
        (
            "two members of one name",
            [file(b"a.jpg", &b(12)), file(b"a.jpg", &body(2, 13))].concat(),
        ),
        (
            "two of one name apart",
            [file(b"a.jpg", &b(12)), last(), file(b"a.jpg", &body(2, 13))].concat(),
        ),
        (
            "a thousand extensions",
            (0..1000)
                .map(|i| file(format!("k/0.e{i}").as_bytes(), &body(i, i % 700)))
                .collect::<Vec<_>>()
                .concat(),
        ),
    ]
}

/// Archives that all four read alike, without their ends.
fn alike() -> Vec<(&'static str, Vec<u8>)> {
    [names(), extended(), numbers(), mixtures()].concat()
}

/// Name in hexadecimal, size and SHA-256 of each regular file, in order.
type Files = Vec<(String, u64, String)>;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    hex(&sha2::Sha256::digest(bytes))
}

fn ours(bytes: &[u8]) -> Result<Files, TarFault> {
    let mut files = Vec::new();
    for member in Walker::new(bytes) {
        let member = member.map_err(|error| error.fault)?;
        if member.kind == Kind::File {
            let size = member.payload.len() as u64;
            files.push((hex(&member.name), size, sha256(member.payload)));
        }
    }
    Ok(files)
}

fn crate_tar(bytes: &[u8]) -> std::io::Result<Files> {
    let mut archive = tar::Archive::new(bytes);
    let mut files = Vec::new();
    for entry in archive.entries()? {
        let mut entry = entry?;
        let kind = entry.header().entry_type();
        // A header older than ustar has no type of folder: there a slash says it.
        let folder = entry.path_bytes().ends_with(b"/");
        if (kind.is_file() || kind.is_contiguous()) && !folder {
            let mut payload = Vec::new();
            entry.read_to_end(&mut payload)?;
            files.push((hex(&entry.path_bytes()), entry.size(), sha256(&payload)));
        }
    }
    Ok(files)
}

const PYTHON: &str = r#"
import hashlib, json, os, pathlib, sys, tarfile
out = {}
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.tar")):
    try:
        with tarfile.open(path, encoding="utf-8", errors="surrogateescape") as tar:
            digest = lambda m: hashlib.sha256(tar.extractfile(m).read()).hexdigest()
            files = (m for m in tar if m.isreg() and not m.issparse())
            out[path.stem] = [[os.fsencode(m.name).hex(), m.size, digest(m)] for m in files]
    except tarfile.TarError as error:
        out[path.stem] = None
print(json.dumps(out))
"#;

/// Names and sizes by `tar -t`, and the SHA-256 of all files' bytes one after the other.
fn gnu_tar(path: &Path) -> (Vec<(String, u64)>, String) {
    let run = |arguments: &[&str]| {
        let output =
            Command::new("tar").args(arguments).arg("-f").arg(path).env("LC_ALL", "C").output();
        let output = output.unwrap_or_else(|error| panic!("GNU tar is needed: {error}"));
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments:?} {}: {errors}", path.display());
        output.stdout
    };
    let list = run(&["--quoting-style=literal", "--show-stored-names", "--numeric-owner", "-tv"]);
    let mut files = Vec::new();
    for line in
        list.split(|byte| *byte == b'\n').filter(|line| matches!(line.first(), Some(b'-' | b'C')))
    {
        // Permissions, owner, size, day, minute, name; the name may hold blanks.
        let mut rest = line;
        let mut words = Vec::new();
        for _ in 0..5 {
            rest = rest.trim_ascii_start();
            let end = rest.iter().position(|byte| *byte == b' ').expect("six columns");
            words.push(std::str::from_utf8(&rest[..end]).expect("ASCII"));
            rest = &rest[end..];
        }
        files.push((hex(&rest[1..]), words[2].parse().expect("a size")));
    }
    let bytes = run(&["--to-stdout", "-x"]);
    (files, sha256(&bytes))
}

/// Payloads of regular files, one after the other.
fn payloads(bytes: &[u8]) -> String {
    let members = Walker::new(bytes).map(|member| member.expect("well-formed"));
    let files = members.filter(|member| member.kind == Kind::File);
    sha256(&files.flat_map(|member| member.payload.to_vec()).collect::<Vec<u8>>())
}

/// A reader that ours is held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reader {
    Python,
    Crate,
    GnuTar,
}

/// Archives that one reader takes for something else than the three others, and which.
fn odd_one_out() -> Vec<(&'static str, Vec<u8>, Reader)> {
    let last = || file(b"z/last.jpg", &body(9, 70));
    let with = |front: Vec<u8>| [front, last()].concat();
    let b = |size: usize| body(1, size);
    let signed = |bytes: &[u8]| bytes.iter().map(|byte| i64::from(*byte as i8)).sum();
    let first_and_second = pax(&[("path", b"first.jpg"), ("path", b"second.jpg")]);
    vec![
        (
            "times where POSIX has a prefix, in an old GNU header",
            with(gnu(b"name.jpg", 5).set(345, b"00000000000\0").with(b"12345")),
            Reader::Python,
        ),
        (
            "two pax paths, of which the last counts",
            with([first_and_second, file(b"x", &b(8))].concat()),
            Reader::Crate,
        ),
        (
            "a sum of signed bytes",
            with(Header::new("größe.jpg".as_bytes(), 20).summed(&b(20), signed)),
            Reader::Crate,
        ),
        (
            "a global path",
            [typed(b"g", b'g', &record("path", b"all.jpg")), last()].concat(),
            Reader::Crate,
        ),
        (
            "a hard link with a size and no payload",
            with(Header::new(b"h", 700).set(156, b"1").with(b"")),
            Reader::Crate,
        ),
    ]
}

/// Writes the archives, lets the three others read them and returns who differs from ours where.
fn differences(cases: &[(&'static str, Vec<u8>)]) -> Vec<(usize, Reader, String)> {
    let folder = tempfile::tempdir().unwrap();
    let path = |number: usize| folder.path().join(format!("{number:02}.tar"));
    let archives: Vec<Vec<u8>> =
        cases.iter().map(|(_, members)| [&members[..], &[0; 1024]].concat()).collect();
    for (number, bytes) in archives.iter().enumerate() {
        std::fs::write(path(number), bytes).unwrap();
    }
    let python = run_python(PYTHON, &[folder.path()]);
    let python: BTreeMap<String, Option<Files>> = serde_json::from_str(&python).unwrap();
    let mut differences = Vec::new();
    for (number, ((name, _), bytes)) in cases.iter().zip(&archives).enumerate() {
        let ours = ours(bytes).unwrap_or_else(|fault| panic!("{name}: {fault}"));
        let mut hold = |reader, same: bool, found: String| {
            if !same {
                let text = format!("{name}: {reader:?} {found}\n  ours {ours:?}");
                differences.push((number, reader, text));
            }
        };
        let by_python = &python[&format!("{number:02}")];
        hold(Reader::Python, by_python.as_ref() == Some(&ours), format!("{by_python:?}"));
        let by_crate = crate_tar(bytes);
        let same = by_crate.as_ref().is_ok_and(|files| *files == ours);
        hold(Reader::Crate, same, format!("{by_crate:?}"));
        let (listed, digest) = gnu_tar(&path(number));
        let names: Vec<(String, u64)> =
            ours.iter().map(|(name, size, _)| (name.clone(), *size)).collect();
        let same = listed == names && digest == payloads(bytes);
        hold(Reader::GnuTar, same, format!("{listed:?}, all bytes {digest}"));
    }
    differences
}

#[test]
fn four_readers_agree_on_42_archives_and_three_of_four_on_5() {
    let cases = alike();
    let found: Vec<String> = differences(&cases).into_iter().map(|(.., text)| text).collect();
    assert!(found.is_empty(), "{} differences:\n{}", found.len(), found.join("\n"));
    assert_eq!(cases.len(), 42);

    let (cases, odd): (Vec<_>, Vec<_>) =
        odd_one_out().into_iter().map(|(name, bytes, odd)| ((name, bytes), odd)).unzip();
    let found = differences(&cases);
    let text: Vec<&str> = found.iter().map(|(.., text)| text.as_str()).collect();
    let readers: Vec<(usize, Reader)> =
        found.iter().map(|(at, reader, _)| (*at, *reader)).collect();
    let expected: Vec<(usize, Reader)> = odd.into_iter().enumerate().collect();
    assert_eq!(readers, expected, "{}", text.join("\n"));
    assert_eq!(cases.len(), 5);
}

/// GNU tar writes a file with holes in each of its ways: the member's bytes are not the file's.
#[test]
fn sparse_files_are_refused_in_4_formats() {
    let folder = tempfile::tempdir().unwrap();
    let holes = folder.path().join("holes.jpg");
    std::fs::write(&holes, b"start").unwrap();
    std::fs::File::options().write(true).open(&holes).unwrap().set_len(1 << 20).unwrap();
    for format in ["gnu", "0.0", "0.1", "1.0"] {
        let mut command = Command::new("tar");
        command.current_dir(folder.path()).args(["--sparse", "-cf", "sparse.tar"]);
        match format {
            "gnu" => command.arg("--format=gnu"),
            version => command.args(["--format=posix", &format!("--sparse-version={version}")]),
        };
        assert!(command.arg("holes.jpg").status().expect("GNU tar").success());
        let bytes = std::fs::read(folder.path().join("sparse.tar")).unwrap();
        assert_eq!(ours(&bytes), Err(TarFault::Sparse), "{format}");
    }
}

fn open(path: &Path, members: &[Vec<u8>]) -> Result<ShardSet, ShardError> {
    std::fs::write(path, [&members.concat()[..], &[0; 1024]].concat()).unwrap();
    ShardSet::open(&[path.display().to_string()])
}

fn sample_fault(result: Result<ShardSet, ShardError>) -> (String, SampleFault) {
    match result {
        Err(ShardError::Sample { key, fault, .. }) => (key, fault),
        other => panic!("{other:?}"),
    }
}

#[test]
fn two_members_of_one_name_in_a_sample_are_refused_and_in_two_samples_are_two() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("000000.tar");
    let image = |seed| jpeg(seed, 24, 16);
    let (a, b) = (file(b"a.jpg", &image(1)), file(b"b.jpg", &image(2)));
    let again = file(b"a.jpg", &image(3));
    for extension in ["jpg", "cls", "json"] {
        let member = file(format!("a.{extension}").as_bytes(), b"1");
        let twice = [a.clone(), member.clone(), member.clone(), b.clone()];
        let (key, fault) = sample_fault(open(&path, &twice));
        let extension = extension.to_owned();
        assert_eq!((key.as_str(), fault), ("a", SampleFault::DuplicateMember { extension }));
    }
    // As in Python's webdataset, whose samples end where the next key begins.
    let set = open(&path, &[a, b, again]).unwrap();
    assert_eq!(set.len(), 3);
    assert_eq!(set.sample(0).unwrap().jpeg(), image(1));
    assert_eq!(set.sample(2).unwrap().jpeg(), image(3));
    assert_eq!(set.sample(2).unwrap().key, "a");
}

#[test]
fn a_sample_with_1000_extensions_is_read_and_one_with_100_000_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("000000.tar");
    let image = jpeg(5, 24, 16);
    let members = |count: usize| {
        let mut members: Vec<Vec<u8>> =
            (0..count).map(|i| file(format!("k/0.e{i}").as_bytes(), b"x")).collect();
        members.insert(count / 2, file(b"k/0.jpg", &image));
        members.push(file(b"k/0.cls", b"41"));
        members.push(file(b"k/1.jpg", &image));
        members
    };
    let check = |set: ShardSet| {
        assert_eq!(set.len(), 2);
        let sample = set.sample(0).unwrap();
        assert_eq!(
            (sample.key, sample.class().unwrap(), sample.jpeg()),
            ("k/0", Some(41), &image[..])
        );
    };
    check(open(&path, &members(998)).unwrap());
    let bytes = std::fs::read(&path).unwrap();
    let index = detco_shards::format::index::IndexText::of(&bytes).unwrap().finish();
    std::fs::write(path.with_extension("idx"), index).unwrap();
    check(ShardSet::open(&[path.display().to_string()]).unwrap());
    std::fs::remove_file(path.with_extension("idx")).unwrap();

    let (key, fault) = sample_fault(open(&path, &members(100_000)));
    assert!(matches!(fault, SampleFault::TooLarge { limit: 4096, .. }), "{key}: {fault}");
}

/// A compressed tar as `tar` writes one, with its own name or as a `.tar`.
const COMPRESSED: &str = r#"
import bz2, gzip, lzma, pathlib, sys
root = pathlib.Path(sys.argv[1]); tar = (root / "plain.tar").read_bytes()
for name, pack in [("gzip", gzip.compress), ("bzip2", bz2.compress), ("xz", lzma.compress)]:
    (root / name).write_bytes(pack(tar))
# Python 3.12 has no zstd: a frame of one raw block.
(root / "zstd").write_bytes(bytes.fromhex("28b52ffd") + bytes([0xa0]) + len(tar).to_bytes(4, "little")
    + (len(tar) << 3 | 1).to_bytes(3, "little") + tar)
"#;

#[test]
fn compressed_tars_are_called_so() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let mut shard = ShardWriter::create(root, "plain.tar").unwrap();
    shard.append("BZh9/0.jpg", &jpeg(1, 32, 24)).unwrap();
    shard.finish().unwrap().seal().unwrap();
    ShardSet::open(&[root.join("plain.tar").display().to_string()]).expect("a member named so");
    run_python(COMPRESSED, &[root]);
    for format in ["gzip", "bzip2", "xz", "zstd"] {
        let bytes = std::fs::read(root.join(format)).unwrap();
        // Whole, and shorter than a header.
        for end in [bytes.len(), 100] {
            for name in [format!("{format}.tar"), format!("{format}.tar.gz")] {
                let path = root.join(name);
                std::fs::write(&path, &bytes[..end]).unwrap();
                let text = ShardSet::open(&[path.display().to_string()]).unwrap_err().to_string();
                let words = format!("{format}-compressed, a plain tar was expected");
                assert!(text.contains(&words), "{text}");
                let job = pack::Job {
                    source: path.clone(),
                    out: root.join("out"),
                    options: pack::Options::default(),
                    part: Part::WHOLE,
                    workers: 1,
                    resume: false,
                };
                let text = pack::run(&job, &pack::Progress::default()).unwrap_err().to_string();
                assert!(text.contains(&words), "{text}");
            }
        }
    }
}

/// Files that people take for tars. A tar whose first member has such a name is one all the same.
#[test]
fn files_of_other_kinds_are_called_so() {
    for (begins, said) in [
        (&b"\n<!DOCTYPE html><p>Sign in"[..], "a web page"),
        (b"<html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:7", "`git lfs pull`"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "an image, a tar was expected"),
        (b"\x89PNG\r\n\x1a\n", "an image, a tar was expected"),
        (b"PK\x03\x04\x14", "a zip archive"),
        (b"7z\xbc\xaf\x27\x1c\0", "a 7z archive"),
    ] {
        let long = [begins, &[b'.'; 2000]].concat();
        for bytes in [begins, &long] {
            let error = Walker::new(bytes).next().expect("a fault").expect_err("no tar");
            assert!(error.offset == 0 && error.to_string().contains(said), "{said}: {error}");
        }
        let name: Vec<u8> = begins.iter().copied().filter(|byte| *byte != 0).collect();
        let tar = [Header::new(&name, 1).with(b"x"), vec![0; 1024]].concat();
        let member = Walker::new(&tar).next().expect("a member").expect("sound");
        assert_eq!(member.name[..], name[..]);
    }
    let text = [b'a'; 2000];
    let error = Walker::new(&text).next().expect("a fault").expect_err("no tar");
    assert!(!error.to_string().contains("was expected"), "{error}");
}
