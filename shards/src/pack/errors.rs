//! Errors of packing: why a file is left out, and why a run stops.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{LabelFault, key};
use crate::decode::DecodeError;
use crate::format::manifest::Part;
use crate::format::{MemberFault, ShardError, TarError};

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
    pub(super) fn new(name: &[u8], reason: &SkipReason) -> Skip {
        Skip { path: key::readable(name), reason: reason.to_string(), fault: reason.is_fault() }
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

impl SkipReason {
    /// Whether `--on-error` decides about it.
    pub(super) fn is_fault(&self) -> bool {
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
    pub(super) fn name_full_disk(self) -> PackError {
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
