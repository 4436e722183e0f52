//! Console sessions as snapshots: a text with commands and what they print, run again and compared.
//!
//! A line `$ COMMAND` is run by bash; what follows, up to the next command or comment (`## …`), is what it
//! prints on both outputs, and `[CODE]` where the exit code is not 0. `[..]` in a line stands for
//! anything, a line `...` for any lines: times, sizes, numbers that depend on the machine.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

/// A command, and what it printed when somebody last looked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Block {
    /// Comments and empty lines in front of it.
    pub(crate) before: Vec<String>,
    pub(crate) command: String,
    pub(crate) expected: Vec<String>,
}

/// The blocks of a session, and the lines behind the last one's.
pub(crate) fn parse(text: &str) -> (Vec<Block>, Vec<String>) {
    let mut blocks: Vec<Block> = Vec::new();
    let mut before = Vec::new();
    let mut in_output = false;
    for line in text.lines() {
        if let Some(command) = line.strip_prefix("$ ") {
            let (before, command) = (std::mem::take(&mut before), command.to_owned());
            blocks.push(Block { before, command, expected: Vec::new() });
            in_output = true;
        } else if line.starts_with("## ") {
            in_output = false;
            before.push(line.to_owned());
        } else {
            match blocks.last_mut().filter(|_| in_output) {
                Some(block) => block.expected.push(line.to_owned()),
                None => before.push(line.to_owned()),
            }
        }
    }
    // Empty lines belong to what follows.
    let mut blocks = blocks.into_iter().peekable();
    let mut done = Vec::new();
    while let Some(mut block) = blocks.next() {
        let mut empty = Vec::new();
        while block.expected.last().is_some_and(String::is_empty) {
            empty.extend(block.expected.pop());
        }
        let after = blocks.peek_mut().map_or(&mut before, |next| &mut next.before);
        after.splice(0..0, empty);
        done.push(block);
    }
    (done, before)
}

pub(crate) fn write(blocks: &[Block], after: &[String]) -> String {
    let mut text = String::new();
    for Block { before, command, expected } in blocks {
        before.iter().for_each(|line| text.extend([line, "\n"]));
        // Writing into a String cannot fail.
        let _ = writeln!(text, "$ {command}");
        expected.iter().for_each(|line| text.extend([line, "\n"]));
    }
    after.iter().for_each(|line| text.extend([line.as_str(), "\n"]));
    text
}

/// Whether a line is what was expected, `[..]` standing for anything.
fn is_line(expected: &str, line: &str) -> bool {
    let Some((first, rest)) = expected.split_once("[..]") else { return expected == line };
    let Some(mut line) = line.strip_prefix(first) else { return false };
    let mut parts: Vec<&str> = rest.split("[..]").collect();
    let last = parts.pop().unwrap_or_default();
    for part in parts {
        let Some(at) = line.find(part) else { return false };
        line = &line[at + part.len()..];
    }
    line.ends_with(last)
}

/// Whether lines are what was expected, a line `...` standing for any.
pub(crate) fn is_output(expected: &[String], lines: &[String]) -> bool {
    match (expected.split_first(), lines.split_first()) {
        (None, found) => found.is_none(),
        (Some((any, rest)), _) if any == "..." => {
            (0..=lines.len()).any(|skipped| is_output(rest, &lines[skipped..]))
        }
        (Some(_), None) => false,
        (Some((one, rest)), Some((line, lines))) => is_line(one, line) && is_output(rest, lines),
    }
}

/// Runs a command in a folder: the lines that it prints, without what differs from run to run.
pub(crate) fn run(command: &str, folder: &Path, variables: &[(&str, String)]) -> Vec<String> {
    let program = Path::new(super::support::DETCO).parent().expect("it lies in a folder");
    let mut bash = Command::new("timeout");
    bash.args(["-s", "KILL", "300", "bash", "-c", &format!("exec 2>&1\n{command}")]);
    bash.current_dir(folder).env_clear().stdin(std::process::Stdio::null());
    bash.env("PATH", format!("{}:/usr/local/bin:/usr/bin:/bin", program.display()));
    bash.env("HOME", folder).env("RUST_BACKTRACE", "0").env("LC_ALL", "C.UTF-8");
    bash.envs(variables.iter().map(|(name, value)| (name, value)));
    let output = bash.output().expect("bash is there");
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text = text.replace(folder.to_str().expect("plain"), "[DIR]");
    for (name, value) in variables {
        text = text.replace(value, &format!("[{name}]"));
    }
    let mut lines: Vec<String> = text.lines().map(|line| line.trim_end().to_owned()).collect();
    while lines.last().is_some_and(String::is_empty) {
        lines.pop();
    }
    match output.status.code() {
        Some(0) => {}
        Some(code) => lines.push(format!("[{code}]")),
        None => lines.push("[signal]".to_owned()),
    }
    lines
}

/// What a block that differs becomes: the lines as they are, but for those that an expected one with
/// `[..]` covers.
pub(crate) fn updated(expected: &[String], lines: &[String]) -> Vec<String> {
    let wild = |line: &&String| line.contains("[..]");
    let keep = |line: &String| {
        let covers = expected.iter().filter(wild).find(|one| is_line(one, line));
        covers.unwrap_or(line).clone()
    };
    lines.iter().map(keep).collect()
}
