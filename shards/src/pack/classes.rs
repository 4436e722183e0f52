//! Classes: the class of each image, and the number of each class.
//!
//! By folders: names sorted as text, as torchvision's `ImageFolder` numbers them; an empty class folder
//! is a class. By labels (`.cls` members, or a file of labels): numbers stay what they are, other words
//! are sorted. What most pictures have decides, so that one odd file renumbers nothing. A given list
//! of names is the numbering itself.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use thiserror::Error;

use super::scan::{Found, Scan};
use super::source::{Entry, NO_CLASS, entry};
use super::{Options, PackError, Skip, SkipReason, key};
use crate::format::ShardError;
use crate::format::manifest::Manifest;
use crate::format::name::stem;

/// Class numbers from labels are believed below this.
const CLASSES_MAX: u32 = 1 << 20;

/// Names of the parts that data sets are split into.
const SPLITS: [&str; 12] = [
    "train",
    "training",
    "val",
    "valid",
    "validation",
    "test",
    "testing",
    "dev",
    "eval",
    "holdout",
    "trainval",
    "unlabeled",
];

/// Errors of a file of labels or class names.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum LabelFault {
    /// A class named twice.
    #[error("class `{class}` is named twice")]
    Twice {
        /// The class.
        class: String,
    },
    /// No class at all.
    #[error("it names no class")]
    Empty,
    /// Labels without names, and another number of them than of pictures.
    #[error(
        "it has {lines} labels for {pictures} pictures: expected is a label for each picture, in the \
         order of their names, or lines of NAME LABEL"
    )]
    Count {
        /// Lines with a label.
        lines: u64,
        /// Pictures in the source.
        pictures: u64,
    },
    /// A line of something else.
    #[error("line {line} is not NAME LABEL: {text}")]
    Line {
        /// Its number, from 1.
        line: u64,
        /// The line, shortened.
        text: String,
    },
    /// None of its names is that of a picture.
    #[error("no picture in the source has a name that is in it; the first is `{name}`")]
    Stranger {
        /// The first name.
        name: String,
    },
}

/// Pictures with classes.
pub(super) struct Arranged {
    pub(super) entries: Vec<Entry>,
    pub(super) classes: Vec<String>,
    pub(super) skips: Vec<Skip>,
}

/// How classes are told.
enum By {
    /// There are none.
    Nothing,
    /// By folder, or by labels that are words.
    Names { labels: bool },
    /// By labels that are numbers.
    Numbers,
}

/// Gives each picture that was found its class; what has none is left out.
pub(super) fn arrange(
    root: &Path,
    scan: &mut Scan<'_>,
    options: &Options,
) -> Result<Arranged, PackError> {
    let mut found = std::mem::take(&mut scan.found);
    if let Some(file) = &options.labels {
        label(&mut found, file)?;
    }
    let by = by(&found, options);
    let given = options.classes.as_ref();
    let classes = match (&by, given) {
        (By::Nothing, _) => Vec::new(),
        (_, Some(given)) => given.clone(),
        (By::Names { labels: true }, None) => found
            .iter()
            .filter_map(|one| one.label.as_deref())
            .map(str::to_owned)
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect(),
        (By::Names { labels: false }, None) => {
            let mut names = std::mem::take(&mut scan.empty_classes);
            let filled: BTreeSet<String> = found.iter().filter_map(Found::folder).collect();
            tell_empty(&names, &filled, &mut scan.notes);
            names.extend(filled);
            names.into_iter().collect()
        }
        (By::Numbers, None) => numbered(&found, &scan.class_names),
    };
    if let By::Names { labels: false } = by {
        tell_suspicious(root, &found, &classes, given.is_none(), &mut scan.notes);
    }
    let places: HashMap<&str, u32> = classes.iter().map(String::as_str).zip(0..).collect();
    let (mut entries, mut skips) = (Vec::with_capacity(found.len()), Vec::new());
    for one in found {
        match class(&one, &by, given.is_some(), &classes, &places) {
            Ok(class) => entries.push(entry(one, class)),
            Err(reason) => skips.push(Skip::new(&one.name, &reason)),
        }
    }
    Ok(Arranged { entries, classes, skips })
}

/// What most pictures have decides.
fn by(found: &[Found], options: &Options) -> By {
    let labels = || found.iter().filter_map(|one| one.label.as_deref());
    let labelled = labels().count();
    let folders = found.iter().any(|one| one.class.is_some());
    let most = labelled * 2 > found.len() || (labelled > 0 && !folders) || options.labels.is_some();
    if !most {
        return if folders { By::Names { labels: false } } else { By::Nothing };
    }
    let numbers = labels().filter(|label| number(label).is_some()).count();
    if numbers * 2 > labelled { By::Numbers } else { By::Names { labels: true } }
}

/// The class of one picture, or why it has none.
fn class(
    one: &Found,
    by: &By,
    given: bool,
    classes: &[String],
    places: &HashMap<&str, u32>,
) -> Result<u32, SkipReason> {
    let place = |name: &str| {
        let unknown = || SkipReason::UnknownClass { class: name.to_owned() };
        places.get(name).copied().ok_or_else(unknown)
    };
    match by {
        By::Nothing => Ok(NO_CLASS),
        By::Names { labels: true } => place(one.label.as_deref().ok_or(SkipReason::NoLabel)?),
        By::Names { labels: false } => place(&one.folder().ok_or(SkipReason::NoClass)?),
        By::Numbers => {
            let label = one.label.as_deref().ok_or(SkipReason::NoLabel)?;
            let class = label.to_owned();
            if given && let Some(place) = places.get(label) {
                return Ok(*place);
            }
            let number = number(label).ok_or(SkipReason::BadLabel { label: class.clone() })?;
            let known = usize::try_from(number).is_ok_and(|number| number < classes.len());
            if known { Ok(number) } else { Err(SkipReason::UnknownClass { class }) }
        }
    }
}

fn number(label: &str) -> Option<u32> {
    let plain = label.bytes().all(|byte| byte.is_ascii_digit());
    label.parse().ok().filter(|number| plain && *number < CLASSES_MAX)
}

/// The classes of labels that are numbers: by the manifest's names where they reach, else by numbers.
fn numbered(found: &[Found], names: &[String]) -> Vec<String> {
    let numbers = found.iter().filter_map(|one| one.label.as_deref().and_then(number));
    let most = numbers.max().unwrap_or(0);
    if names.len() > most as usize {
        return names.to_vec();
    }
    (0..=most).map(|number| number.to_string()).collect()
}

fn tell_empty(empty: &BTreeSet<String>, filled: &BTreeSet<String>, notes: &mut Vec<String>) {
    let without: Vec<&str> = empty.difference(filled).map(String::as_str).collect();
    if let Some(first) = without.first() {
        let count = without.len();
        let classes = match count {
            1 => "1 class has".to_owned(),
            count => format!("{count} classes have"),
        };
        notes.push(format!("{classes} no pictures and a number all the same: `{first}`"));
    }
}

/// Says what is legal and seldom meant.
fn tell_suspicious(
    root: &Path,
    found: &[Found],
    classes: &[String],
    sorted: bool,
    notes: &mut Vec<String>,
) {
    let is_split = |name: &str| SPLITS.iter().any(|split| name.eq_ignore_ascii_case(split));
    let train = |names: &[String]| {
        let first = names.iter().find(|name| name.to_ascii_lowercase().starts_with("train"));
        first.or(names.first()).cloned().unwrap_or_default()
    };
    let deeper =
        |one: &Found| one.class.is_some_and(|(_, end)| one.name[end + 1..].contains(&b'/'));
    if !classes.is_empty() && classes.iter().all(|name| is_split(name)) && found.iter().any(deeper)
    {
        let meant = root.join(train(classes));
        notes.push(format!(
            "the classes are {}, which look like the splits of a data set, with folders in them: did \
             you mean `detco pack {} OUT`?",
            classes.join(", "),
            meant.display()
        ));
    }
    // In a tar the class is the folder that a picture lies in, whatever is above.
    let above: BTreeSet<String> = found
        .iter()
        .filter_map(|one| {
            let (start, _) = one.class?;
            let above = one.name[..start].strip_suffix(b"/")?;
            Some(key::readable(above.rsplit(|byte| *byte == b'/').next()?))
        })
        .collect();
    if above.len() > 1 && above.iter().all(|name| is_split(name)) {
        let names: Vec<String> = above.into_iter().collect();
        notes.push(format!(
            "{} holds {}, which look like the splits of a data set: all of them are packed as one; \
             unpack it and pack the folder `{}` alone if that is not meant",
            root.display(),
            names.join(", "),
            train(&names)
        ));
    }
    let numbers: Option<Vec<u64>> = classes.iter().map(|name| plain_number(name)).collect();
    if let Some(numbers) = numbers.filter(|_| sorted)
        && let Some((at, number)) = (0u64..).zip(&numbers).find(|(at, number)| at != *number)
        && !numbers.is_sorted()
    {
        notes.push(format!(
            "the classes are named by numbers and sorted as text, as ImageFolder sorts them: `{number}` \
             is class {at}; manifest.json has the names in this order, and --classes FILE gives another"
        ));
    }
}

fn plain_number(name: &str) -> Option<u64> {
    let plain = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit());
    name.parse().ok().filter(|_| plain)
}

/// Reads class names in the order of their numbers: of a manifest, of a folder of shards, or of a text
/// with a name a line.
///
/// # Errors
///
/// The file cannot be read, names no class, or names one twice.
pub fn class_names(from: &Path) -> Result<Vec<String>, PackError> {
    let fail = |fault| PackError::Labels { file: from.to_path_buf(), fault };
    let names = if from.is_dir() {
        let manifests = Manifest::all_in(from)?;
        manifests.into_iter().next().map_or_else(Vec::new, |(_, manifest)| manifest.classes)
    } else if from.extension().is_some_and(|extension| extension == "json") {
        Manifest::read(from)?.classes
    } else {
        let text = std::fs::read(from).map_err(ShardError::io(from, "read"))?;
        let lines = text.split(|byte| *byte == b'\n').map(|line| key::readable(line.trim_ascii()));
        lines.filter(|line| !line.is_empty()).collect()
    };
    if names.is_empty() {
        return Err(fail(LabelFault::Empty));
    }
    let mut seen = BTreeSet::new();
    if let Some(class) = names.iter().find(|name| !seen.insert(name.as_str())) {
        return Err(fail(LabelFault::Twice { class: class.clone() }));
    }
    Ok(names)
}

/// Gives pictures the labels of a text: a label a line in the order of the pictures' names, or lines of
/// NAME LABEL, apart by a comma, a tab or a blank.
fn label(found: &mut [Found], file: &Path) -> Result<(), PackError> {
    let fail = |fault| PackError::Labels { file: file.to_path_buf(), fault };
    let text = std::fs::read(file).map_err(ShardError::io(file, "read"))?;
    let lines: Vec<(u64, &[u8])> = (1..)
        .zip(text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii))
        .filter(|(_, line)| !line.is_empty())
        .collect();
    let apart: Vec<Option<(&[u8], String)>> =
        lines.iter().map(|(_, line)| name_and_label(line)).collect();
    found.iter_mut().for_each(|one| one.label = None);
    if apart.iter().all(Option::is_none) {
        if lines.len() != found.len() {
            let (lines, pictures) = (lines.len() as u64, found.len() as u64);
            return Err(fail(LabelFault::Count { lines, pictures }));
        }
        for (one, (_, line)) in found.iter_mut().zip(lines) {
            one.label = Some(key::readable(line).into());
        }
        return Ok(());
    }
    let mut labels: HashMap<&[u8], String> = HashMap::with_capacity(apart.len());
    let mut first: Option<&[u8]> = None;
    for ((line, text), pair) in lines.iter().zip(apart) {
        let Some((name, label)) = pair else {
            let text = key::readable(&text[..text.len().min(60)]);
            return Err(fail(LabelFault::Line { line: *line, text }));
        };
        first.get_or_insert(name);
        labels.insert(name, label);
    }
    let mut any = false;
    for one in found {
        let name: &[u8] = &one.name;
        let base = name.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        let names = [name, stem(name), base, stem(base)];
        let label = names.iter().find_map(|name| labels.get(name));
        one.label = label.map(|label| label.as_str().into());
        any |= label.is_some();
    }
    if any {
        return Ok(());
    }
    Err(fail(LabelFault::Stranger { name: key::readable(first.unwrap_or_default()) }))
}

/// Name and label of a line; `None` for one word. After a comma the label ends before a number that
/// follows it: the boxes of ImageNet's validation set.
fn name_and_label(line: &[u8]) -> Option<(&[u8], String)> {
    let at = |byte: u8| line.iter().position(|other| *other == byte);
    let comma = at(b',');
    let split = comma.or_else(|| at(b'\t'));
    let split = split.or_else(|| line.iter().rposition(|byte| byte.is_ascii_whitespace()))?;
    let (name, label) = (line[..split].trim_ascii(), line[split + 1..].trim_ascii());
    let mut label = key::readable(label);
    if comma.is_some()
        && let Some((word, rest)) = label.split_once(' ')
        && rest.split_whitespace().next().is_some_and(|word| word.parse::<f64>().is_ok())
    {
        label = word.to_owned();
    }
    (!name.is_empty() && !label.is_empty()).then_some((name, label))
}
