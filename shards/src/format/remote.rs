//! Error types for remote shards, which `stream::remote` fetches.

use std::error::Error;
use std::path::PathBuf;

use thiserror::Error;

/// An error of the store, the network or the system.
pub type Cause = Box<dyn Error + Send + Sync>;

/// An error of a URL, of the object there, or of fetching it.
#[derive(Debug, Error)]
pub enum RemoteFault {
    /// Not a URL that shards can be fetched from.
    #[error("not a URL of shards: {reason}")]
    Url {
        /// The reason.
        reason: String,
    },
    /// The store is not configured correctly.
    #[error("the store cannot be used: {0}")]
    Store(#[source] Cause),
    /// The object does not exist.
    #[error("there is no such object")]
    Missing,
    /// The server requires credentials or denies access.
    #[error("access is refused with {answer}: {advice}")]
    Denied {
        /// The status, and the store's own word for the reason where it has one.
        answer: String,
        /// Possible causes, and where credentials are taken from.
        advice: String,
    },
    /// The server refuses the request for good.
    #[error("the server answers {answer}")]
    Refused {
        /// The status, and the store's own word for the reason where it has one.
        answer: String,
    },
    /// Text in place of a shard: an error page, a login, a site's front page.
    #[error("the server sent {what} where a shard was expected, beginning with `{begins}`")]
    Page {
        /// What it looks like.
        what: &'static str,
        /// How it begins.
        begins: String,
    },
    /// Compressed in transit in a way that this program does not decompress.
    #[error(
        "the server sends it compressed (Content-Encoding: {encoding}) although it was asked not to"
    )]
    Encoding {
        /// The encoding.
        encoding: String,
    },
    /// A manifest or an index that is too large to be one.
    #[error("it has more than {limit} bytes: no manifest or index has so many")]
    TooLarge {
        /// The limit in bytes.
        limit: u64,
    },
    /// The object changed while it was being fetched.
    #[error("the object was replaced while it was being fetched: start again")]
    Replaced,
    /// All attempts failed.
    #[error("cannot {action}: at byte {offset}, after {attempts} attempts: {source}")]
    Failed {
        /// What was tried, to be read after "cannot".
        action: &'static str,
        /// Bytes received.
        offset: u64,
        /// Attempts since the last progress.
        attempts: u32,
        /// The error of the last attempt.
        source: Cause,
    },
    /// An object of another size than its manifest says.
    #[error("the object has {bytes} bytes, {recorded} are recorded")]
    Size {
        /// Its size.
        bytes: u64,
        /// The size that was expected.
        recorded: u64,
    },
    /// The shard's digest is not the manifest's.
    #[error("its SHA-256 is {found}, the manifest says {recorded} (fetched {tries} times)")]
    Digest {
        /// Of what came.
        found: String,
        /// By the manifest.
        recorded: String,
        /// Number of times it was fetched.
        tries: u32,
    },
    /// The index's checksum is not the manifest's.
    #[error("its CRC-32C is {found}, the manifest says {recorded}")]
    IndexDigest {
        /// Of what came.
        found: String,
        /// By the manifest.
        recorded: String,
    },
    /// A folder without a manifest that the store does not list.
    #[error(
        "no manifest.json there, and this store lists no files: name the shards, as in \
         `{{000000..000012}}.tar`"
    )]
    NotListed,
    /// The cache is full of shards in use.
    #[error(
        "no room for its {bytes} bytes: {kept} of the cache's {bound} bytes are in use, by this or \
         other processes (data.cache_size, data.window)"
    )]
    NoRoom {
        /// Bytes of the shard.
        bytes: u64,
        /// Bytes that could not be evicted.
        kept: u64,
        /// The cache's bound.
        bound: u64,
    },
    /// The disk is full before the cache reaches its bound.
    #[error(
        "the disk under {} has no more room, before the cache reached its bound: lower \
         data.cache_size: {source}", folder.display()
    )]
    DiskFull {
        /// The cache's folder.
        folder: PathBuf,
        /// What the system said.
        source: Cause,
    },
    /// No cache is configured.
    #[error("this command does not support remote shards: no cache is configured")]
    NoCache,
    /// The loader was closed while a reader waited.
    #[error("download cancelled: the loader was closed")]
    Closed,
}

impl RemoteFault {
    /// Whether the object arrived completely and is not the one that was packed.
    pub(crate) fn is_damage(&self) -> bool {
        matches!(
            self,
            RemoteFault::Size { .. } | RemoteFault::Digest { .. } | RemoteFault::IndexDigest { .. }
        )
    }
}
