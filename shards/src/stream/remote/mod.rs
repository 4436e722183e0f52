//! Shards behind URLs: finds and opens what the user named, without fetching a shard.
//!
//! For a data set that `detco pack` wrote, the manifest and the indexes are fetched first: they give the
//! number of samples and the place of each. Without a manifest, sizes come from the store and no digest is
//! compared. Without an index the shard itself is fetched and walked once, since an order needs the number
//! of samples, and the list of its files stays in the cache. Another program's manifest or index, or a web
//! page in its place, counts as missing and is reported once.

mod address;
mod credentials;
mod feed;
mod fetch;
mod http;
mod opener;
mod prefetch;
mod secrets;
mod store;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use self::address::Address;
pub(crate) use self::address::shown_all;
pub use self::address::{is_url, shown};
pub use self::fetch::{AFTER_MAX, PAUSE_MAX, Patience};
use self::opener::{Job, Named, Once, Opener, addresses, index_name, records};
use self::prefetch::Item;
pub(crate) use self::prefetch::Prefetcher;
pub use self::prefetch::{PinnedShard, RemoteSnapshot};
use self::store::{Web, no_thread};
use super::overlap::{self, Overlap};
use super::{Opened, Shard, Source};
use crate::cache::Cache;
use crate::format::index::Table;
use crate::format::manifest::{Manifest, ShardRecord};
use crate::format::verify::{self, Report};
use crate::format::{Blame, ShardError};
use crate::pipe::Pool;

/// Options for shards behind URLs.
#[derive(Clone)]
pub struct RemoteOptions {
    /// Folder of the cache; processes of one machine may share it.
    pub cache: PathBuf,
    /// Its bound in bytes.
    pub cache_bytes: u64,
    /// The variables that stores are configured by, with their values: `AWS_*`, `GOOGLE_*`, `AZURE_*`;
    /// for HTTP `DETCO_HTTP_AUTHORIZATION`, `DETCO_HTTP_TOKEN`, `DETCO_HTTP_HOSTS`, `HF_TOKEN`,
    /// `HUGGING_FACE_HUB_TOKEN`, `HF_ENDPOINT`, and `NETRC` or `HOME`, where `.netrc` lies.
    pub environment: Vec<(String, String)>,
    /// Shards fetched at a time, at least 1.
    pub fetches: usize,
    /// Patience with stores that do not answer.
    pub patience: Patience,
    /// A callback for sentences to the user: why opening takes long, and that a shard does not come.
    pub notice: Option<fn(&str)>,
}

impl fmt::Debug for RemoteOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Variables hold secrets.
        let variables: Vec<&String> = self.environment.iter().map(|(name, _)| name).collect();
        f.debug_struct("RemoteOptions")
            .field("cache", &self.cache)
            .field("cache_bytes", &self.cache_bytes)
            .field("environment", &variables)
            .field("fetches", &self.fetches)
            .field("patience", &self.patience)
            .finish_non_exhaustive()
    }
}

impl RemoteOptions {
    /// A cache in `folder` of `bytes` bytes, no credentials.
    pub fn new(folder: &Path, bytes: u64) -> RemoteOptions {
        RemoteOptions {
            cache: folder.to_path_buf(),
            cache_bytes: bytes,
            environment: Vec::new(),
            fetches: 4,
            patience: Patience::default(),
            notice: None,
        }
    }
}

/// The fetching threads of a set, which end when it is dropped.
#[derive(Debug)]
pub(super) struct Fetchers {
    prefetcher: Arc<Prefetcher>,
    pool: Pool,
}

impl Drop for Fetchers {
    fn drop(&mut self) {
        self.prefetcher.close();
        self.pool.join();
    }
}

/// The remote part of a set: prefetcher, manifests, threads.
#[derive(Debug)]
pub(super) struct Remote {
    pub(super) prefetcher: Arc<Prefetcher>,
    pub(super) manifests: Vec<(PathBuf, Manifest)>,
    _fetchers: Fetchers,
}

/// Opens the shards behind the URLs of `spec`.
pub(super) fn open(spec: &[String], options: &RemoteOptions) -> Result<Opened, ShardError> {
    let (opened, _) = open_with_records(spec, options)?;
    Ok(opened)
}

/// As [`open`], with the manifests' record of each shard.
fn open_with_records(
    spec: &[String],
    options: &RemoteOptions,
) -> Result<(Opened, Vec<Option<ShardRecord>>), ShardError> {
    let web = Web::new(&options.environment, options.patience.stall)?;
    let words: Vec<Vec<Address>> =
        spec.iter().map(|word| addresses(word)).collect::<Result<_, _>>()?;
    for address in words.iter().flatten() {
        // A word that cannot be meant makes no folder.
        web.object(address)?;
    }
    let cache = Cache::open(&options.cache, options.cache_bytes)?;
    let (patience, notices) = (options.patience, Once::new(options.notice));
    let opener = Opener { web, cache, patience, notices };
    let named = opener.names(spec, words)?;
    let (classes, clash, mut records) = records(spec, &named)?;
    let mut jobs = Vec::with_capacity(named.shards.len());
    for address in &named.shards {
        // Of a version of one object no manifest speaks.
        let key = (address.folder().to_owned(), address.name());
        let record = if address.version().is_none() { records.remove(&key) } else { None };
        jobs.push(Job { object: opener.web.object(address)?, record });
    }
    let found = opener.open_all(&jobs)?;
    let digests = jobs.iter().map(|job| job.record.as_ref().map(|r| r.sha256.clone())).collect();
    let (items, tables): (Vec<Item>, Vec<Table>) = found.into_iter().unzip();
    opener.check_room(spec, &items)?;
    let place = |item: &Item| {
        let (url, name) = (item.object.url.clone().into(), item.object.address.name());
        (url, name, item.about.bytes, item.blame())
    };
    let places: Vec<(PathBuf, String, u64, Blame)> = items.iter().map(place).collect();
    let Opener { web, cache, patience, .. } = opener;
    let prefetcher = Arc::new(Prefetcher::new(items, cache, web, patience, options.notice));
    let fetchers = fetchers(&prefetcher, options.fetches)?;
    let shards = places.into_iter().zip(tables).zip(0..).map(|((place, table), number)| {
        let ((url, name, bytes, blame), prefetcher) = (place, Arc::clone(&prefetcher));
        let source = Source::Remote { url, name, bytes, prefetcher, number };
        Shard { source, table, first: 0, indexed: Some(blame) }
    });
    let shards: Vec<Shard> = shards.collect();
    let odd = [same_images(&named), overlap::several(&shards)];
    if let Some(tell) = options.notice {
        odd.iter().flatten().for_each(|text| tell(text));
    }
    let all = named.folders.into_values().flat_map(|folder| folder.manifests);
    let manifests = all.map(|(url, manifest)| (url.into(), without_sums(manifest))).collect();
    let remote = Some(Remote { prefetcher, manifests, _fetchers: fetchers });
    let records = jobs.into_iter().map(|job| job.record).collect();
    Ok((Opened { shards, classes, clash, digests, remote }, records))
}

/// Whether folders that are read as one hold the same images.
fn same_images(named: &Named) -> Option<String> {
    let folders = named.folders.values().filter(|folder| !folder.manifests.is_empty());
    if folders.count() < 2 {
        return None;
    }
    let mut overlap = Overlap::default();
    for (url, manifest) in named.folders.values().flat_map(|folder| &folder.manifests) {
        overlap.add(Path::new(url), manifest.shards.iter());
    }
    overlap::found(overlap)
}

/// The checksums of members are 16 bytes a sample, and only `verify` reads them.
fn without_sums(mut manifest: Manifest) -> Manifest {
    for shard in &mut manifest.shards {
        shard.crc32c = String::new();
    }
    manifest
}

fn fetchers(prefetcher: &Arc<Prefetcher>, threads: usize) -> Result<Fetchers, ShardError> {
    let mut fetchers = Fetchers { prefetcher: Arc::clone(prefetcher), pool: Pool::new() };
    for thread in 0..threads.max(1) {
        let prefetcher = Arc::clone(prefetcher);
        let started =
            fetchers.pool.start(format!("detco-fetch-{thread}"), move || prefetcher.run());
        started.map_err(no_thread)?;
    }
    Ok(fetchers)
}

/// Reads every byte of the shards behind URLs, through the cache, and names every fault; `read`
/// counts bytes as they are read.
///
/// # Errors
///
/// What cannot be opened. Whatever is wrong with a shard is a [`verify::Fault`].
pub fn verify(
    spec: &[String],
    options: &RemoteOptions,
    workers: usize,
    read: &AtomicU64,
) -> Result<Report, ShardError> {
    verify_with(spec, options, verify::Images::Read, workers, read)
}

/// As [`verify()`], with a choice of decoding the images.
///
/// # Errors
///
/// As [`verify()`].
pub fn verify_with(
    spec: &[String],
    options: &RemoteOptions,
    images: verify::Images,
    workers: usize,
    read: &AtomicU64,
) -> Result<Report, ShardError> {
    let (opened, records) = open_with_records(spec, options)?;
    let Opened { shards, remote, .. } = opened;
    let Some(remote) = remote else { return Ok(Report::default()) };
    let manifest = !remote.manifests.is_empty();
    let total = Mutex::new(Report { manifest, ..Report::default() });
    let (next, lost) = (AtomicUsize::new(0), Mutex::new(None));
    share(workers.clamp(1, shards.len().max(1)), &|| {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(shard) = shards.get(at) else { break };
            // Those before it may go when they are read.
            remote.prefetcher.set_upcoming((at as u32..shards.len() as u32).collect(), 1);
            let one = match remote.prefetcher.pin(at as u32, &|| false) {
                Ok(held) => {
                    let mut one = verify::shard(held.path(), records[at].as_ref(), images, read);
                    for fault in &mut one.faults {
                        // Told by its URL, which is what the user knows.
                        let index = fault.file.extension().is_some_and(|ending| ending == "idx");
                        let shard = shard.path();
                        fault.file = if index { shown_index(shard) } else { shard.into() };
                    }
                    one
                }
                // Of a store that does not answer, nothing is known to be wrong with the shards.
                Err(error) if error.is_unreachable() => {
                    next.store(shards.len(), Ordering::Relaxed);
                    lost.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    break;
                }
                Err(error) => {
                    let faults = vec![verify::fault_of(shard.path(), &error)];
                    Report { shards: 1, faults, ..Report::default() }
                }
            };
            total.lock().unwrap_or_else(PoisonError::into_inner).add(one);
        }
    });
    if let Some(error) = lost.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    let mut report = total.into_inner().unwrap_or_else(PoisonError::into_inner);
    report.faults.sort_by(|a, b| (&a.file, a.offset).cmp(&(&b.file, b.offset)));
    Ok(report)
}

/// A shard's URL, as it is shown, to that of the index beside it.
fn shown_index(shard: &Path) -> PathBuf {
    let text = shard.display().to_string();
    let (path, query) = text.split_at(text.find('?').unwrap_or(text.len()));
    format!("{}{query}", index_name(path)).into()
}

/// Runs `body` on this thread and on as many others as the system gives, `threads` at most in all.
fn share(threads: usize, body: &(dyn Fn() + Sync)) {
    std::thread::scope(|scope| {
        for _ in 1..threads {
            // The fewer there are, the longer it takes.
            if std::thread::Builder::new().spawn_scoped(scope, body).is_err() {
                break;
            }
        }
        body();
    });
}
