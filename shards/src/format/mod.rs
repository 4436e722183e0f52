//! The shard format, byte by byte: tar members, the index beside them, the manifest over them.
//!
//! A shard is a WebDataset tar. Its bytes are treated as foreign: sizes and offsets are checked once, when they
//! are read, with arithmetic that cannot wrap, and errors are [`ShardError`]s that name the file and the
//! place. Nothing here decodes an image.
//!
//! `shards/README.md` describes the format for people who write their own reader.

mod faults;
pub mod index;
pub mod manifest;
pub mod map;
pub(crate) mod members;
pub(crate) mod name;
mod remote;
mod sigbus;
pub mod tar;
pub mod unpacked;
pub mod verify;
pub mod writer;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;

use crate::files::FileError;
use crate::limits;

use self::manifest::ShardRecord;

pub use self::faults::{ChangeFault, SampleFault, SpecFault, StaleFault};
pub use self::index::IndexFault;
pub use self::manifest::ManifestFault;
pub use self::remote::{Cause, RemoteFault};
pub use self::tar::{TarError, TarFault};
pub use self::unpacked::MemberFault;

/// Errors of shards, indexes and manifests.
#[derive(Debug, Error)]
pub enum ShardError {
    /// The operating system refused.
    #[error("cannot {action} {}{}", path.display(), limits::of_file(action, source))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried, to be read after "cannot".
        action: &'static str,
        /// Why it was refused.
        source: std::io::Error,
    },
    /// The shard is not a well-formed tar.
    #[error("{}: offset {}: {}", shard.display(), error.offset, error.fault)]
    Tar {
        /// The shard.
        shard: PathBuf,
        /// The fault and its place.
        error: TarError,
    },
    /// The index cannot be read.
    #[error("{}: line {line}: {fault}; delete this index, and the shard is walked, or write it anew",
        index.display())]
    Index {
        /// The index file.
        index: PathBuf,
        /// Line, counted from 1.
        line: u64,
        /// What is wrong with the line.
        fault: IndexFault,
    },
    /// Shard and index disagree, and it is unknown which is wrong.
    #[error("{}: shard damaged or index stale, {} does not describe it: {fault}; `detco verify` on \
             the folder tells: if it finds no fault in the tar, delete the index or write it anew",
        shard.display(), index.display())]
    Disagree {
        /// The index file.
        index: PathBuf,
        /// The shard it should describe.
        shard: PathBuf,
        /// How the two differ.
        fault: StaleFault,
    },
    /// Shard and index disagree, and the index is right by the manifest.
    #[error("{}: shard damaged, its index is as the manifest has it: {fault}; `detco verify` on the \
             folder names all damage", shard.display())]
    Damaged {
        /// The shard.
        shard: PathBuf,
        /// The difference.
        fault: StaleFault,
    },
    /// The index does not describe the shard beside it: the shard was walked to its end, or the
    /// manifest has the checksum of another index.
    #[error("{}: stale index, it does not describe {}: {fault}; delete it or write it anew",
        index.display(), shard.display())]
    StaleIndex {
        /// The index file.
        index: PathBuf,
        /// The shard it should describe.
        shard: PathBuf,
        /// How the two differ.
        fault: StaleFault,
    },
    /// The manifest cannot be read, or does not add up.
    #[error("{}: {fault}", manifest.display())]
    Manifest {
        /// The manifest file.
        manifest: PathBuf,
        /// What is wrong.
        fault: ManifestFault,
    },
    /// A file changed since it was opened, so what was read of it is invalid.
    #[error("{}: changed while it was being read: {fault}", shard.display())]
    Changed {
        /// The file.
        shard: PathBuf,
        /// What happened to it.
        fault: ChangeFault,
    },
    /// A sample cannot be used.
    #[error("{}: sample `{key}` at offset {offset}: {fault}", shard.display())]
    Sample {
        /// The shard.
        shard: PathBuf,
        /// The sample's key.
        key: String,
        /// Offset of the first byte of the member in question.
        offset: u64,
        /// What is wrong.
        fault: SampleFault,
    },
    /// The user's argument names no usable set of shards.
    #[error("data `{spec}`: {fault}")]
    Spec {
        /// As the user wrote it.
        spec: String,
        /// What is wrong.
        fault: SpecFault,
    },
    /// A remote shard cannot be fetched.
    #[error("{url}: {fault}")]
    Remote {
        /// Where it lies.
        url: String,
        /// What is wrong.
        #[source]
        fault: Box<RemoteFault>,
    },
    /// The system refused to start a thread.
    #[error("cannot start a thread: {source}{}", crate::limits::of_threads(source))]
    Thread {
        /// Its words.
        source: std::io::Error,
    },
    /// An error shared by several readers of one shard.
    #[error("{0}")]
    Shared(#[source] Arc<ShardError>),
    /// A sample id outside the set.
    #[error("sample {id} does not exist: the shards hold {samples}")]
    NoSuchSample {
        /// The id asked for.
        id: u64,
        /// Samples in the set.
        samples: u64,
    },
    /// The file exists already; sealed files are never overwritten.
    #[error("{} already exists and is never overwritten", path.display())]
    Sealed {
        /// The file.
        path: PathBuf,
    },
    /// A member that does not fit the tar format.
    #[error(
        "member `{name}` of {bytes} bytes does not fit a ustar header (at most {} bytes)",
        tar::SIZE_MAX
    )]
    MemberTooLarge {
        /// Name of the member.
        name: String,
        /// Its size in bytes.
        bytes: u64,
    },
    /// A name that is not allowed in a shard.
    #[error("member name `{name}` is empty or holds white space or control characters")]
    MemberName {
        /// The name.
        name: String,
    },
}

impl From<FileError> for ShardError {
    fn from(FileError { path, action, source }: FileError) -> ShardError {
        ShardError::Io { path, action, source }
    }
}

impl ShardError {
    pub(crate) fn io(
        path: &Path,
        action: &'static str,
    ) -> impl FnOnce(std::io::Error) -> ShardError + use<> {
        let path = path.to_path_buf();
        move |source| ShardError::Io { path, action, source }
    }

    /// The fault of a remote shard, if this is one.
    pub fn remote_fault(&self) -> Option<&RemoteFault> {
        match self {
            ShardError::Remote { fault, .. } => Some(fault),
            ShardError::Shared(shared) => shared.remote_fault(),
            _ => None,
        }
    }

    pub(crate) fn remote(url: &str, fault: RemoteFault) -> ShardError {
        ShardError::Remote { url: url.to_owned(), fault: Box::new(fault) }
    }

    /// Whether a shard could not be fetched because its store did not answer: trying later may help.
    pub fn is_unreachable(&self) -> bool {
        match self {
            ShardError::Remote { fault, .. } => matches!(**fault, RemoteFault::Failed { .. }),
            ShardError::Shared(error) => error.is_unreachable(),
            _ => false,
        }
    }

    /// Whether a shard cannot be fetched, which says nothing about its samples. Bytes that arrived and differ
    /// from the manifest are damage, as in a file, and are not meant.
    pub fn is_lost(&self) -> bool {
        match self {
            ShardError::Remote { fault, .. } => !fault.is_damage(),
            ShardError::Shared(error) => error.is_lost(),
            _ => false,
        }
    }

    /// For an error of disagreement between index and shard: says which of them is wrong, if known.
    pub(crate) fn blame(self, blame: Blame) -> ShardError {
        match (self, blame) {
            (ShardError::Disagree { shard, fault, .. }, Blame::Shard) => {
                ShardError::Damaged { shard, fault }
            }
            (ShardError::Disagree { index, shard, fault }, Blame::Index) => {
                ShardError::StaleIndex { index, shard, fault }
            }
            (other, _) => other,
        }
    }

    pub(crate) fn tar(shard: &Path, error: TarError) -> ShardError {
        ShardError::Tar { shard: shard.to_path_buf(), error }
    }
}

/// Which file is wrong when an index and its shard disagree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Blame {
    /// Unknown: there is no manifest.
    Either,
    /// The shard: the manifest has the checksum of the index.
    Shard,
    /// The index: the manifest has the checksum of another one.
    Index,
}

impl Blame {
    /// Decides by the index's text and its checksum in the manifest.
    pub(crate) fn of(text: &[u8], record: Option<&ShardRecord>) -> Blame {
        let sum = || format!("{:08x}", crc32c::crc32c(text));
        match record {
            None => Blame::Either,
            Some(record) if record.index_crc32c == sum() => Blame::Shard,
            Some(_) => Blame::Index,
        }
    }
}
