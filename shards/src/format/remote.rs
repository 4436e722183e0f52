//! What can be wrong with shards that lie elsewhere. Only the words; `stream::remote` fetches.

use std::error::Error;
use std::path::PathBuf;

use thiserror::Error;

/// Whatever the store, the network or the system said.
pub type Cause = Box<dyn Error + Send + Sync>;

/// What is wrong with a URL, what lies there, or how it was fetched.
#[derive(Debug, Error)]
pub enum RemoteFault {
    /// Not a URL that shards can be fetched from.
    #[error("not a URL of shards: {reason}")]
    Url {
        /// What is wrong with it.
        reason: String,
    },
    /// The store cannot be used as it is configured.
    #[error("the store cannot be used: {0}")]
    Store(#[source] Cause),
    /// Nothing there.
    #[error("there is no such object")]
    Missing,
    /// The server wants to know who asks, or does not give the object to whoever asked.
    #[error("access is refused with {answer}: {advice}")]
    Denied {
        /// The status, and the store's own word for the reason where it has one.
        answer: String,
        /// What it may come from, and where credentials are taken from.
        advice: String,
    },
    /// The server does not answer such a request, however often it is asked.
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
    /// Compressed on the way by something that this program does not decompress.
    #[error(
        "the server sends it compressed (Content-Encoding: {encoding}) although it was asked not to"
    )]
    Encoding {
        /// How.
        encoding: String,
    },
    /// A manifest or an index that is none by its size.
    #[error("it has more than {limit} bytes: no manifest or index has so many")]
    TooLarge {
        /// Bytes that it may have.
        limit: u64,
    },
    /// It became another object while it was being fetched.
    #[error("the object was replaced while it was being fetched: start again")]
    Replaced,
    /// Tried often enough.
    #[error("cannot {action}: at byte {offset}, after {attempts} attempts: {source}")]
    Failed {
        /// What was tried, to be read after "cannot".
        action: &'static str,
        /// Bytes that had come.
        offset: u64,
        /// How often it was tried since the last progress.
        attempts: u32,
        /// What the last attempt met.
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
    /// Bytes that are not those that were packed.
    #[error("its SHA-256 is {found}, the manifest says {recorded} (fetched {tries} times)")]
    Digest {
        /// Of what came.
        found: String,
        /// By the manifest.
        recorded: String,
        /// How often it was fetched.
        tries: u32,
    },
    /// An index that is not the one that was packed.
    #[error("its CRC-32C is {found}, the manifest says {recorded}")]
    IndexDigest {
        /// Of what came.
        found: String,
        /// By the manifest.
        recorded: String,
    },
    /// A folder of which nobody says what is in it.
    #[error(
        "no manifest.json there, and this store lists no files: name the shards, as in \
         `{{000000..000012}}.tar`"
    )]
    NotListed,
    /// Shards in use take up the cache.
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
    /// The disk has less room than the cache was promised.
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
    /// Nobody said where to keep what is fetched.
    #[error("remote shards need a cache, which this command has not")]
    NoCache,
    /// The process is ending.
    #[error("no longer needed")]
    Closed,
}

impl RemoteFault {
    /// Whether all came and is not what was packed.
    pub(crate) fn is_damage(&self) -> bool {
        matches!(
            self,
            RemoteFault::Size { .. } | RemoteFault::Digest { .. } | RemoteFault::IndexDigest { .. }
        )
    }
}
