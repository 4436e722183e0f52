//! Packing: from folders and tars of images to shards.
//!
//! The source is listed, sorted and, by a seed, permuted; shard *k* holds the images at positions
//! `k·n .. (k+1)·n` of that order, so its bytes depend on the source and the options alone. Workers
//! write whole shards, one image in memory each.
//!
//! Killed at any moment: a shard appears under its name when it is complete and on disk, and its
//! record lies in the folder `.pack` before that, so `resume` goes on with the first shard that is
//! not there. The manifest is written last; until then the folder is refused as a data set.

mod classes;
mod convert;
mod key;
mod scan;
mod shuffle;
mod source;
mod state;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use self::classes::{LabelFault, class_names};
use self::convert::{Converter, Oddities};
pub use self::convert::{Resize, TRANSCODE_QUALITY};
use self::shuffle::Shuffle;
use self::source::Source;
use self::state::{Done, Plan, State};
use crate::decode::DecodeError;
use crate::files::write_atomically;
use crate::format::manifest::{FORMAT, Manifest, Part};
use crate::format::writer::ShardWriter;
use crate::format::{MemberFault, ShardError, TarError, name};
use crate::pipe::side_by_side;

/// How large a shard is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShardSize {
    /// A number of samples.
    Samples(u64),
    /// Bytes of source images: a shard is closed by the image that reaches them.
    Bytes(u64),
}

/// What to do with a file that cannot be packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnError {
    /// Stop.
    Fail,
    /// Leave it out and say so in `skipped.jsonl`.
    Skip,
}

/// What decides the bytes of the shards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// How large a shard is.
    pub shard_size: ShardSize,
    /// Seed of the order; `None` keeps the sorted order.
    pub shuffle: Option<u64>,
    /// Makes images smaller; `None` keeps their bytes.
    pub resize: Option<Resize>,
    /// What to do with a file that cannot be packed.
    pub on_error: OnError,
    /// Decodes every image, so that what training would refuse is refused here.
    #[serde(default, skip_serializing_if = "is_false")]
    pub check: bool,
    /// Turns images upright by their EXIF orientation, which makes new JPEGs of them.
    #[serde(default, skip_serializing_if = "is_false")]
    pub upright: bool,
    /// Class names in the order of their numbers; `None` takes them from the source. Not written
    /// down with the options: the manifest lists the classes.
    #[serde(skip)]
    pub classes: Option<Vec<String>>,
    /// A text file with the pictures' labels; `None` takes them from the source. Not written down
    /// with the options: the manifest's `source_sha256` depends on it.
    #[serde(skip)]
    pub labels: Option<PathBuf>,
}

/// An option that is off is not written: shards packed without it have the manifest that they had
/// before there was such an option.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_false(option: &bool) -> bool {
    !option
}

impl Default for Options {
    /// 1000 samples a shard, shuffled with seed 0, bytes untouched and not decoded, stop at the first
    /// fault.
    fn default() -> Self {
        Options {
            shard_size: ShardSize::Samples(1000),
            shuffle: Some(0),
            resize: None,
            on_error: OnError::Fail,
            check: false,
            upright: false,
            classes: None,
            labels: None,
        }
    }
}

/// A packing job.
#[derive(Debug, Clone)]
pub struct Job {
    /// A folder of pictures, of class folders or of tars; a tar, or a tar of tars.
    pub source: PathBuf,
    /// The folder to write to; it is made.
    pub out: PathBuf,
    /// The options that decide the bytes.
    pub options: Options,
    /// The part of the shards that this run writes.
    pub part: Part,
    /// Threads, at least 1.
    pub workers: usize,
    /// Whether to continue an interrupted run.
    pub resume: bool,
}

/// The progress of a run, which another thread may read.
#[derive(Debug, Default)]
pub struct Progress {
    /// Images listed so far.
    pub scanned: AtomicU64,
    /// Images to pack in this run; 0 while listing.
    pub total: AtomicU64,
    /// Images done, skipped ones and those of earlier runs included.
    pub images: AtomicU64,
    /// Of these, images that an earlier run had done.
    pub resumed: AtomicU64,
    /// Source bytes read.
    pub bytes: AtomicU64,
    /// A callback for sentences to the user: how an ambiguous source was understood, and oddities that are
    /// seldom intended.
    pub notice: Option<fn(&str)>,
}

impl Progress {
    fn tell(&self, text: &str) {
        if let Some(notice) = self.notice {
            notice(text);
        }
    }
}

/// The summary of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Samples packed.
    pub samples: u64,
    /// Shards written or found complete.
    pub shards: u64,
    /// Bytes of the shards.
    pub bytes: u64,
    /// Number of classes.
    pub classes: u64,
    /// Files that were left out.
    pub skipped: u64,
    /// Of these, files that looked like something to pack; those of this run, or of this part.
    pub faults: u64,
    /// Oddities of the images, by name.
    pub oddities: BTreeMap<String, u64>,
    /// The manifest.
    pub manifest: PathBuf,
}

/// A file that was left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skip {
    /// Its path in the source.
    pub path: String,
    /// Why.
    pub reason: String,
    /// Whether it looked like something to pack, so that `--on-error` decides about it; other files
    /// are only noted.
    #[serde(default)]
    pub fault: bool,
}

impl Skip {
    fn new(name: &[u8], reason: &SkipReason) -> Skip {
        Skip { path: key::readable(name), reason: reason.to_string(), fault: reason.is_fault() }
    }
}

impl SkipReason {
    /// Whether `--on-error` decides about it.
    fn is_fault(&self) -> bool {
        !matches!(
            self,
            SkipReason::Hidden
                | SkipReason::OtherFile
                | SkipReason::Archive
                | SkipReason::Replaced
                | SkipReason::Loop
        )
    }
}

/// Why a file is left out.
#[derive(Debug, Error)]
pub enum SkipReason {
    /// The system refuses to read it.
    #[error("unreadable: {error}")]
    Unreadable {
        /// Its words.
        error: std::io::Error,
    },
    /// No bytes.
    #[error("empty file")]
    Empty,
    /// Its first bytes are not those of an image.
    #[error("not an image")]
    NotAnImage,
    /// An image of a format that is not packed.
    #[error("{format} is not supported: JPEG, PNG, WebP and BMP are")]
    Unsupported {
        /// Its format.
        format: &'static str,
    },
    /// Its header or its pixels cannot be read.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// Its pixels cannot be read.
    #[error("cannot be decoded: {error}")]
    DecodeOther {
        /// The decoder's words.
        error: image::ImageError,
    },
    /// It cannot be encoded as a JPEG.
    #[error("cannot be encoded: {error}")]
    Encode {
        /// The encoder's words.
        error: image::ImageError,
    },
    /// A tar member that is not a file.
    #[error(transparent)]
    Member {
        /// Why.
        fault: MemberFault,
    },
    /// A later member has the same path.
    #[error("replaced by a later member of the same name, or by a file beside its tar")]
    Replaced,
    /// Most other images have a label, it has none.
    #[error("no label, and others have one")]
    NoLabel,
    /// Its label is a word where those of most others are numbers.
    #[error("the label `{label}` is no class number, as those of most others are")]
    BadLabel {
        /// The label.
        label: String,
    },
    /// Its class is not in the list that was given.
    #[error("the class `{class}` is not in the list of classes")]
    UnknownClass {
        /// The class.
        class: String,
    },
    /// It has no class, while other images have one.
    #[error("no class: it lies beside the class folders")]
    NoClass,
    /// A tar inside the tar is broken; images before that place are packed.
    #[error("broken tar: {error}; what lies behind that place is left out")]
    Tar {
        /// Where and what.
        error: TarError,
    },
    /// Its name starts with a dot.
    #[error("hidden")]
    Hidden,
    /// Its name is not an image's.
    #[error("not an image by its name")]
    OtherFile,
    /// A compressed archive, by its name.
    #[error("not an image by its name: unpack it first if there are images in it")]
    Archive,
    /// A link to a folder it lies in.
    #[error("a link to a folder above")]
    Loop,
}

/// Why packing stopped.
#[derive(Debug, Error)]
pub enum PackError {
    /// A shard or a file beside it.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// The disk is full.
    #[error("no space left: cannot {action} {}; make room and go on with --resume", path.display())]
    NoSpace {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The system's words.
        source: std::io::Error,
    },
    /// Nothing to pack.
    #[error("{}: no images{instead}", from.display())]
    NoImages {
        /// The source.
        from: PathBuf,
        /// What is there, to be read on.
        instead: String,
    },
    /// A file of labels or class names that cannot be used.
    #[error("{}: {fault}", file.display())]
    Labels {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        fault: LabelFault,
    },
    /// The system refused a thread.
    #[error("cannot start a thread: {source}{}", crate::limits::of_threads(source))]
    Thread {
        /// Its words.
        source: std::io::Error,
    },
    /// Nothing left after skipping.
    #[error("{}: all {images} images were skipped", from.display())]
    AllSkipped {
        /// The source.
        from: PathBuf,
        /// How many.
        images: u64,
    },
    /// A file that cannot be packed, and the policy is to stop.
    #[error("{path}: {reason} (--on-error skip leaves such files out)")]
    File {
        /// Its path in the source.
        path: String,
        /// Why.
        reason: String,
    },
    /// The same, when shards were being written: what there is of them is kept.
    #[error("{path}: {reason} (--resume --on-error skip goes on, and leaves such files out)")]
    FileMeanwhile {
        /// Its path in the source.
        path: String,
        /// Why.
        reason: String,
    },
    /// The output lies in the source.
    #[error("{} lies inside the source {}", out.display(), from.display())]
    OutInside {
        /// The output.
        out: PathBuf,
        /// The source.
        from: PathBuf,
    },
    /// There is a finished data set.
    #[error("{} exists: pack into another folder", manifest.display())]
    Finished {
        /// Its manifest.
        manifest: PathBuf,
    },
    /// Parts of another total are there, finished or not.
    #[error(
        "--part {}/{}: {} is one of {of}, and all parts in a folder have one total: \
         expected is --part K/{of}, or another folder",
        part.number, part.of, found.display()
    )]
    OtherParts {
        /// What this run would pack.
        part: Part,
        /// The manifest of a part, or what an unfinished one has left.
        found: PathBuf,
        /// The total it was packed with.
        of: u32,
    },
    /// There is an interrupted run.
    #[error("{} holds an interrupted run: go on with --resume, or pack into another folder",
        out.display())]
    Interrupted {
        /// The output.
        out: PathBuf,
    },
    /// Another process is packing there.
    #[error("{} is being packed by another process", out.display())]
    Busy {
        /// The output.
        out: PathBuf,
    },
    /// The interrupted run was another one.
    #[error("cannot resume {}: {what} was {was}, now it is {now}", out.display())]
    Mismatch {
        /// The output.
        out: PathBuf,
        /// What differs.
        what: String,
        /// Then.
        was: String,
        /// Now.
        now: String,
    },
    /// The state of an interrupted run cannot be read.
    #[error("{}: damaged: {source}", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// An option that makes no sense.
    #[error("{option} {value}: {expected} is expected")]
    Option {
        /// The option.
        option: &'static str,
        /// Its value.
        value: String,
        /// What was expected.
        expected: &'static str,
    },
}

impl PackError {
    /// Turns an error of a full disk into its own variant.
    fn name_full_disk(self) -> PackError {
        match self {
            PackError::Shard(ShardError::Io { path, action, source })
                if matches!(
                    source.kind(),
                    std::io::ErrorKind::StorageFull
                        | std::io::ErrorKind::QuotaExceeded
                        | std::io::ErrorKind::FileTooLarge
                ) =>
            {
                PackError::NoSpace { path, action, source }
            }
            other => other,
        }
    }
}

/// Runs a packing job. The same source and options give the same bytes, with any number of workers, in one run
/// or several.
///
/// # Errors
///
/// See [`PackError`]. After any of them the output can be resumed, unless the error says otherwise.
pub fn run(job: &Job, progress: &Progress) -> Result<Summary, PackError> {
    check(job)?;
    pack(job, progress).map_err(PackError::name_full_disk)
}

fn check(job: &Job) -> Result<(), PackError> {
    let wrong = |option, value: &dyn ToString, expected| {
        Err(PackError::Option { option, value: value.to_string(), expected })
    };
    if let ShardSize::Samples(0) | ShardSize::Bytes(0) = job.options.shard_size {
        return wrong("--shard-size", &0, "at least 1");
    }
    if let Some(Resize { short, quality }) = job.options.resize {
        if !(1..=65_535).contains(&short) {
            return wrong("--resize-short", &short, "1 to 65535 pixels");
        }
        if !(1..=100).contains(&quality) {
            return wrong("--quality", &quality, "1 to 100");
        }
    }
    let Part { number, of } = job.part;
    if number == 0 || number > of || of > 99_999 {
        return wrong("--part", &format!("{number}/{of}"), "K/N with K from 1 to N");
    }
    Ok(())
}

fn pack(job: &Job, progress: &Progress) -> Result<Summary, PackError> {
    let out = job.out.as_path();
    std::fs::create_dir_all(out).map_err(ShardError::io(out, "create"))?;
    let real = |path: &Path| path.canonicalize().map_err(ShardError::io(path, "open"));
    if job.source.is_dir() && real(out)?.starts_with(real(&job.source)?) {
        return Err(PackError::OutInside { out: out.to_path_buf(), from: job.source.clone() });
    }
    let state = State::open(out, job.part, job.resume)?;

    let source = Source::scan(&job.source, &job.options, progress)?;
    if job.options.on_error == OnError::Fail
        && let Some(skip) = source.skips.iter().find(|skip| skip.fault)
    {
        return Err(PackError::File { path: skip.path.clone(), reason: skip.reason.clone() });
    }
    let layout = Layout::new(&source, &job.options);
    let plan = Plan {
        format: FORMAT,
        options: serde_json::to_value(&job.options)
            .map_err(|source| PackError::State { path: out.to_path_buf(), source })?,
        source_sha256: source.fingerprint(),
        images: source.entries.len() as u64,
    };
    if let Some(manifest) = state.finished(&plan)? {
        return Ok(summary(&manifest.1, manifest.0, faults(&source.skips)));
    }
    state.agree(&plan)?;

    let mine = layout.part(job.part);
    progress
        .total
        .store(mine.clone().map(|k| layout.shard(k).count() as u64).sum(), Ordering::Relaxed);
    let done = write_shards(job, &source, &layout, mine, &state, progress)?;
    finish(job, &source, &plan, &state, done)
}

/// Which images each shard holds.
struct Layout {
    shuffle: Option<Shuffle>,
    images: u64,
    /// Samples a shard, or where each shard starts.
    cut: Cut,
}

enum Cut {
    Every(u64),
    At(Vec<u64>),
}

impl Layout {
    fn new(source: &Source, options: &Options) -> Layout {
        let images = source.entries.len() as u64;
        let shuffle = options.shuffle.map(|seed| Shuffle::new(images, seed));
        let mut layout = Layout { shuffle, images, cut: Cut::Every(images) };
        layout.cut = match options.shard_size {
            ShardSize::Samples(samples) => Cut::Every(samples),
            ShardSize::Bytes(most) => {
                let mut starts = vec![0];
                let mut bytes = 0u64;
                for position in 0..images {
                    if bytes >= most {
                        starts.push(position);
                        bytes = 0;
                    }
                    bytes = bytes.saturating_add(source.entries[layout.entry(position)].size);
                }
                Cut::At(starts)
            }
        };
        layout
    }

    fn shards(&self) -> u64 {
        match &self.cut {
            Cut::Every(samples) => self.images.div_ceil(*samples),
            Cut::At(starts) => starts.len() as u64,
        }
    }

    /// The shards of a part: neighbours, so that each machine's names are a range.
    fn part(&self, part: Part) -> std::ops::Range<u64> {
        let edge = |number: u32| {
            // At most `shards`, so it fits.
            (u128::from(self.shards()) * u128::from(number) / u128::from(part.of)) as u64
        };
        edge(part.number - 1)..edge(part.number)
    }

    /// Positions of a shard's images in the order.
    fn shard(&self, shard: u64) -> std::ops::Range<u64> {
        match &self.cut {
            Cut::Every(samples) => {
                shard * samples..(shard + 1).saturating_mul(*samples).min(self.images)
            }
            Cut::At(starts) => {
                let at = shard as usize;
                starts[at]..starts.get(at + 1).copied().unwrap_or(self.images)
            }
        }
    }

    /// The image at a position of the order.
    fn entry(&self, position: u64) -> usize {
        self.shuffle.map_or(position, |shuffle| shuffle.at(position)) as usize
    }
}

fn write_shards(
    job: &Job,
    source: &Source,
    layout: &Layout,
    mine: std::ops::Range<u64>,
    state: &State,
    progress: &Progress,
) -> Result<Vec<Done>, PackError> {
    let count = usize::try_from(mine.end - mine.start).unwrap_or(usize::MAX);
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let results = Mutex::new(Vec::with_capacity(count));
    let work = Work { job, source, layout, state, progress, stop: &stop };
    let threads = job.workers.clamp(1, count.max(1));
    let started = side_by_side(threads, &stop, || {
        let mut buffer = Vec::new();
        let mut converter = Converter::default();
        while !stop.load(Ordering::Relaxed) {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= count {
                break;
            }
            let shard = mine.start + at as u64;
            let result = work.shard(shard, &mut buffer, &mut converter);
            stop.fetch_or(result.is_err(), Ordering::Relaxed);
            // A poisoned lock means that a sibling panicked; the scope passes that on.
            let mut all = results.lock().unwrap_or_else(|poison| poison.into_inner());
            all.push((shard, result));
        }
    });
    started.map_err(|source| PackError::Thread { source })?;
    let mut results = results.into_inner().unwrap_or_else(|poison| poison.into_inner());
    results.sort_by_key(|(shard, _)| *shard);
    let mut done = Vec::with_capacity(count);
    for (_, result) in results {
        // `None`: stopped because of a sibling's error, which is in the list too.
        done.extend(result?);
    }
    Ok(done)
}

struct Work<'a> {
    job: &'a Job,
    source: &'a Source,
    layout: &'a Layout,
    state: &'a State,
    progress: &'a Progress,
    stop: &'a AtomicBool,
}

impl Work<'_> {
    fn shard(
        &self,
        shard: u64,
        buffer: &mut Vec<u8>,
        converter: &mut Converter,
    ) -> Result<Option<Done>, PackError> {
        let positions = self.layout.shard(shard);
        let count = positions.end - positions.start;
        if let Some(done) = self.state.done(shard)? {
            self.progress.images.fetch_add(count, Ordering::Relaxed);
            self.progress.resumed.fetch_add(count, Ordering::Relaxed);
            return Ok(Some(done));
        }
        let mut writer = ShardWriter::create(&self.job.out, &shard_name(shard))?;
        let mut oddities = Oddities::new();
        let mut classes = BTreeMap::new();
        let mut skips = Vec::new();
        let mut member = String::new();
        for position in positions.clone() {
            if self.stop.load(Ordering::Relaxed) {
                writer.discard();
                return Ok(None);
            }
            let entry = &self.source.entries[self.layout.entry(position)];
            if position + 1 < positions.end {
                self.source.will_need(&self.source.entries[self.layout.entry(position + 1)]);
            }
            let stored = self.source.read(entry, buffer).and_then(|bytes| {
                let extension = name::extension(&entry.name);
                converter.convert(bytes, extension, &self.job.options, &mut oddities)
            });
            match stored {
                Ok(stored) => {
                    member.clear();
                    member.push_str(&self.source.key(entry));
                    let stem = member.len();
                    member.push_str(".jpg");
                    writer.append(&member, &stored)?;
                    if let Some(class) = entry.class() {
                        member.truncate(stem);
                        member.push_str(".cls");
                        writer.append(&member, class.to_string().as_bytes())?;
                        *classes.entry(class).or_default() += 1;
                    }
                }
                Err(reason) => {
                    let skip = Skip::new(&entry.name, &reason);
                    // That the source shrank is no image's fault: `close` says so.
                    let own = self.source.check().is_ok();
                    if own && self.job.options.on_error == OnError::Fail {
                        writer.discard();
                        let (path, reason) = (skip.path, skip.reason);
                        return Err(PackError::FileMeanwhile { path, reason });
                    }
                    skips.push(skip);
                }
            }
            self.progress.images.fetch_add(1, Ordering::Relaxed);
            self.progress.bytes.fetch_add(entry.size, Ordering::Relaxed);
        }
        self.close(shard, writer, Done { record: None, oddities, classes, skips })
    }

    /// Renames a shard to its final name, unless it is empty or its source has changed.
    fn close(
        &self,
        shard: u64,
        writer: ShardWriter,
        mut done: Done,
    ) -> Result<Option<Done>, PackError> {
        if let Err(changed) = self.source.check() {
            // Zeros stand where the source was: nothing of this shard is to be believed.
            writer.discard();
            return Err(changed.into());
        }
        if writer.samples() == 0 {
            writer.discard();
            self.state.record(shard, &done)?;
            return Ok(Some(done));
        }
        let written = writer.finish()?;
        done.record = Some(written.record.clone());
        // First the record, then the names: a shard that has its name has its record.
        self.state.record(shard, &done)?;
        written.seal()?;
        Ok(Some(done))
    }
}

/// `000000.tar`.
fn shard_name(shard: u64) -> String {
    format!("{shard:06}.tar")
}

fn finish(
    job: &Job,
    source: &Source,
    plan: &Plan,
    state: &State,
    done: Vec<Done>,
) -> Result<Summary, PackError> {
    let mut oddities = Oddities::new();
    let mut class_samples = vec![0; source.classes.len()];
    let mut shards = Vec::with_capacity(done.len());
    // What the listing left out belongs to no shard: the first part tells of it.
    let mut skips = if job.part.number == 1 { source.skips.clone() } else { Vec::new() };
    let images = done.len();
    for one in done {
        for (name, count) in one.oddities {
            *oddities.entry(name).or_default() += count;
        }
        for (class, count) in one.classes {
            // A class number comes from the list of this very source.
            class_samples[class as usize] += count;
        }
        skips.extend(one.skips);
        shards.extend(one.record);
    }
    if shards.is_empty() && images > 0 {
        return Err(PackError::AllSkipped { from: job.source.clone(), images: plan.images });
    }
    let manifest = Manifest {
        format: FORMAT,
        samples: shards.iter().map(|shard| shard.samples).sum(),
        bytes: shards.iter().map(|shard| shard.bytes).sum(),
        members_per_sample: if source.classes.is_empty() { 1 } else { 2 },
        part: job.part,
        source_sha256: plan.source_sha256.clone(),
        options: plan.options.clone(),
        classes: source.classes.clone(),
        class_samples,
        oddities,
        skipped: skips.len() as u64,
        shards,
    };
    if !skips.is_empty() {
        let mut lines = Vec::new();
        let path = job.out.join(job.part.file_name("skipped", "jsonl"));
        for skip in &skips {
            serde_json::to_writer(&mut lines, skip)
                .map_err(|source| PackError::State { path: path.clone(), source })?;
            lines.push(b'\n');
        }
        write_atomically(&path, &lines).map_err(ShardError::from)?;
    }
    let path = manifest.write(&job.out)?;
    state.remove()?;
    Ok(summary(&manifest, path, faults(&skips)))
}

fn faults(skips: &[Skip]) -> u64 {
    skips.iter().filter(|skip| skip.fault).count() as u64
}

fn summary(manifest: &Manifest, path: PathBuf, faults: u64) -> Summary {
    Summary {
        samples: manifest.samples,
        shards: manifest.shards.len() as u64,
        bytes: manifest.bytes,
        classes: manifest.classes.len() as u64,
        skipped: manifest.skipped,
        faults,
        oddities: manifest.oddities.clone(),
        manifest: path,
    }
}

/// Locks a file for the life of the handle, or says that another process has it.
fn lock(path: &Path, out: &Path) -> Result<File, PackError> {
    let file = File::create(path).map_err(ShardError::io(path, "create"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(PackError::Busy { out: out.to_path_buf() }),
        // A file system without locks: two runs into one folder are then the user's to avoid.
        Err(std::fs::TryLockError::Error(error))
            if error.kind() == std::io::ErrorKind::Unsupported
                || error.raw_os_error() == Some(libc::ENOLCK) =>
        {
            Ok(file)
        }
        Err(std::fs::TryLockError::Error(error)) => Err(ShardError::io(path, "lock")(error).into()),
    }
}
