//! Opened shards: from sample ids to slices of the map.
//!
//! A [`ShardSet`] numbers the samples of many shards from 0, in the order of the shards, and lends
//! each as slices of mapped memory. It copies no image, keeps about fifty bytes per sample, and writes
//! nothing but the cache of remote shards.

mod braces;
mod local;
mod overlap;
pub mod remote;
mod sample;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use self::sample::Lease;
pub use self::sample::Sample;
use crate::format::index::{Entry, Span, Table, member_in_place};
use crate::format::manifest::Manifest;
use crate::format::map::Map;
use crate::format::{Blame, RemoteFault, SampleFault, ShardError, SpecFault};
use remote::{PinnedShard, Prefetcher, Remote, RemoteOptions, RemoteSnapshot};

/// A set of opened shards. Share it in an `Arc`; reading needs no lock.
#[derive(Debug)]
pub struct ShardSet {
    shards: Vec<Shard>,
    samples: u64,
    classes: Vec<String>,
    /// The error if parts of the set number their classes differently.
    clash: Option<SpecFault>,
    fingerprint: u64,
    remote: Option<Remote>,
}

/// The result of opening; `digests` has an entry for each shard.
struct Opened {
    shards: Vec<Shard>,
    classes: Vec<String>,
    clash: Option<SpecFault>,
    digests: Vec<Option<String>>,
    remote: Option<Remote>,
}

/// One shard of a set.
#[derive(Debug)]
pub struct Shard {
    source: Source,
    table: Table,
    first: u64,
    /// For a table from an index, which is checked against the shard when a sample is read: the file that is
    /// wrong if they disagree.
    indexed: Option<Blame>,
}

/// The source of a shard's bytes.
#[derive(Debug)]
enum Source {
    /// A local file, mapped as long as the set lives.
    Local(Map),
    /// A remote object, fetched, and mapped while it is read.
    Remote {
        /// The URL for messages, without secrets.
        url: PathBuf,
        /// Its file name.
        name: String,
        bytes: u64,
        prefetcher: Arc<Prefetcher>,
        /// Its number in the prefetcher.
        number: u32,
    },
}

impl ShardSet {
    /// Opens shards named by folders (all `.tar` in them), `.tar` files, globs (`train-*.tar`) and
    /// brace lists (`train-{000000..000012}.tar`). Folders and globs are sorted by name; the order
    /// of `spec` is kept.
    ///
    /// As [`ShardSet::open_with`], which takes URLs too.
    ///
    /// A shard with a `.idx` beside it is not walked. Shards with a `manifest.json` beside them are
    /// held against it.
    ///
    /// # Errors
    ///
    /// Nothing there, a broken shard, a stale index, a manifest that does not fit, a sample without
    /// an image or bad in another way ([`ShardSet::first_bad`]): each names the file and the place.
    pub fn open(spec: &[String]) -> Result<ShardSet, ShardError> {
        let set = ShardSet::open_with(spec, None)?;
        set.first_bad().map_or(Ok(set), Err)
    }

    /// Opens shards on a local file system, as [`ShardSet::open`] does, or behind URLs
    /// (`s3://`, `gs://`, `az://`, `http://`, `https://`): of a folder with a manifest, of a folder
    /// that the store lists, or of single tars and brace lists of them. `remote` says how those are
    /// reached and where they are kept; no shard with an index is fetched before it is read.
    ///
    /// Samples that cannot be used are part of the set: reading one is an error, which is for the
    /// caller's policy to judge. See [`ShardSet::first_bad`].
    ///
    /// # Errors
    ///
    /// As [`ShardSet::open`]; a store that cannot be reached, refuses, or has something else than
    /// its manifest says; URLs without `remote`, or beside files.
    pub fn open_with(
        spec: &[String],
        remote: Option<&RemoteOptions>,
    ) -> Result<ShardSet, ShardError> {
        let urls = spec.iter().filter(|word| remote::is_url(word)).count();
        let notice = remote.and_then(|options| options.notice);
        let Opened { mut shards, classes, clash, digests, remote } = match (urls, remote) {
            (0, _) => local::open(spec, notice)?,
            (_, None) => {
                return Err(ShardError::remote(&remote::shown_all(spec), RemoteFault::NoCache));
            }
            (_, Some(options)) if urls == spec.len() => remote::open(spec, options)?,
            _ => {
                let fault = SpecFault::Mixed;
                return Err(ShardError::Spec { spec: remote::shown_all(spec), fault });
            }
        };
        let mut samples = 0;
        let mut digest = Sha256::new();
        for (shard, recorded) in shards.iter_mut().zip(digests) {
            shard.first = samples;
            samples += shard.table.len() as u64;
            let name = shard.name();
            for number in [name.len() as u64, shard.bytes(), shard.table.len() as u64] {
                digest.update(number.to_le_bytes());
            }
            digest.update(name);
            digest.update(recorded.as_deref().unwrap_or(""));
        }
        if samples == 0 {
            let fault = SpecFault::NoSamples;
            return Err(ShardError::Spec { spec: remote::shown_all(spec), fault });
        }
        let mut fingerprint = [0; 8];
        fingerprint.copy_from_slice(&digest.finalize()[..8]);
        let fingerprint = u64::from_le_bytes(fingerprint);
        Ok(ShardSet { shards, samples, classes, clash, fingerprint, remote })
    }

    /// Number of samples, at least 1.
    #[expect(clippy::len_without_is_empty, reason = "a set is never empty")]
    pub fn len(&self) -> u64 {
        self.samples
    }

    /// A sample by number. Nothing is copied; the member's header is compared with the index.
    ///
    /// The image's bytes are foreign and may vanish: after reading them, and before using the result, call
    /// [`ShardSet::check`].
    ///
    /// # Errors
    ///
    /// No such sample, a stale index, or a shard that changed since it was opened. The class is not
    /// looked at: see [`Sample::class`].
    pub fn sample(&self, id: u64) -> Result<Sample<'_>, ShardError> {
        self.sample_until(id, &|| false)
    }

    /// As [`ShardSet::sample`], but the wait for a shard that is being fetched ends when `stop` says that it is no
    /// longer needed.
    ///
    /// # Errors
    ///
    /// As [`ShardSet::sample`], and when `stop` said so.
    pub fn sample_until(&self, id: u64, stop: &dyn Fn() -> bool) -> Result<Sample<'_>, ShardError> {
        let (shard, from, index, Entry { key, image, class }) = self.seek(id)?;
        if let Some(error) = from.bad(index) {
            return Err(error);
        }
        let map = from.lease(stop)?;
        let offset = image.offset;
        let image = from.span(&map, image);
        // First of all errors: it is what the others came from.
        map.check()?;
        let image = image.map_err(|error| map.check_file().err().unwrap_or(error))?;
        Ok(Sample { id, shard, index, key, offset, from, class, map, image })
    }

    /// Prepares a sample for reading and asks the system to read its bytes ahead. A remote shard is waited for,
    /// until `stop` says that it is no longer needed, and stays mapped as long as the returned pin lives.
    ///
    /// # Errors
    ///
    /// No such sample, or a shard that cannot be fetched.
    pub fn ready(
        &self,
        id: u64,
        stop: &dyn Fn() -> bool,
    ) -> Result<Option<Arc<PinnedShard>>, ShardError> {
        let (_, shard, _, entry) = self.seek(id)?;
        let map = shard.lease(stop)?;
        // From the header on: `sample` reads it.
        let start = entry.image.offset.saturating_sub(crate::format::tar::BLOCK);
        map.will_need(start, entry.image.offset + entry.image.size - start);
        Ok(match map {
            Lease::Lent(_) => None,
            Lease::Pinned(held) => Some(held),
        })
    }

    /// Checks that the bytes read of a sample were those of its shard. One atomic load.
    ///
    /// # Errors
    ///
    /// [`ShardError::Changed`]: the shard was shortened, and zeros were read instead.
    pub fn check(&self, sample: &Sample<'_>) -> Result<(), ShardError> {
        sample.map.check()
    }

    /// As [`ShardSet::check`], for a sample that failed to decode: also asks the file system.
    ///
    /// # Errors
    ///
    /// [`ShardError::Changed`]: the shard was shortened or written to since it was opened.
    pub fn check_file(&self, sample: &Sample<'_>) -> Result<(), ShardError> {
        sample.map.check_file()
    }

    /// The class number of a sample, without touching its image. `None` for one without a class.
    ///
    /// # Errors
    ///
    /// No such sample, or as [`Sample::class`].
    pub fn class(&self, id: u64) -> Result<Option<u32>, ShardError> {
        let (_, shard, _, entry) = self.seek(id)?;
        if entry.class.is_none() {
            return Ok(None);
        }
        shard.class(&*shard.lease(&|| false)?, entry.key, entry.class)
    }

    /// Number of samples that cannot be used, whatever their images hold: without an image, with two
    /// members of one name, and the like.
    pub fn bad_samples(&self) -> u64 {
        self.shards.iter().map(|shard| shard.table.bad().count() as u64).sum()
    }

    /// The error of the first of them.
    pub fn first_bad(&self) -> Option<ShardError> {
        self.shards.iter().find_map(|shard| shard.bad(shard.table.bad().next()?))
    }

    /// Checks that a class number means the same class in all of the set; to be called before classes are used.
    ///
    /// # Errors
    ///
    /// Manifests of the set list different classes ([`SpecFault::Classes`]).
    pub fn one_numbering(&self) -> Result<(), ShardError> {
        let Some(fault) = &self.clash else { return Ok(()) };
        let folders = self.shards.iter().filter_map(|shard| shard.path().parent());
        let folders: std::collections::BTreeSet<&Path> = folders.collect();
        let names: Vec<String> = folders.iter().map(|path| path.display().to_string()).collect();
        Err(ShardError::Spec { spec: names.join(" "), fault: fault.clone() })
    }

    /// Position in [`ShardSet::shards`] of the shard that holds a sample, for messages about samples
    /// that cannot be read; the last shard's for an unknown id.
    pub fn shard_of(&self, id: u64) -> usize {
        // At least 1: the first shard starts at 0.
        self.shards.partition_point(|shard| shard.first <= id) - 1
    }

    /// The size of a sample's image in bytes, without touching the shard. `None` for an unknown id, and
    /// for a sample without an image.
    pub fn image_size(&self, id: u64) -> Option<u64> {
        let (_, shard, index, entry) = self.find(id)?;
        shard.table.fault(index).is_none().then_some(entry.image.size)
    }

    /// Where a sample lies, without touching the shard: shard, key, byte offset of the image. `None`
    /// for an unknown id.
    pub fn place(&self, id: u64) -> Option<(&Path, &str, u64)> {
        let (_, shard, index, entry) = self.find(id)?;
        let offset = shard.table.fault(index).map_or(entry.image.offset, |(offset, _)| offset);
        Some((shard.path(), entry.key, offset))
    }

    /// Class names from the manifest; empty without one, when the images have no classes, or when
    /// several manifests list different ones ([`ShardSet::one_numbering`]).
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// A number that changes with the shards' names, sizes, sample counts and recorded digests, and
    /// not with the folder they lie in: a resumed run compares it.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// The shards, in order.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// Manifests of a set behind URLs, with theirs; those of local shards lie beside them.
    pub fn manifests(&self) -> &[(PathBuf, Manifest)] {
        self.remote.as_ref().map_or(&[], |remote| &remote.manifests)
    }

    /// Whether the shards lie behind URLs.
    pub fn is_remote(&self) -> bool {
        self.remote.is_some()
    }

    /// The counters of fetching; `None` for local shards.
    pub fn fetched(&self) -> Option<RemoteSnapshot> {
        self.remote.as_ref().map(|remote| remote.prefetcher.snapshot())
    }

    /// The bound of the cache in bytes; `None` for local shards.
    pub fn room(&self) -> Option<u64> {
        self.remote.as_ref().map(|remote| remote.prefetcher.room())
    }

    /// Sets the shards that will be read, in that order, by their positions in [`ShardSet::shards`]; the first
    /// `now` of them are being read from now on. Remote shards are fetched ahead; for local ones this does
    /// nothing.
    pub fn want(&self, shards: Vec<u32>, now: u32) {
        if let Some(remote) = &self.remote {
            remote.prefetcher.set_upcoming(shards, now);
        }
    }

    fn seek(&self, id: u64) -> Result<(usize, &Shard, usize, Entry<'_>), ShardError> {
        self.find(id).ok_or(ShardError::NoSuchSample { id, samples: self.samples })
    }

    fn find(&self, id: u64) -> Option<(usize, &Shard, usize, Entry<'_>)> {
        let position = self.shard_of(id);
        let shard = &self.shards[position];
        let index = usize::try_from(id - shard.first).ok()?;
        Some((position, shard, index, shard.table.get(index)?))
    }
}

impl Shard {
    /// Its path, or its URL without secrets.
    pub fn path(&self) -> &Path {
        match &self.source {
            Source::Local(map) => map.path(),
            Source::Remote { url, .. } => url,
        }
    }

    /// Its file name: of a URL the last part of the path, decoded.
    fn name(&self) -> &[u8] {
        match &self.source {
            Source::Local(map) => map.path().file_name().unwrap_or_default().as_encoded_bytes(),
            Source::Remote { name, .. } => name.as_bytes(),
        }
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        match &self.source {
            Source::Local(map) => map.bytes().len() as u64,
            Source::Remote { bytes, .. } => *bytes,
        }
    }

    /// Number of samples in it.
    pub fn samples(&self) -> u64 {
        self.table.len() as u64
    }

    /// Number of its first sample in the set.
    pub fn first(&self) -> u64 {
        self.first
    }

    /// The error of the sample at a position, if it cannot be used.
    fn bad(&self, position: usize) -> Option<ShardError> {
        let (offset, fault) = self.table.fault(position)?;
        let key = self.table.get(position)?.key.to_owned();
        let shard = self.path().to_path_buf();
        Some(ShardError::Sample { shard, key, offset, fault: fault.clone() })
    }

    fn lease(&self, stop: &dyn Fn() -> bool) -> Result<Lease<'_>, ShardError> {
        match &self.source {
            Source::Local(map) => Ok(Lease::Lent(map)),
            Source::Remote { prefetcher, number, .. } => {
                prefetcher.pin(*number, stop).map(Lease::Pinned)
            }
        }
    }

    fn span(&self, map: &Map, span: Span) -> Result<Range<usize>, ShardError> {
        if let Some(blame) = self.indexed {
            member_in_place(map, span).map_err(|error| error.blame(blame))?;
        }
        let range = usize::try_from(span.offset)
            .ok()
            .zip(span.offset.checked_add(span.size).and_then(|end| usize::try_from(end).ok()));
        let have = map.bytes().len();
        range.filter(|(_, end)| *end <= have).map(|(start, end)| start..end).ok_or_else(|| {
            let have = (have as u64).saturating_sub(span.offset);
            let fault = crate::format::TarFault::Truncated { need: span.size, have };
            ShardError::tar(self.path(), crate::format::TarError { offset: span.offset, fault })
        })
    }

    /// The class number in a member; an error of the file itself comes first.
    fn class(&self, map: &Map, key: &str, span: Option<Span>) -> Result<Option<u32>, ShardError> {
        let Some(span) = span else { return Ok(None) };
        let class = self.number(map, key, span);
        if class.is_err() {
            map.check_file()?
        } else {
            map.check()?
        }
        class.map(Some)
    }

    fn number(&self, map: &Map, key: &str, span: Span) -> Result<u32, ShardError> {
        let text = &map.bytes()[self.span(map, span)?];
        let number = crate::format::tar::decimal(text.trim_ascii());
        number.and_then(|number| u32::try_from(number).ok()).ok_or_else(|| ShardError::Sample {
            shard: self.path().to_path_buf(),
            key: key.to_owned(),
            offset: span.offset,
            fault: SampleFault::Class {
                text: String::from_utf8_lossy(&text[..text.len().min(40)]).trim().to_owned(),
            },
        })
    }
}
