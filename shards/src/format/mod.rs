//! The shard format, byte by byte: tar members, the index beside them, the manifest over them.
//!
//! A shard is a WebDataset tar. Its bytes are treated as foreign: sizes and offsets are checked once, when they
//! are read, with arithmetic that cannot wrap, and errors are [`ShardError`]s that name the file and the
//! place. Nothing here decodes an image.
//!
//! `shards/README.md` describes the format for people who write their own reader.

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

/// How an index and its shard differ.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum StaleFault {
    /// A member lies outside the shard.
    #[error("line {line} names bytes {offset} to {end}, the shard has {bytes}")]
    Outside {
        /// Line of the index, counted from 1.
        line: u64,
        /// First byte of the member.
        offset: u64,
        /// One past its last byte.
        end: u64,
        /// Size of the shard.
        bytes: u64,
    },
    /// No header where a member's header must be.
    #[error("no header of a member before offset {offset}: {fault}")]
    Header {
        /// First byte of the member according to the index.
        offset: u64,
        /// What stands there instead.
        fault: TarFault,
    },
    /// Sizes differ.
    #[error(
        "the member at offset {offset} has {indexed} bytes by the index, {actual} by the shard"
    )]
    Size {
        /// First byte of the member.
        offset: u64,
        /// Size in the index.
        indexed: u64,
        /// Size in the shard.
        actual: u64,
    },
    /// A member of the shard is missing in the index.
    #[error("member `{name}` at offset {offset} is not in the index")]
    Unindexed {
        /// Name of the member.
        name: String,
        /// First byte of the member.
        offset: u64,
    },
    /// The texts differ although nothing above did.
    #[error("line {line} differs from what the shard holds")]
    Line {
        /// Line of the index, counted from 1.
        line: u64,
    },
}

/// The change of a file after it was opened.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ChangeFault {
    /// It became shorter or longer.
    #[error("it had {mapped} bytes when it was opened and has {now} now")]
    Size {
        /// Bytes when it was opened.
        mapped: u64,
        /// Bytes now.
        now: u64,
    },
    /// It was written to.
    #[error("it was written to after it was opened")]
    Written,
    /// Bytes were missing when they were needed.
    #[error("some of its bytes could not be read: it was shortened, or a disk or server failed")]
    Unreadable,
}

/// Why a sample cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SampleFault {
    /// No member holds an image.
    #[error("no image: none of its members is a .jpg, .jpeg or .png")]
    NoImage,
    /// An image in a format that training does not read; `detco pack` may.
    #[error(
        "no image: none of its members is a .jpg, .jpeg or .png, but one is a .{extension}: \
         `detco pack` on the folder of tars makes JPEGs of WebP and BMP"
    )]
    OtherFormat {
        /// Its extension.
        extension: String,
    },
    /// Several images, none with a plain extension: their names contain dots.
    #[error(
        "no image: none of its members is a .jpg, .jpeg or .png, since a key ends at the first dot of \
         a name: `{key}.{extension}` was split into the key `{key}` and the extension `{extension}`, \
         and {pictures} pictures share this key; `detco pack THE.tar OUT` gives each a key of its own"
    )]
    Dots {
        /// The key.
        key: String,
        /// What follows it in the name of the first picture.
        extension: String,
        /// Pictures with this key.
        pictures: u64,
    },
    /// An image or label that is a link.
    #[error(
        "its member `{name}` is a link to `{target}`, which has no bytes of its own in a shard: \
         `detco pack THE.tar OUT` makes a file of it"
    )]
    Link {
        /// The member's name.
        name: String,
        /// Where it points.
        target: String,
    },
    /// Two members with one name.
    #[error("two members with the extension .{extension}")]
    DuplicateMember {
        /// The extension they share, lower case.
        extension: String,
    },
    /// The class member is not a number. Only reading the class gives this error.
    #[error("the .cls member holds `{text}`, a class number was expected")]
    Class {
        /// Its content, shortened.
        text: String,
    },
    /// A number that is too large for the tables.
    #[error("{what} is {value}, at most {limit} is possible")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The largest possible.
        limit: u64,
    },
    /// A name that is not UTF-8.
    #[error("its name is not UTF-8")]
    Name,
    /// Members overlap or run backwards.
    #[error("it starts before the member in front of it ends, at {end}")]
    Overlap {
        /// Where the member in front ends, its padding included.
        end: u64,
    },
}

/// Why a data argument names no shards.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SpecFault {
    /// It does not exist.
    #[error("no such file or folder")]
    Missing,
    /// A folder without shards.
    #[error("no .tar in this folder")]
    Empty,
    /// A folder of files that data sets come in and that are no shards.
    #[error("no .tar in this folder, but `{name}`, {kind}")]
    Others {
        /// One of them.
        name: String,
        /// What such files are and what to do with them.
        kind: &'static str,
    },
    /// A folder of images that nobody has packed.
    #[error("no .tar in this folder, but images: pack it first: `detco pack {} OUT`", .folder.display())]
    Images {
        /// The folder.
        folder: PathBuf,
    },
    /// One shard where all of a folder were expected.
    #[error("not a folder: its whole folder is verified, {}", .folder.display())]
    NotFolder {
        /// Where it lies.
        folder: PathBuf,
    },
    /// A pattern that no file matches.
    #[error("no file matches")]
    NoMatch,
    /// An invalid pattern.
    #[error("not a pattern: {reason}")]
    Pattern {
        /// What is wrong with it.
        reason: String,
    },
    /// The same shard twice.
    #[error("{} is named twice", .shard.display())]
    Twice {
        /// The shard.
        shard: PathBuf,
    },
    /// Manifests that disagree on the classes.
    #[error("{} and {} list different classes", .one.display(), .other.display())]
    Classes {
        /// A manifest.
        one: PathBuf,
        /// Another.
        other: PathBuf,
    },
    /// A shard that is not in the manifest beside it.
    #[error("{} is not in the manifest beside it", .shard.display())]
    Unlisted {
        /// The shard.
        shard: PathBuf,
    },
    /// A shard of the manifest is missing.
    #[error("{} is in the manifest but not in the folder", .shard.display())]
    Lost {
        /// The shard.
        shard: PathBuf,
    },
    /// A data set packed in parts, of which some are missing.
    #[error("packed as {of} parts, part {missing} is missing")]
    Part {
        /// The first part that is not there, from 1.
        missing: u32,
        /// Number of parts.
        of: u32,
    },
    /// Parts of different packings.
    #[error("{} and {} are parts of different totals: pack into another folder",
        .one.display(), .other.display())]
    Totals {
        /// A manifest.
        one: PathBuf,
        /// Another.
        other: PathBuf,
    },
    /// Packing is under way or was interrupted.
    #[error("packing has not finished: go on with `detco pack --resume`")]
    Unfinished,
    /// No samples at all.
    #[error("the shards hold no samples")]
    NoSamples,
    /// URLs and files.
    #[error("URLs and files cannot be mixed in one data set")]
    Mixed,
}
