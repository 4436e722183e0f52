//! Limits of the system: whatever runs out, a command ends with a word, and neither with a panic nor never.

mod support;

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};

use support::{DETCO, detco_fails, path, shards};

/// A user who owns nothing: the superuser has no limit of threads.
const NOBODY: &str = "65534";

/// Runs the program as that user, with so many threads at most, for two minutes at most.
fn as_nobody(threads: u32, args: &[&str]) -> Option<Output> {
    let mut command = Command::new("timeout");
    command.args(["-s", "KILL", "120", "prlimit", &format!("--nproc={threads}")]);
    command.args(["setpriv", "--reuid", NOBODY, "--clear-groups", DETCO]).args(args);
    command.env("RUST_BACKTRACE", "0").env("HOME", "/nonexistent").output().ok()
}

/// Whether this machine lets the tests be somebody else, who reads the program and these files.
fn can_be_nobody(folder: &Path) -> bool {
    let open = std::fs::Permissions::from_mode(0o777);
    let opened = std::fs::set_permissions(folder, open).is_ok();
    opened
        && as_nobody(64, &["inspect", path(&folder.join("shards"))])
            .is_some_and(|o| o.status.success())
}

#[test]
#[ignore = "needs the superuser, prlimit and setpriv, and a checkout that everybody may read"]
fn where_no_more_threads_are_to_be_had_commands_go_on_or_say_so() {
    let (folder, data) = shards(8);
    assert!(can_be_nobody(folder.path()), "nobody cannot read the program or {folder:?}");
    let data = path(&data);
    // Nobody means so many.
    for command in ["profile", "verify"] {
        detco_fails(&[command, data, "--workers", "100000"], 2);
    }
    let profile = ["profile", data, "--seconds", "0.5", "--warm-up", "0", "--workers", "4"];
    let (mut refused, mut done) = (0, 0);
    for threads in 1..=10 {
        let output = as_nobody(threads, &profile).unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        match output.status.code() {
            Some(0) => done += 1,
            Some(1) if said.contains("cannot start a thread") && said.contains("`ulimit -u`") => {
                refused += 1
            }
            other => panic!("{threads} threads: {other:?}\n{said}"),
        }
    }
    assert!(refused > 0 && done > 0, "{refused} refused, {done} done");
}

/// Reading takes one descriptor at a time, packing a few.
#[test]
fn where_no_more_files_are_to_be_had_their_limit_is_named() {
    let (folder, data) = shards(8);
    let run = |files: u32, args: &[&str]| {
        let limit = format!("ulimit -n {files}; exec \"$0\" \"$@\"");
        let output = Command::new("bash").args(["-c", &limit, DETCO]).args(args).output();
        output.expect("bash is there")
    };
    let out = folder.path().join("packed");
    let pack = ["pack", path(&data), path(&out)];
    assert!(run(64, &["verify", path(&data)]).status.success());
    // What the program opens first may be its own libraries, for which the system's loader ends it with 127.
    let starts = |files: &u32| run(*files, &["--version"]).status.code() != Some(127);
    let output = run((4..32).find(starts).expect("31 files are enough to start"), &pack);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("`ulimit -n`"), "{said}");
    assert!(run(64, &pack).status.success(), "nothing half-written is in the way");
}
