//! What the user asked `cargo xtask peers` for.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};

use super::environment::PEERS;

/// Ours.
pub(crate) const DETCO: &str = "detco";
/// Decoding and resizing alone.
pub(crate) const FLOOR: &str = "floor";

/// A task of the comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Task {
    T1,
    T2,
    T3,
}

impl Task {
    const ALL: [Task; 3] = [Task::T1, Task::T2, Task::T3];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Task::T1 => "T1",
            Task::T2 => "T2",
            Task::T3 => "T3",
        }
    }

    pub(crate) fn title(self) -> &'static str {
        match self {
            Task::T1 => "decode to RGB",
            Task::T2 => "decode, random resized crop 224, flip",
            Task::T3 => "decode once, the four views of DetCo",
        }
    }

    /// What `detco profile --mode` calls it.
    pub(crate) fn mode(self) -> &'static str {
        match self {
            Task::T1 => "decode",
            Task::T2 => "supervised",
            Task::T3 => "detco",
        }
    }
}

#[derive(Debug, PartialEq)]
pub(crate) struct Options {
    pub(crate) images: Option<PathBuf>,
    pub(crate) tasks: Vec<Task>,
    /// Names of [`subjects`].
    pub(crate) subjects: Vec<String>,
    pub(crate) rounds: usize,
    pub(crate) workers: Vec<usize>,
    /// Of a run's window.
    pub(crate) seconds: f64,
    pub(crate) record: Option<PathBuf>,
    pub(crate) list: bool,
}

/// The names that `--peers` knows: the peers, then ours, then the floor.
fn subjects() -> Vec<&'static str> {
    PEERS.iter().map(|peer| peer.name).chain([DETCO, FLOOR]).collect()
}

impl Options {
    pub(crate) fn parse(arguments: &[String]) -> Result<Options> {
        let mut options = Options {
            images: None,
            tasks: Task::ALL.to_vec(),
            subjects: subjects().into_iter().map(String::from).collect(),
            rounds: 3,
            workers: vec![1, 2],
            seconds: 8.0,
            record: None,
            list: false,
        };
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let (name, inline) = match argument.split_once('=') {
                Some((name, value)) => (name, Some(value.to_string())),
                None => (argument.as_str(), None),
            };
            let mut value = || -> Result<String> {
                let value = inline.clone().or_else(|| arguments.next().cloned());
                value
                    .filter(|text| !text.is_empty())
                    .with_context(|| format!("{name} needs a value"))
            };
            match name {
                "--images" => options.images = Some(PathBuf::from(value()?)),
                "--task" | "--tasks" => options.tasks = tasks(&value()?)?,
                "--peers" => options.subjects = names(&value()?)?,
                "--rounds" => options.rounds = count(name, &value()?)?,
                "--workers" => options.workers = worker_counts(name, &value()?)?,
                "--seconds" => options.seconds = count(name, &value()?)? as f64,
                "--record" => options.record = Some(PathBuf::from(value()?)),
                "--list" if inline.is_none() => options.list = true,
                _ => bail!(
                    "unknown option {argument}: there are --images DIR, --task T1,T2,T3, --peers \
                     a,b, --rounds N, --workers 1,2, --seconds S, --record FILE, --list"
                ),
            }
        }
        Ok(options)
    }
}

fn tasks(text: &str) -> Result<Vec<Task>> {
    distinct(text, |word| {
        let task = Task::ALL.into_iter().find(|task| task.name().eq_ignore_ascii_case(word));
        task.with_context(|| format!("--task {word}: there are T1, T2 and T3"))
    })
}

fn names(text: &str) -> Result<Vec<String>> {
    distinct(text, |word| {
        let known = subjects();
        ensure!(known.contains(&word), "--peers {word}: there are {}", known.join(", "));
        Ok(word.to_string())
    })
}

fn worker_counts(name: &str, text: &str) -> Result<Vec<usize>> {
    distinct(text, |word| count(name, word))
}

/// The words of a comma list, each once, read one by one.
fn distinct<T: PartialEq>(text: &str, read: impl Fn(&str) -> Result<T>) -> Result<Vec<T>> {
    let mut all = Vec::new();
    for word in text.split(',').map(str::trim) {
        let one = read(word)?;
        ensure!(!all.contains(&one), "{word} is named twice in {text}");
        all.push(one);
    }
    Ok(all)
}

fn count(name: &str, text: &str) -> Result<usize> {
    let count: Option<usize> = text.parse().ok().filter(|count| (1..=1000).contains(count));
    count.with_context(|| format!("{name} {text}: a whole number from 1 to 1000 is needed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options> {
        let words: Vec<String> = line.split_whitespace().map(String::from).collect();
        Options::parse(&words)
    }

    #[test]
    fn options_have_defaults_and_two_spellings() {
        let all = parse("").unwrap();
        assert_eq!((all.rounds, all.workers, all.list), (3, vec![1, 2], false));
        assert_eq!((all.tasks.len(), all.subjects.len()), (3, PEERS.len() + 2));
        let some = parse(
            "--images a --task=t3,T1 --peers dali,floor --rounds 2 --workers=1 --seconds 5 --record b",
        );
        let some = some.unwrap();
        assert_eq!(some.images, Some("a".into()));
        assert_eq!(some.tasks, [Task::T3, Task::T1]);
        assert_eq!(some.subjects, ["dali", "floor"]);
        assert_eq!((some.rounds, some.workers, some.seconds), (2, vec![1], 5.0));
        assert_eq!(some.record, Some("b".into()));
        assert!(parse("--list").unwrap().list);
    }

    #[test]
    fn wrong_options_are_named() {
        for (line, said) in [
            ("--task T4", "--task T4: there are T1, T2 and T3"),
            ("--task T1,T1", "T1 is named twice in T1,T1"),
            ("--peers dali,tensorflow", "--peers tensorflow: there are torchvision-pil, "),
            ("--rounds 0", "--rounds 0: a whole number from 1 to 1000 is needed"),
            ("--workers 1,x", "--workers x: a whole number"),
            ("--seconds", "--seconds needs a value"),
            ("--images=", "--images needs a value"),
            ("--list=yes", "unknown option --list=yes"),
            ("--frobnicate", "unknown option --frobnicate: there are --images DIR"),
        ] {
            let error = parse(line).unwrap_err().to_string();
            assert!(error.starts_with(said), "{line}: {error}");
        }
    }
}
