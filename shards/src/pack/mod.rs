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
mod errors;
mod key;
mod layout;
mod options;
mod scan;
mod shuffle;
mod source;
mod state;
mod write;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

pub use self::classes::{LabelFault, class_names};
use self::convert::Oddities;
pub use self::convert::{Resize, TRANSCODE_QUALITY};
pub use self::errors::{PackError, Skip, SkipReason};
use self::layout::Layout;
pub use self::options::{OnError, Options, ShardSize};
use self::source::Source;
use self::state::{Done, Plan, State};
use self::write::write_shards;
use crate::files::write_atomically;
use crate::format::ShardError;
use crate::format::manifest::{FORMAT, Manifest, Part};

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
