//! `detco pack` as a process: killed, out of room, under other eyes.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Files below a folder by relative path; hidden ones (temp files, state) only when asked for.
fn tree(folder: &Path, hidden: bool) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(&next).expect("lists") {
            let path = entry.expect("lists").path();
            let name = path.strip_prefix(folder).expect("below").display().to_string();
            if path.is_dir() {
                folders.push(path);
            } else if hidden || !name.starts_with('.') {
                files.insert(name, std::fs::read(&path).expect("reads"));
            }
        }
    }
    files
}

fn images(folder: &Path, count: u32) {
    for number in 0..count {
        let class = folder.join(["ant", "bee", "cow"][number as usize % 3]);
        std::fs::create_dir_all(&class).expect("creates");
        let picture = image::RgbImage::from_fn(60 + number % 40, 48, |x, y| {
            let wave = |k: u32| (127.0 + 120.0 * (f64::from(x * k + y + number) / 7.0).sin()) as u8;
            image::Rgb([wave(1), wave(2), wave(3)])
        });
        picture.save(class.join(format!("{number:04}.jpg"))).expect("saves");
    }
}

fn detco(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_detco"));
    command.args(arguments).stdin(Stdio::null());
    command
}

fn output(arguments: &[&str]) -> Output {
    detco(arguments).output().expect("starts")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a UTF-8 path")
}

#[test]
fn killed_at_any_moment_it_goes_on_to_the_same_bytes() {
    let root = tempfile::tempdir().expect("a folder");
    let source = root.path().join("images");
    images(&source, 300);
    let whole = root.path().join("whole");
    let options = ["--shard-size", "7", "--resize-short", "40", "--workers", "2"];
    let pack = |out: &Path, more: &[&str]| {
        let mut arguments = vec!["pack", text(&source), text(out)];
        arguments.extend(options);
        arguments.extend(more);
        detco(&arguments)
    };
    let start = Instant::now();
    let finished = pack(&whole, &[]).output().expect("starts");
    let took = start.elapsed();
    assert!(finished.status.success(), "{}", String::from_utf8_lossy(&finished.stderr));
    let expected = tree(&whole, true);

    let out = root.path().join("out");
    // Moments from the start to past the end, unevenly, so that each kill finds another state; more of them
    // where a busy machine let every kill come too late.
    let (mut attempt, mut kills) = (0u32, 0);
    while attempt < 12 || kills == 0 {
        assert!(attempt < 1000, "no kill came in time");
        let mut child = pack(&out, &["--resume"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("starts");
        let share = f64::from(attempt * 37 % 100) / 100.0;
        std::thread::sleep(Duration::from_secs_f64(took.as_secs_f64() * 0.5 * share));
        child.kill().expect("SIGKILL");
        kills += u32::from(!child.wait().expect("ends").success());
        // Whatever has a shard's name is whole, to the byte.
        let found = if out.exists() { tree(&out, false) } else { BTreeMap::new() };
        for (name, bytes) in found {
            assert!(expected.get(&name) == Some(&bytes), "{name} after kill {attempt}");
        }
        attempt += 1;
    }
    let resumed = pack(&out, &["--resume"]).output().expect("starts");
    assert!(resumed.status.success(), "{}", String::from_utf8_lossy(&resumed.stderr));
    assert!(tree(&out, true) == expected, "other bytes after {kills} kills");
    let verified = output(&["verify", text(&out)]);
    assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stdout));
}

#[test]
fn a_full_disk_is_a_clear_error_and_can_be_resumed() {
    let root = tempfile::tempdir().expect("a folder");
    let (source, out) = (root.path().join("images"), root.path().join("out"));
    images(&source, 60);
    // A limit on the size of a file stands for the disk: the write is refused in the same place.
    let script = format!(
        "trap '' XFSZ; ulimit -f 8; exec '{}' pack '{}' '{}'",
        env!("CARGO_BIN_EXE_detco"),
        source.display(),
        out.display()
    );
    let full = Command::new("sh").arg("-c").arg(script).output().expect("starts");
    let error = String::from_utf8_lossy(&full.stderr).into_owned();
    assert_eq!(full.status.code(), Some(1), "{error}");
    assert!(error.contains("no space left") && error.contains("--resume"), "{error}");
    assert!(tree(&out, false).is_empty(), "nothing looks like a shard");
    let resumed = output(&["pack", text(&source), text(&out), "--resume"]);
    assert!(resumed.status.success(), "{}", String::from_utf8_lossy(&resumed.stderr));
    assert!(output(&["verify", text(&out)]).status.success());
}

#[test]
fn it_is_quiet_and_says_what_is_wrong() {
    let root = tempfile::tempdir().expect("a folder");
    let (source, out) = (root.path().join("images"), root.path().join("out"));
    images(&source, 9);
    let packed = output(&["pack", text(&source), text(&out), "--shard-size", "4"]);
    assert!(packed.status.success());
    let line = String::from_utf8(packed.stdout).expect("UTF-8");
    assert_eq!(line.lines().count(), 1, "{line}");
    assert!(line.contains("9 samples in 3 shards") && line.contains("3 classes"), "{line}");
    assert!(packed.stderr.is_empty());

    let again = output(&["pack", text(&source), text(&out)]);
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&again.stderr).contains("pack into another folder"));
    let wrong = output(&["pack", text(&source), text(&out), "--shard-size", "many"]);
    assert_eq!(wrong.status.code(), Some(2));

    let inspected = output(&["inspect", text(&out), "--json"]);
    assert!(inspected.status.success(), "{}", String::from_utf8_lossy(&inspected.stderr));
    let json: serde_json::Value = serde_json::from_slice(&inspected.stdout).expect("JSON");
    assert_eq!(json["samples"], 9);
    assert_eq!(json["classes"][1]["name"], "bee");
    assert_eq!(json["classes"][1]["samples"], 3);
    assert_eq!(json["formats"]["JPEG"], 9);
    let table = output(&["inspect", text(&out)]);
    assert!(String::from_utf8_lossy(&table.stdout).contains("classes        3, of 3 to 3 samples"));

    let tar = out.join("000001.tar");
    let mut bytes = std::fs::read(&tar).expect("reads");
    bytes[700] ^= 1;
    std::fs::write(&tar, bytes).expect("writes");
    let faulty = output(&["verify", text(&out), "--json"]);
    assert_eq!(faulty.status.code(), Some(1));
    let json: serde_json::Value = serde_json::from_slice(&faulty.stdout).expect("JSON");
    let fault = &json["faults"][0];
    assert!(fault["file"].as_str().is_some_and(|file| file.ends_with("000001.tar")), "{json}");
}

/// A stack that no memory holds stands for a system that is out of threads.
#[test]
fn a_thread_that_cannot_be_started_is_an_error() {
    let root = tempfile::tempdir().expect("a folder");
    let (source, out) = (root.path().join("images"), root.path().join("out"));
    images(&source, 12);
    let starved = |arguments: &[&str]| {
        let mut command = detco(arguments);
        let output = command.env("RUST_MIN_STACK", (1u64 << 47).to_string()).output();
        let output = output.expect("starts");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let words = "cannot start a thread";
    let (code, error) = starved(&["pack", text(&source), text(&out), "--shard-size", "4"]);
    assert_eq!(code, Some(1), "{error}");
    assert!(error.contains(words) && error.contains("--workers"), "{error}");
    assert!(error.contains("ulimit -u") && !error.contains("panic"), "{error}");
    let again = output(&["pack", text(&source), text(&out), "--shard-size", "4", "--resume"]);
    assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
    let (code, error) = starved(&["verify", text(&out)]);
    assert_eq!(code, Some(1), "{error}");
    assert!(error.contains(words) && !error.contains("panic"), "{error}");
    // Opening takes the thread that is there.
    let (code, error) = starved(&["inspect", text(&out)]);
    assert_eq!(code, Some(0), "{error}");
}

#[test]
fn what_was_made_of_a_source_is_said() {
    let root = tempfile::tempdir().expect("a folder");
    let source = root.path().join("root");
    for split in ["train", "val"] {
        images(&source.join(split), 6);
    }
    let out = root.path().join("out");
    let packed = output(&["pack", text(&source), text(&out)]);
    assert!(packed.status.success());
    let said = String::from_utf8_lossy(&packed.stderr).into_owned();
    assert_eq!(said.lines().count(), 1, "{said}");
    let meant = format!("did you mean `detco pack {} OUT`?", source.join("train").display());
    assert!(said.starts_with("note: ") && said.contains(&meant), "{said}");

    let (train, val) = (root.path().join("train"), root.path().join("val"));
    let ok = |arguments: &[&str]| {
        let output = output(arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    ok(&["pack", text(&source.join("train")), text(&train)]);
    // A flat folder and a text of labels, with the classes of another set.
    let flat = root.path().join("flat");
    std::fs::create_dir(&flat).expect("creates");
    let bee = source.join("val/bee");
    for (number, entry) in std::fs::read_dir(bee).expect("lists").enumerate() {
        let path = entry.expect("lists").path();
        std::fs::copy(path, flat.join(format!("{number}.jpg"))).expect("copies");
    }
    std::fs::write(flat.join("0.gif"), "GIF89a??????????").expect("writes");
    std::fs::write(flat.join("notes.txt"), "x").expect("writes");
    let labels = root.path().join("labels.txt");
    std::fs::write(&labels, "0 bee\n1 cow\n").expect("writes");
    let arguments = ["pack", text(&flat), text(&val), "--labels", text(&labels)];
    let line = ok(&[&arguments[..], &["--classes", text(&train), "--on-error", "skip"]].concat());
    assert!(line.contains("2 samples") && line.contains("3 classes"), "{line}");
    assert!(line.contains("2  left out, 1 of them images by name: "), "{line}");
    let json = ok(&["inspect", text(&val), "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(json["classes"][1]["name"], "bee");
    assert_eq!(json["classes"][1]["samples"], 1);
    assert_eq!(json["bad_samples"], 0);
}
