//! The format against GNU tar, Python's tarfile and webdataset, and against lies.

mod common;

use std::fmt::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use common::{jpeg, run_python};
use detco_shards::format::index::{IndexText, Span, Table};
use detco_shards::format::manifest::{FORMAT, Manifest, ManifestFault, Part, ShardRecord};
use detco_shards::format::map::Map;
use detco_shards::format::tar::{BLOCK, Kind, Member, TarError, TarFault, Walker};
use detco_shards::format::writer::ShardWriter;
use detco_shards::format::{IndexFault, SampleFault, ShardError, StaleFault, verify};
use detco_shards::stream::ShardSet;
use proptest::prelude::*;

/// Runs a system tool and returns what it prints.
fn run_tool(tool: &str, arguments: &[&str], folder: &Path) -> String {
    let output = Command::new(tool)
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap_or_else(|error| panic!("`{tool}` is needed by this test: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{tool} {arguments:?}: {errors}");
    assert!(errors.is_empty(), "{tool} {arguments:?} warns: {errors}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Keys of all kinds: plain, long enough for a prefix, too long for one, not ASCII.
fn keys() -> Vec<String> {
    vec![
        "a/0".to_owned(),
        "class with%20no blanks/1".replace(' ', "_"),
        format!("{}/{}", "p".repeat(120), "n".repeat(90)),
        format!("{}/{}", "p".repeat(160), "n".repeat(99)),
        "n".repeat(230),
        "grün/straße".to_owned(),
        "dotted.folder/v1/5".to_owned(),
    ]
}

/// A shard of ours with a sample for each key.
fn shard(folder: &Path, keys: &[String]) -> ShardRecord {
    let mut writer = ShardWriter::create(folder, "000000.tar").expect("creates");
    for (number, key) in (0..).zip(keys) {
        writer.append(&format!("{key}.jpg"), &jpeg(number, 20 + number, 16)).expect("appends");
        writer.append(&format!("{key}.cls"), number.to_string().as_bytes()).expect("appends");
    }
    writer.finish().expect("finishes").seal().expect("seals")
}

fn walk(bytes: &[u8]) -> Result<Vec<Member<'_>>, TarError> {
    Walker::new(bytes).collect()
}

fn fault(bytes: &[u8]) -> TarFault {
    walk(bytes).expect_err("a fault").fault
}

#[test]
fn every_cut_is_noticed() {
    let folder = tempfile::tempdir().expect("a folder");
    shard(folder.path(), &keys());
    let whole = std::fs::read(folder.path().join("000000.tar")).expect("reads");
    assert_eq!(walk(&whole).expect("whole").len(), 2 * keys().len());
    for boundary in (0..=whole.len()).step_by(BLOCK as usize) {
        for cut in [boundary.saturating_sub(1), boundary, boundary + 1] {
            if cut < whole.len() {
                let error = walk(&whole[..cut]).expect_err("cut");
                assert!(error.offset <= cut as u64, "{cut}: {error}");
                let named = matches!(error.fault, TarFault::Truncated { .. } | TarFault::NoEnd);
                assert!(named, "{cut}: {error}");
            }
        }
    }
}

#[test]
fn zeros_may_follow_the_end_and_nothing_else() {
    let folder = tempfile::tempdir().expect("a folder");
    shard(folder.path(), &keys()[..2]);
    let mut bytes = std::fs::read(folder.path().join("000000.tar")).expect("reads");
    let end = bytes.len();
    bytes.resize(end + 8192, 0);
    assert_eq!(walk(&bytes).expect("padded").len(), 4);
    assert!(matches!(fault(&bytes[..end + 8191]), TarFault::Truncated { .. }));
    bytes[end + 5000] = 1;
    let error = walk(&bytes).expect_err("garbage");
    assert_eq!(error, TarError { offset: end as u64 + 5000, fault: TarFault::AfterEnd });
    bytes.truncate(end);
    bytes[end - 1] = 1;
    assert_eq!(fault(&bytes), TarFault::LoneZeroBlock);
}

/// Writes tars of every dialect and prints what `tarfile` reads from them.
const DIALECTS: &str = r#"
import io, json, subprocess, sys, tarfile, pathlib
root = pathlib.Path(sys.argv[1])
names = ["a/0.jpg", "p" * 120 + "/" + "n" * 90 + ".jpg", "n" * 230 + ".jpg", "gr\u00fcn/stra\u00dfe.jpg", "b/long"]
sizes = [0, 1, 511, 512, 513]
def add(tar, name, size, **kw):
    info = tarfile.TarInfo(name); info.size = size
    for k, v in kw.items(): setattr(info, k, v)
    tar.addfile(info, io.BytesIO(bytes(i % 251 for i in range(size))))
for label, form in [("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT), ("ustar", tarfile.USTAR_FORMAT)]:
    with tarfile.open(root / f"py-{label}.tar", "w", format=form, encoding="utf-8") as tar:
        folder = tarfile.TarInfo("a"); folder.type = tarfile.DIRTYPE; tar.addfile(folder)
        for name, size in zip(names, sizes):
            if form == tarfile.USTAR_FORMAT and "n" * 230 in name: continue
            add(tar, name, size)
        link = tarfile.TarInfo("link"); link.type = tarfile.SYMTYPE; link.linkname = "a/0.jpg"; tar.addfile(link)
        hard = tarfile.TarInfo("hard"); hard.type = tarfile.LNKTYPE; hard.linkname = "a/0.jpg"; tar.addfile(hard)
with tarfile.open(root / "py-global.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "hello"}) as tar:
    for name, size in zip(names, sizes): add(tar, name, size)

def header(name, size_field, flag=b"0", magic=b"ustar\x0000"):
    h = bytearray(512); h[0:len(name)] = name; h[100:108] = b"0000644\0"; h[108:116] = h[116:124] = b"0000000\0"
    h[124:136] = size_field; h[136:148] = b"00000000000\0"; h[156:157] = flag; h[257:265] = magic
    h[148:156] = b" " * 8; h[148:156] = b"%06o\0 " % sum(h); return bytes(h)
def pad(b): return b + bytes(-len(b) % 512)
def base256(n): return b"\x80" + n.to_bytes(11, "big")
octal = lambda n: b"%011o\0" % n
record = lambda k, v: next(s for n in range(3, 300) for s in [f"{n} {k}={v}\n".encode()] if len(s) == n)
end = bytes(1024); body = bytes(range(256)) * 4
(root / "hand-base256.tar").write_bytes(header(b"b.jpg", base256(1000)) + pad(body[:1000]) + header(b"c.jpg", octal(3)) + pad(b"abc") + end)
pax = record("size", "1000") + record("path", "far/b.jpg")
(root / "hand-paxsize.tar").write_bytes(header(b"x", octal(len(pax)), b"x") + pad(pax) + header(b"b.jpg", octal(0)) + pad(body[:1000]) + header(b"c.jpg", octal(3)) + pad(b"abc") + end)
long = b"q" * 300 + b"\0"
(root / "hand-longname.tar").write_bytes(header(b"././@LongLink", octal(len(long)), b"L", b"ustar  \0") + pad(long) + header(b"q" * 99, base256(700), b"0", b"ustar  \0") + pad(body[:700]) + header(b"c.jpg", octal(3)) + pad(b"abc") + end)
(root / "hand-v7.tar").write_bytes(header(b"old.jpg", b"       144 \0", b"\0", bytes(8)) + pad(body[:100]) + end)
tree = root / "tree"
for name, size in zip(names, sizes):
    path = tree / name; path.parent.mkdir(parents=True, exist_ok=True); path.write_bytes(bytes(i % 251 for i in range(size)))
for form in ["gnu", "oldgnu", "posix", "v7", "ustar"]:
    files = [n for n in names if not (form in ("v7", "ustar") and len(n) > 99)]
    subprocess.run(["tar", f"--format={form}", "-cf", str(root / f"tar-{form}.tar"), "-C", str(tree), *files], check=True)
out = {}
for path in sorted(root.glob("*.tar")):
    with tarfile.open(path, encoding="utf-8") as tar:
        out[path.name] = [[m.name, m.offset_data, m.size, sum(tar.extractfile(m).read())] for m in tar if m.type in (b"0", b"\0")]
print(json.dumps(out))
"#;

#[test]
fn every_dialect_reads_as_in_python_and_gnu_tar() {
    let folder = tempfile::tempdir().expect("a folder");
    let listed = run_python(DIALECTS, &[folder.path()]);
    let listed: std::collections::BTreeMap<String, Vec<(String, u64, u64, u64)>> =
        serde_json::from_str(&listed).expect("JSON");
    assert!(listed.len() >= 13, "{:?}", listed.keys());
    for (tar, expected) in listed {
        let bytes = std::fs::read(folder.path().join(&tar)).expect("reads");
        let members = walk(&bytes).unwrap_or_else(|error| panic!("{tar}: {error}"));
        let files = members.iter().filter(|member| member.kind == Kind::File);
        let found: Vec<_> = files
            .map(|member| {
                let name = String::from_utf8(member.name.to_vec()).expect("UTF-8");
                let sum = member.payload.iter().map(|byte| u64::from(*byte)).sum::<u64>();
                (name, member.data, member.payload.len() as u64, sum)
            })
            .collect();
        assert_eq!(found, expected, "{tar} by Python");

        let list = ["--quoting-style=literal", "-tvf", &tar];
        let lines = run_tool("tar", &list, folder.path());
        let lines: Vec<&str> = lines.lines().filter(|line| line.starts_with('-')).collect();
        assert_eq!(lines.len(), found.len(), "{tar} by GNU tar");
        for (line, (name, _, size, _)) in lines.iter().zip(&found) {
            let words: Vec<&str> = line.split_whitespace().collect();
            assert_eq!(words[2], size.to_string(), "{tar}: {line}");
            assert!(line.ends_with(name.as_str()), "{tar}: {line}");
        }
    }
}

/// A member of any kind, checksum right.
fn raw(name: &[u8], size: &[u8], flag: u8, payload: &[u8]) -> Vec<u8> {
    let mut block = vec![0; 512];
    block[..name.len()].copy_from_slice(name);
    block[100..108].copy_from_slice(b"0000644\0");
    block[124..124 + size.len()].copy_from_slice(size);
    block[148..156].copy_from_slice(b"        ");
    block[156] = flag;
    block[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block.extend_from_slice(payload);
    block.resize(block.len().next_multiple_of(512), 0);
    block
}

fn octal(size: usize) -> Vec<u8> {
    format!("{size:011o}\0").into_bytes()
}

#[test]
fn lies_are_named() {
    let end = vec![0; 1024];
    let file = raw(b"a.jpg", &octal(3), b'0', b"abc");
    let extended = |flag, records: &[u8]| raw(b"x", &octal(records.len()), flag, records);
    let fault_of = |parts: &[&[u8]]| fault(&parts.concat());

    let mut flipped = file.clone();
    flipped[0] ^= 1;
    assert!(matches!(fault_of(&[&flipped, &end]), TarFault::Checksum { .. }));
    let noise = vec![0xa5; 512];
    assert!(matches!(fault_of(&[&noise, &end]), TarFault::Number { field: "checksum" }));
    let size = raw(b"a.jpg", b"zzzzzzzzzzz\0", b'0', b"");
    assert_eq!(fault_of(&[&size, &end]), TarFault::Number { field: "size" });
    let huge = raw(b"a.jpg", b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff", b'0', b"");
    assert_eq!(fault_of(&[&huge, &end]), TarFault::Size { size: u64::MAX });
    let beyond = raw(b"a.jpg", &octal(1 << 20), b'0', b"");
    assert!(matches!(fault_of(&[&beyond, &end]), TarFault::Truncated { .. }));
    let nameless = raw(b"", &octal(0), b'0', b"");
    assert_eq!(fault_of(&[&nameless, &end]), TarFault::NoName);
    let folder = raw(b"a/", &octal(5), b'5', b"abcde");
    assert!(matches!(fault_of(&[&folder, &end]), TarFault::Payload { kind: '5', size: 5 }));
    let sparse = raw(b"a", &octal(3), b'S', b"abc");
    assert_eq!(fault_of(&[&sparse, &end]), TarFault::Sparse);

    for records in [&b"12 path=abc"[..], b"99 path=abc\n", b"12 path=abc\n\0", b"7 =abc\n", b"\0"] {
        let pax = extended(b'x', records);
        assert!(matches!(fault_of(&[&pax, &file, &end]), TarFault::Pax { .. }), "{records:?}");
    }
    let pax = extended(b'x', b"12 size=-12\n");
    assert_eq!(fault_of(&[&pax, &file, &end]), TarFault::PaxValue { key: "size" });
    let pax = extended(b'x', b"29 size=18446744073709551616\n");
    assert_eq!(fault_of(&[&pax, &file, &end]), TarFault::PaxValue { key: "size" });
    let pax = extended(b'x', b"10 path=a\0\n");
    assert!(matches!(
        fault_of(&[&pax, &file, &end]),
        TarFault::Pax { .. } | TarFault::PaxValue { .. }
    ));
    let pax = extended(b'x', b"22 GNU.sparse.major=1\n");
    assert_eq!(fault_of(&[&pax, &file, &end]), TarFault::Sparse);
    let path = extended(b'x', b"12 path=abc\n");
    let long = raw(b"././@LongLink", &octal(4), b'L', b"xyz\0");
    assert_eq!(fault_of(&[&path, &path, &file, &end]), TarFault::Repeated { kind: 'x' });
    assert_eq!(fault_of(&[&long, &long, &file, &end]), TarFault::Repeated { kind: 'L' });
    assert_eq!(fault_of(&[&path, &long, &file, &end]), TarFault::TwoNames);
    assert_eq!(fault_of(&[&path, &end]), TarFault::Dangling);

    // And what looks strange but is not.
    let global = extended(b'g', b"15 path=global\n");
    let back = extended(b'x', b"8 path=\n");
    let bytes = [global.clone(), file.clone(), back, file.clone(), end.clone()].concat();
    let names: Vec<_> = walk(&bytes).expect("fine").iter().map(|m| m.name.to_vec()).collect();
    assert_eq!(names, [b"global".to_vec(), b"a.jpg".to_vec()]);
    let contiguous = raw(b"a.jpg", &octal(3), b'7', b"abc");
    let bytes = [contiguous, end].concat();
    assert_eq!(walk(&bytes).expect("fine")[0].kind, Kind::File);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_make_the_walker_panic(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
        // Random bytes are no tar: they never end quietly.
        if bytes.iter().any(|byte| *byte != 0) {
            prop_assert!(Walker::new(&bytes).any(|member| member.is_err()));
        }
    }

    #[test]
    fn no_mutation_makes_the_walker_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let file = |name: &[u8], payload: &[u8]| raw(name, &octal(payload.len()), b'0', payload);
        let mut bytes = [
            raw(b"x", &octal(23), b'x', b"12 path=abc\n11 size=3\n\n"[..23].as_ref()),
            file(b"a.jpg", b"abc"),
            raw(b"././@LongLink", &octal(4), b'L', b"xyz\0"),
            file(b"b.jpg", &[7; 600]),
            raw(b"d/", &octal(0), b'5', b""),
            vec![0; 1024],
        ].concat();
        for (at, value) in edits {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        bytes.truncate(cut.index(bytes.len()) + 1);
        let mut end = 0;
        for member in Walker::new(&bytes) {
            let Ok(member) = member else { break };
            // Members follow each other and lie inside.
            prop_assert!(member.start >= end && member.end() <= bytes.len() as u64);
            end = member.end();
        }
    }

    #[test]
    fn no_text_makes_the_index_panic(text in "(v1\\.2 [0-9]{1,3}\n)?([a-z0-9 ./]{0,30}\n){0,5}") {
        let folder = tempfile::tempdir().expect("a folder");
        shard(folder.path(), &keys()[..1]);
        let map = Map::open(&folder.path().join("000000.tar")).expect("opens");
        prop_assert!(Table::read(text.as_bytes(), Path::new("x.idx"), &map).is_err());
    }

    /// A sound index with a few bytes changed, gone or doubled: whatever is read of it lies in the
    /// shard, and is what stands there.
    #[test]
    fn no_mutation_of_an_index_gives_bytes_outside_the_shard(
        edits in prop::collection::vec(
            (any::<prop::sample::Index>(), prop::sample::select(b"0123456789 \n.vjpgcls/a".to_vec()), 0..3u8),
            1..4,
        ),
    ) {
        let folder = tempfile::tempdir().expect("a folder");
        shard(folder.path(), &keys()[..3]);
        let map = Map::open(&folder.path().join("000000.tar")).expect("opens");
        let mut text = std::fs::read(folder.path().join("000000.idx")).expect("an index");
        for (at, value, how) in edits {
            let at = at.index(text.len());
            match how {
                0 => text[at] = value,
                1 => text.insert(at, value),
                _ => drop(text.remove(at)),
            }
        }
        let Ok(table) = Table::read(&text, Path::new("x.idx"), &map) else { return Ok(()) };
        let bytes = map.bytes().len() as u64;
        for position in 0..table.len() {
            let entry = table.get(position).expect("a sample");
            prop_assert!(!entry.key.is_empty());
            prop_assert!(entry.image.offset >= 512 && entry.image.offset + entry.image.size <= bytes);
            prop_assert!(entry.class.is_none_or(|class| class.offset + class.size <= bytes));
        }
        prop_assert!(table.get(table.len()).is_none());
    }
}

/// wds2idx as its documentation describes it, by means of tarfile alone.
const WDS2IDX: &str = r#"
import sys, tarfile
samples = []
with tarfile.open(sys.argv[1]) as tar:
    for m in tar:
        if not m.isreg(): continue
        cut = m.name.find(".", m.name.rfind("/") + 1)
        key, ext = m.name[:cut], m.name[cut + 1:]
        if not key or key.endswith("/"): continue
        if not samples or samples[-1][0] != key: samples.append((key, []))
        samples[-1][1].append(f"{ext} {m.offset_data} {m.size} {m.name}")
print(f"v1.2 {len(samples)}")
for _, parts in samples: print(" ".join(parts))
"#;

#[test]
fn the_index_is_the_one_wds2idx_writes() {
    let folder = tempfile::tempdir().expect("a folder");
    shard(folder.path(), &keys());
    let tar = folder.path().join("000000.tar");
    let ours = std::fs::read_to_string(folder.path().join("000000.idx")).expect("reads");
    assert_eq!(ours, run_python(WDS2IDX, &[&tar]));
    let bytes = std::fs::read(&tar).expect("reads");
    assert_eq!(ours, IndexText::of(&bytes).expect("a tar").finish());
}

#[test]
fn python_webdataset_reads_our_shards() {
    let folder = tempfile::tempdir().expect("a folder");
    shard(folder.path(), &keys());
    let program = r#"
import json, sys, hashlib, webdataset
rows = []
for s in webdataset.WebDataset(sys.argv[1], shardshuffle=False):
    rows.append([s["__key__"], hashlib.sha256(s["jpg"]).hexdigest(), s["cls"].decode()])
print(json.dumps(rows))
"#;
    let rows = run_python(program, &[&folder.path().join("000000.tar")]);
    let rows: Vec<(String, String, String)> = serde_json::from_str(&rows).expect("JSON");
    check_rows(&rows);
}

#[test]
fn gnu_tar_reads_our_shards() {
    let folder = tempfile::tempdir().expect("a folder");
    shard(folder.path(), &keys());
    let listed = run_tool("tar", &["--quoting-style=literal", "-tf", "000000.tar"], folder.path());
    let expected: Vec<String> =
        keys().iter().flat_map(|key| [format!("{key}.jpg"), format!("{key}.cls")]).collect();
    assert_eq!(listed.lines().collect::<Vec<_>>(), expected);
    std::fs::create_dir(folder.path().join("out")).expect("creates");
    run_tool("tar", &["-xf", "000000.tar", "-C", "out"], folder.path());
    for (number, key) in (0..).zip(keys()) {
        let path = folder.path().join("out").join(format!("{key}.jpg"));
        assert_eq!(std::fs::read(path).expect("extracted"), jpeg(number, 20 + number, 16));
    }
}

#[test]
fn the_crate_webdataset_reads_our_shards() {
    let folder = tempfile::tempdir().expect("a folder");
    shard(folder.path(), &keys());
    let tar = folder.path().join("000000.tar").display().to_string();
    let data = webdataset::WebDataset::builder_from(&[tar]).build().expect("builds");
    let rows: Vec<_> = data
        .iter()
        .map(|sample| {
            let sample = sample.expect("a sample");
            let bytes = |name: &str| match sample.get(name).expect("a field") {
                webdataset::Value::Bytes(bytes) => bytes.to_vec(),
                other => panic!("{other:?}"),
            };
            let class = String::from_utf8(bytes("cls")).expect("text");
            (sample.key().expect("a key").to_owned(), sha256(&bytes("jpg")), class)
        })
        .collect();
    check_rows(&rows);
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    sha2::Sha256::digest(bytes).iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writes");
        text
    })
}

fn check_rows(rows: &[(String, String, String)]) {
    let expected: Vec<_> = (0..)
        .zip(keys())
        .map(|(number, key)| (key, sha256(&jpeg(number, 20 + number, 16)), number.to_string()))
        .collect();
    assert_eq!(rows, expected);
}

#[test]
fn a_sealed_shard_is_never_overwritten() {
    let folder = tempfile::tempdir().expect("a folder");
    shard(folder.path(), &keys()[..1]);
    let again = ShardWriter::create(folder.path(), "000000.tar");
    assert!(matches!(again, Err(ShardError::Sealed { .. })));
    let mut writer = ShardWriter::create(folder.path(), "000001.tar").expect("creates");
    writer.append("a.jpg", b"x").expect("appends");
    let written = writer.finish().expect("finishes");
    assert!(!folder.path().join("000001.tar").exists(), "no name before it is sealed");
    std::fs::write(folder.path().join("000001.tar"), b"someone else's").expect("writes");
    assert!(matches!(written.seal(), Err(ShardError::Sealed { .. })));
    let text = std::fs::read(folder.path().join("000001.tar")).expect("reads");
    assert_eq!(text, b"someone else's");
}

#[test]
fn names_that_an_index_cannot_hold_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut writer = ShardWriter::create(folder.path(), "000000.tar").expect("creates");
    for name in ["", "a b.jpg", "a\tb.jpg", "a\u{a0}b.jpg", "a\nb.jpg", "a\0b.jpg"] {
        let refused = writer.append(name, b"x");
        assert!(matches!(refused, Err(ShardError::MemberName { .. })), "{name:?}");
    }
}

#[test]
fn a_wrong_index_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    shard(folder.path(), &keys()[..3]);
    let map = Map::open(&folder.path().join("000000.tar")).expect("opens");
    let good = std::fs::read_to_string(folder.path().join("000000.idx")).expect("reads");
    let read = |text: &str| Table::read(text.as_bytes(), Path::new("some.idx"), &map);
    let table = read(&good).expect("good");
    assert_eq!(table.len(), 3);
    assert_eq!(table.get(0).expect("first").key, "a/0");
    assert_eq!(table.get(3), None);

    let line = |text: &str| match read(text) {
        Err(ShardError::Index { line, fault, .. }) => (line, fault),
        other => panic!("{other:?}"),
    };
    assert!(matches!(line(""), (1, IndexFault::Version { .. })));
    assert!(matches!(line(&good.replace("v1.2", "v1.1")), (1, IndexFault::Version { .. })));
    assert!(matches!(
        line(&good.replace("v1.2 3", "v1.2 4")),
        (1, IndexFault::Count { promised: 4, found: 3 })
    ));
    assert!(matches!(line("v1.2 1\njpg 512\n"), (2, IndexFault::Member { member: 1 })));
    assert!(matches!(line("v1.2 1\njpg 513 1 a.jpg\n"), (2, IndexFault::Offset { offset: 513 })));
    assert!(matches!(line("v1.2 1\njpg x 1 a.jpg\n"), (2, IndexFault::Member { member: 1 })));
    assert!(matches!(
        line("v1.2 1\njpg 512 1 a.jpg cls 1536 1 b.cls\n"),
        (2, IndexFault::Stranger { .. })
    ));
    let sample = |text: &str| match line(text) {
        (2, IndexFault::Sample { fault, .. }) => fault,
        other => panic!("{other:?}"),
    };
    assert_eq!(sample("v1.2 1\ncls 512 1 a.cls\n"), SampleFault::NoImage);
    let overlap = sample("v1.2 1\njpg 512 600 a.jpg cls 1024 1 a.cls\n");
    assert_eq!(overlap, SampleFault::Overlap { end: 1536 });
    assert!(matches!(
        sample("v1.2 1\njpg 512 1 a.jpg JPG 1536 1 a.JPG\n"),
        SampleFault::DuplicateMember { .. }
    ));

    let stale = |text: &str| match read(text) {
        Err(ShardError::Disagree { fault, .. }) => fault,
        other => panic!("{other:?}"),
    };
    let beyond = format!("v1.2 1\njpg {} 9 a.jpg\n", 1u64 << 40);
    assert!(matches!(stale(&beyond), StaleFault::Outside { .. }));
    let wraps = format!("v1.2 1\njpg 512 {} a.jpg\n", u64::MAX);
    assert!(matches!(stale(&wraps), StaleFault::Outside { .. }));
    let short: Vec<&str> = good.lines().take(3).collect();
    let short = short.join("\n").replace("v1.2 3", "v1.2 2");
    assert!(matches!(stale(&short), StaleFault::Unindexed { .. }));
    let first = good.split(' ').nth(3).expect("a size").to_owned();
    let other = (first.parse::<u64>().expect("a number") + 1).to_string();
    let wrong = good.replacen(&format!(" 512 {first} "), &format!(" 512 {other} "), 1);
    assert!(matches!(stale(&wrong), StaleFault::Size { .. }), "{wrong}");
    assert!(matches!(stale("v1.2 0\n"), StaleFault::Unindexed { .. }));
}

fn manifest() -> Manifest {
    let record = |name: &str, samples: u64, bytes| ShardRecord {
        name: name.to_owned(),
        samples,
        members: 2 * samples,
        bytes,
        sha256: "0".repeat(64),
        index_crc32c: "01234567".to_owned(),
        crc32c: "89abcdef".repeat(2 * samples as usize),
    };
    Manifest {
        format: FORMAT,
        samples: 3,
        bytes: 30,
        members_per_sample: 2,
        part: Part::WHOLE,
        source_sha256: String::new(),
        options: serde_json::Value::Null,
        classes: vec!["a".to_owned(), "b".to_owned()],
        class_samples: vec![1, 2],
        oddities: std::collections::BTreeMap::new(),
        skipped: 0,
        shards: vec![record("000000.tar", 2, 10), record("000001.tar", 1, 20)],
    }
}

#[test]
fn a_lying_manifest_is_refused() {
    let parse = |manifest: &Manifest| Manifest::parse(&serde_json::to_vec(manifest).expect("JSON"));
    assert_eq!(parse(&manifest()).expect("good"), manifest());
    let lie = |change: &dyn Fn(&mut Manifest)| {
        let mut lying = manifest();
        change(&mut lying);
        parse(&lying).expect_err("a lie")
    };
    assert!(matches!(lie(&|m| m.format = 2), ManifestFault::Version { found: 2 }));
    assert!(matches!(lie(&|m| m.samples = 4), ManifestFault::Sum { total: 4, sum: 3, .. }));
    assert!(matches!(lie(&|m| m.bytes = 31), ManifestFault::Sum { .. }));
    assert!(matches!(lie(&|m| m.shards[1].bytes = u64::MAX), ManifestFault::Sum { .. }));
    assert!(matches!(lie(&|m| m.shards.swap(0, 1)), ManifestFault::Name { .. }));
    assert!(matches!(lie(&|m| m.shards[0].name = "../x.tar".into()), ManifestFault::Name { .. }));
    assert!(matches!(lie(&|m| m.shards[0].samples = 5), ManifestFault::Members { .. }));
    assert!(matches!(lie(&|m| m.shards[0].samples = u64::MAX), ManifestFault::Members { .. }));
    assert!(matches!(lie(&|m| m.members_per_sample = 0), ManifestFault::Members { .. }));
    assert!(matches!(lie(&|m| m.shards[0].crc32c.truncate(8)), ManifestFault::Hex { .. }));
    assert!(matches!(lie(&|m| m.shards[0].sha256 = "é".repeat(32)), ManifestFault::Hex { .. }));
    assert!(matches!(lie(&|m| m.classes[1] = "a".into()), ManifestFault::Class { .. }));
    assert!(matches!(
        lie(&|m| m.class_samples[0] = 2),
        ManifestFault::Sum { total: 3, sum: 4, .. }
    ));
    let counts = lie(&|m| m.class_samples.truncate(1));
    assert!(matches!(counts, ManifestFault::ClassSamples { names: 2, counts: 1 }));
    assert!(matches!(lie(&|m| m.part.number = 0), ManifestFault::Part { .. }));
    assert!(matches!(Manifest::parse(b"{"), Err(ManifestFault::Json(_))));
    let unknown = Manifest::parse(br#"{"format": 7, "everything": "else"}"#);
    assert!(matches!(unknown, Err(ManifestFault::Version { found: 7 })));
}

#[test]
fn verify_names_every_fault() {
    let folder = tempfile::tempdir().expect("a folder");
    let root = folder.path();
    let record = shard(root, &keys()[..3]);
    let manifest = Manifest {
        samples: record.samples,
        bytes: record.bytes,
        shards: vec![record],
        ..manifest()
    };
    manifest.write(root).expect("writes");
    let report =
        |_: &str| verify::folder(root, 2, &std::sync::atomic::AtomicU64::new(0)).expect("lists");
    let clean = report("clean");
    assert_eq!((clean.faults.len(), clean.samples, clean.checked), (0, 3, 6), "{clean:?}");

    let tar = root.join("000000.tar");
    let whole = std::fs::read(&tar).expect("reads");
    let offset = walk(&whole).expect("whole")[2].data;
    let mut bytes = whole.clone();
    bytes[offset as usize + 40] ^= 4;
    std::fs::write(&tar, &bytes).expect("writes");
    let flipped = report("a flipped bit");
    let first = &flipped.faults.iter().find(|fault| fault.member.is_some()).expect("a member");
    assert_eq!(first.offset, Some(offset));
    assert!(first.member.as_deref().is_some_and(|name| name.ends_with("1.jpg")), "{first:?}");
    assert!(flipped.faults.iter().any(|fault| fault.fault.starts_with("SHA-256")));

    std::fs::write(&tar, &whole[..whole.len() - 600]).expect("writes");
    let cut = report("a cut");
    assert!(cut.faults.iter().any(|fault| fault.fault.starts_with("truncated")), "{cut:?}");
    assert!(cut.faults.iter().any(|fault| fault.fault.starts_with("bytes:")), "{cut:?}");
    std::fs::write(&tar, &whole).expect("writes");

    let index = root.join("000000.idx");
    let text = std::fs::read_to_string(&index).expect("reads");
    std::fs::write(&index, text.replace("a/0.cls", "b/0.cls")).expect("writes");
    assert!(!report("a wrong index").faults.is_empty());
    std::fs::write(&index, &text).expect("writes");
    assert_eq!(report("clean again").faults, []);

    std::fs::remove_file(&tar).expect("removes");
    let lost = report("a lost shard");
    assert!(lost.faults.iter().any(|fault| fault.fault.contains("not in the folder")), "{lost:?}");
}

/// ImageNet's number of samples, shards and bytes an image, as sparse files with real indexes.
#[test]
fn a_million_samples_open_by_their_indexes() {
    const SHARDS: u64 = 1300;
    const SAMPLES: u64 = 1000;
    const IMAGE: u64 = 110_000;
    let folder = tempfile::tempdir().expect("a folder");
    let root = folder.path();
    let mut writer = ShardWriter::create(root, "header.tar").expect("creates");
    writer.append("n00000000/n00000000_0.jpg", &vec![0; IMAGE as usize]).expect("appends");
    writer.append("n00000000/n00000000_0.cls", b"123").expect("appends");
    writer.finish().expect("finishes").seal().expect("seals");
    let first = std::fs::read(root.join("header.tar")).expect("reads");
    std::fs::remove_file(root.join("header.tar")).expect("removes");
    std::fs::remove_file(root.join("header.idx")).expect("removes");
    let padded = IMAGE.next_multiple_of(BLOCK);
    for shard in 0..SHARDS {
        let mut text = IndexText::default();
        let mut offset = 0;
        for sample in 0..SAMPLES {
            let key = format!("n{:08}/n{:08}_{}", sample % 1000, sample % 1000, shard * sample);
            text.push(&format!("{key}.jpg"), Span { offset: offset + BLOCK, size: IMAGE });
            offset += BLOCK + padded;
            text.push(&format!("{key}.cls"), Span { offset: offset + BLOCK, size: 3 });
            offset += 2 * BLOCK;
        }
        let path = root.join(format!("{shard:06}.tar"));
        let file = std::fs::File::create(&path).expect("creates");
        file.set_len(offset + 2 * BLOCK).expect("sparse");
        // The first sample is there, all but the zeros of its image.
        let class = (BLOCK + padded) as usize;
        file.write_all_at(&first[..512], 0).expect("writes");
        file.write_all_at(&first[class..class + 1024], class as u64).expect("writes");
        std::fs::write(path.with_extension("idx"), text.finish()).expect("writes");
    }
    let spec = [root.display().to_string()];
    let start = Instant::now();
    let set = ShardSet::open(&spec).expect("opens");
    let took = start.elapsed();
    println!("{} samples in {SHARDS} shards opened in {took:.2?}", set.len());
    assert_eq!(set.len(), SHARDS * SAMPLES);
    assert_eq!(set.shards().len() as u64, SHARDS);
    let sample = set.sample(0).expect("the first");
    assert_eq!((sample.jpeg().len() as u64, sample.class().expect("a class")), (IMAGE, Some(123)));
    // The others have no headers, which is noticed when they are read.
    assert!(matches!(set.sample(1), Err(ShardError::Disagree { .. })));
}
