//! The program as a whole: what it links, what it says.

use std::process::Command;

fn needed(binary: &str) -> Vec<String> {
    let output = Command::new("readelf").args(["-d", binary]).output().expect("readelf is there");
    let text = String::from_utf8(output.stdout).expect("text");
    let lines = text.lines().filter(|line| line.contains("(NEEDED)"));
    lines.map(|line| line.rsplit('[').next().unwrap().trim_end_matches(']').to_owned()).collect()
}

/// Loading libtorch takes a quarter of a second warm and ten seconds cold: packing, inspecting and
/// `--help` must not pay for it.
#[test]
fn the_light_program_links_no_libtorch() {
    let libraries = needed(env!("CARGO_BIN_EXE_detco"));
    assert!(libraries.iter().any(|name| name.starts_with("libc.")), "{libraries:?}");
    let torch = libraries.iter().any(|name| name.contains("torch") || name.contains("c10"));
    assert!(!torch, "{libraries:?}");
    // Found when asked for, also in a build with the feature `nvjpeg`.
    let cuda = libraries.iter().find(|name| name.contains("nvjpeg") || name.contains("cuda"));
    assert_eq!(cuda, None, "{libraries:?}");
    #[cfg(feature = "train")]
    {
        let trainer = needed(env!("CARGO_BIN_EXE_detco-train"));
        assert!(trainer.iter().any(|name| name.contains("torch")), "{trainer:?}");
    }
}

/// What it holds views to is a name that is known.
#[test]
fn a_wrong_name_of_instructions_is_refused() {
    let with = |value: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_detco"));
        let output = command.args(["plan", "--help"]).env("DETCO_SIMD", value).output().unwrap();
        assert!(output.status.success(), "help needs no instructions");
        let mut command = Command::new(env!("CARGO_BIN_EXE_detco"));
        let output =
            command.args(["inspect", "none.tar"]).env("DETCO_SIMD", value).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let expected = "error: DETCO_SIMD=neon: expected plain, or avx2 on a processor that has it\n";
    assert_eq!(with("neon"), (Some(1), expected.to_owned()));
    let (_, said) = with("plain");
    assert!(said.contains("none.tar") && !said.contains("DETCO_SIMD"), "{said}");
}

/// Every command has its page; a wrong word is answered with the nearest right one.
#[test]
fn it_teaches() {
    let detco = |words: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_detco")).args(words).output().expect("runs");
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(text).expect("text"))
    };
    let (code, help) = detco(&["--help"]);
    assert_eq!(code, Some(0));
    let commands = [
        "pack", "inspect", "verify", "views", "profile", "plan", "train", "eval", "export", "guide",
    ];
    for command in commands {
        let listed = |line: &str| line.split_whitespace().next() == Some(command);
        let lines = help.lines().skip_while(|line| *line != "Commands:").skip(1);
        assert!(lines.take_while(|line| !line.is_empty()).any(listed), "{command}: {help}");
        let (code, page) = detco(&[command, "--help"]);
        assert_eq!(code, Some(0));
        assert!(page.contains("Usage: detco"), "{page}");
    }
    let (code, said) = detco(&["exprot"]);
    assert_eq!(code, Some(2));
    assert!(said.contains("'export'"), "{said}");
}
