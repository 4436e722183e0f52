//! What the program says, as snapshots: the errors that a user can meet, and the console blocks of README
//! and the guide. A changed wording shows as a change of a file in `tests/messages`.
//!
//! Read a changed message as somebody who meets it at night: it names what, where, what was expected, and
//! the command that helps. Then write it down with `UPDATE_MESSAGES=1 cargo test --test messages`.

#![cfg(feature = "train")]

#[path = "support/console.rs"]
mod console;
#[expect(dead_code, reason = "this server does what a few names say")]
#[path = "../shards/tests/remote_server/mod.rs"]
mod remote_server;
#[expect(dead_code, reason = "sessions say what fails")]
mod support;
#[path = "support/tiny.rs"]
mod tiny;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use clap::Parser as _;
use console::{is_output, parse, run, updated, write};
use detco::cli::Cli;
use detco::config::Config;
use remote_server::{Answer, Request, Server};
use support::{detco_ok, images, path};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// What every session begins with: `images`, `shards` of them, `tiny.toml`, and `run`, trained by it for an
/// epoch of one update.
fn fixture() -> &'static Path {
    static FIXTURE: OnceLock<tempfile::TempDir> = OnceLock::new();
    let folder = FIXTURE.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a temp folder");
        let at = |name: &str| folder.path().join(name);
        images(&at("images"), 2, 6);
        detco_ok(&["pack", path(&at("images")), path(&at("shards")), "--shard-size", "4"]);
        let sets: Vec<String> = tiny::TINY.iter().map(ToString::to_string).collect();
        let config = Config::load("detco-small", &[sets, vec!["train.epochs=1".into()]].concat());
        let config = config.expect("a valid configuration").to_toml();
        std::fs::write(at("tiny.toml"), config).expect("writes");
        let mut command = Command::new(support::DETCO);
        command.args(["train", "tiny.toml", "--data", "shards", "--out", "run"]);
        let output = command.current_dir(folder.path()).output().expect("starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        folder
    });
    folder.path()
}

/// A server that refuses by the names of what is asked for.
fn serve(folder: &Path) -> Server {
    Server::start(folder, |request: &Request| {
        let page = |status: &str| {
            Answer::of(status, "Content-Type: text/html\r\n", b"<!doctype html>\n<p>Sign in")
        };
        let folder = request.path.split('/').next().unwrap_or_default();
        match folder {
            "private" if !request.headers.contains_key("authorization") => page("401 Unauthorized"),
            "private" | "forbidden" => page("403 Forbidden"),
            "site" => page("200 OK"),
            _ => Answer::Well,
        }
    })
}

/// Runs a session of `tests/messages` in a folder of its own.
fn session(name: &str) {
    let file = root().join("tests/messages").join(format!("{name}.txt"));
    let text = std::fs::read_to_string(&file).expect("the session is there");
    let (mut blocks, after) = parse(&text);
    assert!(blocks.len() > 2, "{}: {} commands", file.display(), blocks.len());
    let folder = tempfile::tempdir().expect("a temp folder");
    let place = folder.path().join("place");
    let copied = Command::new("cp").args(["-a", path(fixture()), path(&place)]).status();
    assert!(copied.expect("cp is there").success());
    let server = serve(&place);
    // For ranks to meet at: nobody else's.
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr());
    let port = port.expect("a port").port().to_string();
    let variables = [("SERVER", format!("127.0.0.1:{}", server.port())), ("PORT", port)];
    let mut wrong = String::new();
    for block in &mut blocks {
        let lines = run(&block.command, &place, &variables);
        if !is_output(&block.expected, &lines) {
            let (then, now) = (block.expected.join("\n  "), lines.join("\n  "));
            wrong.push_str(&format!("$ {}\n  {then}\nnow:\n  {now}\n\n", block.command));
            block.expected = updated(&block.expected, &lines);
        }
    }
    if std::env::var_os("UPDATE_MESSAGES").is_some() {
        std::fs::write(&file, write(&blocks, &after)).expect("writes");
        return;
    }
    assert!(
        wrong.is_empty(),
        "{} is not what is said:\n\n{wrong}`UPDATE_MESSAGES=1 cargo test --test messages` writes it down",
        file.display()
    );
}

macro_rules! sessions {
    ($($name:ident),* $(,)?) => {
        /// All that there are.
        const SESSIONS: &[&str] = &[$(stringify!($name)),*];
        $(#[test]
        fn $name() {
            session(stringify!($name));
        })*
    };
}

sessions![config, flags, packing, shards, urls, weights, launchers, runs, eval];

#[test]
fn every_session_is_run() {
    let names = std::fs::read_dir(root().join("tests/messages")).expect("lists");
    let names = names.map(|entry| entry.expect("lists").file_name().into_string().expect("plain"));
    let mut names: Vec<String> = names.collect();
    names.sort();
    let mut ours: Vec<String> = SESSIONS.iter().map(|name| format!("{name}.txt")).collect();
    ours.sort();
    assert_eq!(names, ours);
}

/// README and the guide.
fn pages() -> Vec<PathBuf> {
    let guide = std::fs::read_dir(root().join("src/guide")).into_iter().flatten();
    let guide = guide.map(|entry| entry.expect("lists").path());
    let guide = guide.filter(|path| path.extension().is_some_and(|ending| ending == "md"));
    [root().join("README.md")].into_iter().chain(guide).collect()
}

/// The fenced blocks of a page: the number of the first line, the language, the text.
fn fenced(text: &str) -> Vec<(usize, String, String)> {
    let mut found: Vec<(usize, String, String)> = Vec::new();
    let mut inside = false;
    for (number, line) in (1..).zip(text.lines()) {
        match line.trim_start().strip_prefix("```") {
            Some(_) if inside => inside = false,
            Some(language) => {
                inside = true;
                found.push((number + 1, language.trim().to_owned(), String::new()));
            }
            None if inside => {
                found.last_mut().expect("inside of one").2.extend([line, "\n"]);
            }
            None => {}
        }
    }
    found
}

/// The arguments of each `detco` in a line of a shell's, without its comment; `…` stands for more of them.
fn calls(line: &str) -> Vec<Vec<String>> {
    let line = line.split(" #").next().unwrap_or(line);
    let commands = line.split("&&").flat_map(|part| part.split(['|', ';']));
    let words = |command: &str| -> Vec<String> {
        command.split_whitespace().map(|word| word.trim_matches(['"', '\'']).to_owned()).collect()
    };
    let calls = commands.map(words).filter_map(|words| {
        let at = words.iter().position(|word| word == "detco")?;
        Some(words[at..].iter().filter(|word| *word != "…" && *word != "&").cloned().collect())
    });
    calls.collect()
}

/// Every command that the pages name is one that the program takes.
#[test]
fn the_commands_of_the_pages_are_understood() {
    let mut seen = 0;
    for page in pages() {
        let text = std::fs::read_to_string(&page).expect("reads");
        for (number, language, text) in fenced(&text) {
            if !matches!(language.as_str(), "sh" | "console" | "bash" | "shell") {
                continue;
            }
            let joined = text.replace("\\\n", " ");
            for call in joined.lines().flat_map(calls) {
                let parsed = Cli::try_parse_from(&call);
                let help = parsed.as_ref().is_err_and(|error| !error.use_stderr());
                let error = parsed.err().filter(|_| !help).map(|error| error.to_string());
                assert_eq!(error, None, "{}:{number}: {}", page.display(), call.join(" "));
                seen += 1;
            }
        }
    }
    assert!(seen >= 10, "{seen} commands in the pages");
}

/// What the pages' console blocks show is what the program prints. They begin where every session does.
#[test]
fn the_console_blocks_of_the_pages_are_true() {
    let (mut wrong, mut pages_written) = (String::new(), 0);
    for page in pages() {
        let mut text = std::fs::read_to_string(&page).expect("reads");
        for (number, language, body) in fenced(&text.clone()) {
            if language != "console" {
                continue;
            }
            let folder = tempfile::tempdir().expect("a temp folder");
            let place = folder.path().join("place");
            let copied = Command::new("cp").args(["-a", path(fixture()), path(&place)]).status();
            assert!(copied.expect("cp is there").success());
            let (mut blocks, after) = parse(&body);
            for block in &mut blocks {
                let lines = run(&block.command, &place, &[]);
                if !is_output(&block.expected, &lines) {
                    let now = lines.join("\n  ");
                    wrong.push_str(&format!(
                        "{}:{number}: $ {}\n  {now}\n",
                        page.display(),
                        block.command
                    ));
                    block.expected = updated(&block.expected, &lines);
                }
            }
            text = text.replacen(&body, &write(&blocks, &after), 1);
        }
        if std::env::var_os("UPDATE_MESSAGES").is_some() {
            std::fs::write(&page, text).expect("writes");
            pages_written += 1;
        }
    }
    assert!(
        wrong.is_empty() || pages_written > 0,
        "the pages do not show what is printed:\n{wrong}`UPDATE_MESSAGES=1 cargo test --test messages` \
         writes it down"
    );
}

#[test]
fn a_session_is_read_as_it_is_written() {
    let text =
        "## One.\n\n$ true\n\n$ echo a; false\na\n[1]\n\n## Two.\n$ echo b 1 c\nb [..] c\n...\n";
    let (blocks, after) = parse(text);
    assert_eq!(write(&blocks, &after), text);
    assert_eq!(blocks[1].expected, ["a", "[1]"]);
    let lines = |text: &str| text.lines().map(String::from).collect::<Vec<_>>();
    for (command, index) in [("true", 0), ("echo a; false", 1), ("echo b 1 c", 2)] {
        assert_eq!(blocks[index].command, command);
        let found = run(command, fixture(), &[]);
        assert!(is_output(&blocks[index].expected, &found), "{found:?}");
        assert!(!is_output(&lines("other"), &found));
    }
    assert!(is_output(&lines("a\n...\nd"), &lines("a\nb\nc\nd")));
    assert!(!is_output(&lines("a\n...\nd"), &lines("a\nb\nc")));
    assert!(is_output(&lines("a [..] b [..]"), &lines("a 1 b 2")));
    assert!(!is_output(&lines("a [..] b"), &lines("a 1 b 2")));
    assert_eq!(updated(&lines("x\nin [..] s"), &lines("y\nin 3 s")), lines("y\nin [..] s"));
}
