//! Shards behind URLs: what the user named, found and opened without fetching a shard.
//!
//! Of a data set that `detco pack` wrote, the manifest and the indexes are fetched first: they say
//! how many samples there are and where each lies. Without a manifest, sizes come from the store and
//! no digest is compared; without an index the shard itself is fetched and walked once, since an
//! order needs the number of samples, and its index is kept in the cache.

mod fetch;
mod shelf;
mod store;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use sha2::{Digest as _, Sha256};

pub use self::fetch::{PAUSE_MAX, Patience};
use self::shelf::Item;
pub(crate) use self::shelf::Shelf;
pub use self::shelf::{Held, RemoteSnapshot};
use self::store::{About, Failure, Object, Web};
use super::{Opened, Shard, Source};
use crate::cache::{Admitted, Cache, Dear};
use crate::format::index::{Ends, IndexText, Table};
use crate::format::manifest::{Manifest, ShardRecord};
use crate::format::map::Map;
use crate::format::verify::{self, Report};
use crate::format::writer::hex;
use crate::format::{Blame, Cause, ManifestFault, RemoteFault, ShardError, SpecFault};
use crate::pipe::Pool;

/// Indexes are fetched by so many threads: each waits for a server most of its time.
const OPENERS: usize = 16;

/// How shards behind URLs are reached and kept.
#[derive(Debug, Clone)]
pub struct RemoteOptions {
    /// Folder of the cache; processes of one machine may share it.
    pub cache: PathBuf,
    /// Its bound in bytes.
    pub cache_bytes: u64,
    /// The variables that stores are configured by: `AWS_*`, `GOOGLE_*`, `AZURE_*`, with their
    /// values.
    pub environment: Vec<(String, String)>,
    /// Shards fetched at a time, at least 1.
    pub fetches: usize,
    /// How long stores are waited for.
    pub patience: Patience,
    /// Told, in a sentence, what makes opening take long, and that a shard does not come.
    pub notice: Option<fn(&str)>,
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

/// The threads that fetch for a set. Dropping it ends them.
#[derive(Debug)]
pub(super) struct Fetchers {
    shelf: Arc<Shelf>,
    pool: Pool,
}

impl Drop for Fetchers {
    fn drop(&mut self) {
        self.shelf.close();
        self.pool.join();
    }
}

/// What a set keeps of where its shards come from.
#[derive(Debug)]
pub(super) struct Remote {
    pub(super) shelf: Arc<Shelf>,
    pub(super) manifests: Vec<(PathBuf, Manifest)>,
    _fetchers: Fetchers,
}

/// Whether a word of the user's is a URL.
pub(super) fn is_url(word: &str) -> bool {
    word.split_once("://").is_some_and(|(scheme, _)| {
        !scheme.is_empty() && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric())
    })
}

/// A shard that is to be opened.
struct Job {
    object: Object,
    record: Option<ShardRecord>,
}

/// What the words of the user lead to.
#[derive(Default)]
struct Named {
    shards: Vec<String>,
    /// Manifests by the URL of their folder.
    manifests: BTreeMap<String, Vec<(String, Manifest)>>,
}

/// Opens what is behind the URLs of `spec`.
pub(super) fn open(spec: &[String], options: &RemoteOptions) -> Result<Opened, ShardError> {
    let (opened, _) = open_with_records(spec, options)?;
    Ok(opened)
}

/// As [`open`], with what the manifests say of each shard.
fn open_with_records(
    spec: &[String],
    options: &RemoteOptions,
) -> Result<(Opened, Vec<Option<ShardRecord>>), ShardError> {
    let web = Web::new(&options.environment, options.patience.stall)?;
    for word in spec {
        // A word that cannot be meant makes no folder.
        web.object(word)?;
    }
    let cache = Cache::open(&options.cache, options.cache_bytes)?;
    let opener = Opener { web, cache, patience: options.patience };
    let named = opener.names(spec)?;
    let (classes, mut records) = records(spec, &named)?;
    let mut jobs = Vec::with_capacity(named.shards.len());
    for url in &named.shards {
        jobs.push(Job { object: opener.web.object(url)?, record: records.remove(url) });
    }
    let found = opener.open_all(&jobs, options)?;
    let digests = jobs.iter().map(|job| job.record.as_ref().map(|r| r.sha256.clone())).collect();
    let (items, tables): (Vec<Item>, Vec<Table>) = found.into_iter().unzip();
    opener.check_room(spec, &items)?;
    let place = |item: &Item| (item.object.url.clone().into(), item.about.bytes, item.blame());
    let urls: Vec<(PathBuf, u64, Blame)> = items.iter().map(place).collect();
    let Opener { web, cache, patience } = opener;
    let shelf = Arc::new(Shelf::new(items, cache, web, patience, options.notice));
    let fetchers = fetchers(&shelf, options.fetches)?;
    let shards =
        urls.into_iter().zip(tables).zip(0..).map(|(((url, bytes, blame), table), number)| {
            let source = Source::Remote { url, bytes, shelf: Arc::clone(&shelf), number };
            Shard { source, table, first: 0, indexed: Some(blame) }
        });
    let shards = shards.collect();
    let all = named.manifests.into_values().flatten();
    let manifests = all.map(|(url, manifest)| (url.into(), without_sums(manifest))).collect();
    let remote = Some(Remote { shelf, manifests, _fetchers: fetchers });
    let records = jobs.into_iter().map(|job| job.record).collect();
    Ok((Opened { shards, classes, digests, remote }, records))
}

/// The checksums of members are 16 bytes a sample, and only `verify` reads them.
fn without_sums(mut manifest: Manifest) -> Manifest {
    for shard in &mut manifest.shards {
        shard.crc32c = String::new();
    }
    manifest
}

fn fetchers(shelf: &Arc<Shelf>, threads: usize) -> Result<Fetchers, ShardError> {
    let mut fetchers = Fetchers { shelf: Arc::clone(shelf), pool: Pool::new() };
    for thread in 0..threads.max(1) {
        let shelf = Arc::clone(shelf);
        let started = fetchers.pool.start(format!("detco-fetch-{thread}"), move || shelf.run());
        started.map_err(|error| {
            ShardError::remote("remote shards", RemoteFault::Store(error.into()))
        })?;
    }
    Ok(fetchers)
}

/// Classes, and the records of the shards that are named.
fn records(
    spec: &[String],
    named: &Named,
) -> Result<(Vec<String>, BTreeMap<String, ShardRecord>), ShardError> {
    let fail = |fault| ShardError::Spec { spec: spec.join(" "), fault };
    let mut records = BTreeMap::new();
    let mut classes: Option<(&str, &[String])> = None;
    for (folder, manifests) in &named.manifests {
        for (url, manifest) in manifests {
            match classes {
                Some((one, names)) if names != manifest.classes => {
                    let (one, other) = (one.into(), url.into());
                    return Err(fail(SpecFault::Classes { one, other }));
                }
                _ => classes = Some((url, &manifest.classes)),
            }
            for record in &manifest.shards {
                records.insert(format!("{folder}{}", record.name), record.clone());
            }
        }
    }
    for shard in &named.shards {
        let listed = named.manifests.get(folder_of(shard)).is_some_and(|all| !all.is_empty());
        if listed && !records.contains_key(shard) {
            return Err(fail(SpecFault::Unlisted { shard: shard.into() }));
        }
    }
    Ok((classes.map_or_else(Vec::new, |(_, names)| names.to_vec()), records))
}

/// A URL up to its last slash, the slash included.
fn folder_of(url: &str) -> &str {
    &url[..url.rfind('/').map_or(0, |slash| slash + 1)]
}

/// Finds out what there is.
struct Opener {
    web: Web,
    cache: Cache,
    patience: Patience,
}

impl Opener {
    /// A small object, `None` where there is none.
    fn small(&self, url: &str) -> Result<Option<Vec<u8>>, ShardError> {
        let object = self.web.object(url)?;
        fetch::again(&self.patience, &object, "fetch it", || match self.web.small(&object) {
            Ok(bytes) => Ok(Some(bytes)),
            // S3 refuses what does not exist to those who may not list. If the shard itself is
            // refused as well, that will be said when it is fetched.
            Err(Failure::Final(RemoteFault::Missing | RemoteFault::Denied(_))) => Ok(None),
            Err(failure) => Err(failure),
        })
    }

    fn manifest(&self, url: &str) -> Result<Option<Manifest>, ShardError> {
        let Some(text) = self.small(url)? else { return Ok(None) };
        let parsed = Manifest::parse(&text);
        parsed.map(Some).map_err(|fault| ShardError::Manifest { manifest: url.into(), fault })
    }

    /// The words of the user to URLs of shards, and the manifests beside them.
    fn names(&self, spec: &[String]) -> Result<Named, ShardError> {
        let mut named = Named::default();
        for word in spec {
            let reason = |error: String| ShardError::Spec {
                spec: word.clone(),
                fault: SpecFault::Pattern { reason: error },
            };
            let urls = webdataset::braceexpand(word).map_err(|error| reason(error.to_string()))?;
            for url in urls {
                if url.contains(['*', '[']) {
                    return Err(reason("URLs take braces, {000..012}, and no globs".into()));
                }
                if url.ends_with(".tar") {
                    self.beside(folder_of(&url), &mut named)?;
                    named.shards.push(url);
                } else {
                    self.folder(&url, &mut named)?;
                }
            }
        }
        let mut seen = BTreeSet::new();
        if let Some(twice) = named.shards.iter().find(|url| !seen.insert(url.as_str())) {
            let fault = SpecFault::Twice { shard: twice.into() };
            return Err(ShardError::Spec { spec: spec.join(" "), fault });
        }
        Ok(named)
    }

    /// The manifest beside shards that were named one by one, if there is one.
    fn beside(&self, folder: &str, named: &mut Named) -> Result<(), ShardError> {
        if named.manifests.contains_key(folder) {
            return Ok(());
        }
        let found = self.manifests(folder)?;
        named.manifests.insert(folder.to_owned(), found);
        Ok(())
    }

    /// `manifest.json`, or the manifests of all parts where the store lists what it has.
    fn manifests(&self, folder: &str) -> Result<Vec<(String, Manifest)>, ShardError> {
        let url = format!("{folder}manifest.json");
        if let Some(manifest) = self.manifest(&url)? {
            return Ok(vec![(url, manifest)]);
        }
        let names = self.list(folder)?.unwrap_or_default();
        let mut found = Vec::new();
        for name in names.iter().filter(|name| Manifest::is_name(name)) {
            let url = format!("{folder}{name}");
            found.extend(self.manifest(&url)?.map(|manifest| (url, manifest)));
        }
        Ok(found)
    }

    /// The names in a folder, sorted; `None` where the store lists nothing.
    fn list(&self, folder: &str) -> Result<Option<Vec<String>>, ShardError> {
        // A plain HTTP server has no list that a program could read.
        if folder.starts_with("http") {
            return Ok(None);
        }
        let object = self.web.object(folder)?;
        fetch::again(&self.patience, &object, "list it", || match self.web.list(&object) {
            Ok(mut names) => {
                names.sort_unstable();
                Ok(Some(names))
            }
            Err(Failure::Final(RemoteFault::Denied(_))) => Ok(None),
            Err(failure) => Err(failure),
        })
    }

    /// All shards of a folder: what its manifests list, or what the store does.
    fn folder(&self, url: &str, named: &mut Named) -> Result<(), ShardError> {
        let folder = format!("{}/", url.trim_end_matches('/'));
        let fail = |fault| ShardError::Spec { spec: url.to_owned(), fault };
        self.beside(&folder, named)?;
        let manifests = &named.manifests[&folder];
        let shards = |record: &ShardRecord| format!("{folder}{}", record.name);
        let mut found: Vec<String> =
            manifests.iter().flat_map(|(_, one)| &one.shards).map(shards).collect();
        if let Some(fault) = Manifest::incomplete(manifests) {
            return Err(fail(fault));
        }
        if manifests.is_empty() {
            let names = self.list(&folder)?;
            let names = names.ok_or_else(|| ShardError::remote(url, RemoteFault::NotListed))?;
            let tars = names.iter().filter(|name| name.ends_with(".tar") && !name.starts_with('.'));
            found = tars.map(|name| format!("{folder}{name}")).collect();
        }
        if found.is_empty() {
            return Err(fail(SpecFault::Empty));
        }
        found.sort_unstable();
        named.shards.extend(found);
        Ok(())
    }

    fn open_all(
        &self,
        jobs: &[Job],
        options: &RemoteOptions,
    ) -> Result<Vec<(Item, Table)>, ShardError> {
        let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
        let (done, told) = (Mutex::new(Vec::with_capacity(jobs.len())), AtomicBool::new(false));
        let notice = || {
            if let Some(notice) = options.notice.filter(|_| !told.swap(true, Ordering::Relaxed)) {
                notice("shards without an index: each is fetched once to count its samples");
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..OPENERS.min(jobs.len()) {
                scope.spawn(|| {
                    while !failed.load(Ordering::Relaxed) {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        let Some(job) = jobs.get(at) else { break };
                        let opened = self.open_one(job, &notice);
                        failed.fetch_or(opened.is_err(), Ordering::Relaxed);
                        done.lock().unwrap_or_else(PoisonError::into_inner).push((at, opened));
                    }
                });
            }
        });
        let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
        // In order, so that of two faults the first in the data set is reported.
        done.sort_by_key(|(at, _)| *at);
        done.into_iter().map(|(_, opened)| opened).collect()
    }

    fn open_one(&self, job: &Job, notice: &dyn Fn()) -> Result<(Item, Table), ShardError> {
        let (object, record) = (job.object.clone(), job.record.as_ref());
        let about = match record {
            Some(record) => About { bytes: record.bytes, etag: None, version: String::new() },
            None => {
                let ask = || self.web.about(&object);
                fetch::again(&self.patience, &object, "ask for its size", ask)?
            }
        };
        // By its content where that is known; else by everything that would change with it.
        let digest = record.map_or_else(
            || hex(&Sha256::digest(format!("{} {} {}", object.url, about.bytes, about.version))),
            |record| record.sha256.clone(),
        );
        let sha256 = record.map(|record| record.sha256.clone());
        let (name, index) = (format!("{digest}.tar"), format!("{digest}.idx"));
        let mut item = Item { object, about, sha256, name, index, ends: None };
        let (table, ends) = match self.index(&item, record)? {
            Some(found) => found,
            None => {
                notice();
                self.walk(&item)?
            }
        };
        item.ends = Some(ends);
        if let Some(record) = record.filter(|record| record.samples != table.len() as u64) {
            let (name, recorded) = (record.name.clone(), record.samples);
            let fault = ManifestFault::ShardSamples { name, samples: table.len() as u64, recorded };
            let manifest = format!("{}manifest.json", folder_of(&item.object.url)).into();
            return Err(ShardError::Manifest { manifest, fault });
        }
        Ok((item, table))
    }

    /// The index of a shard, from the cache or from beside the shard; `None` where there is none.
    fn index(
        &self,
        item: &Item,
        record: Option<&ShardRecord>,
    ) -> Result<Option<(Table, Ends)>, ShardError> {
        let url = format!("{}.idx", item.object.url.trim_end_matches(".tar"));
        let sum = |text: &[u8]| format!("{:08x}", crc32c::crc32c(text));
        let sound = |text: &[u8]| record.is_none_or(|record| sum(text) == record.index_crc32c);
        let parse = |text: &[u8]| {
            let (index, shard) = (Path::new(&url), Path::new(&item.object.url));
            let parsed = Table::parse(text, index, shard, item.about.bytes);
            parsed.map_err(|error| error.blame(item.blame()))
        };
        if let Some(text) = self.cache.read(&item.index)? {
            if sound(&text) {
                return parse(&text).map(Some);
            }
            self.cache.remove(&item.index)?;
        }
        let Some(text) = self.small(&url)? else { return Ok(None) };
        if let Some(record) = record.filter(|_| !sound(&text)) {
            let (found, recorded) = (sum(&text), record.index_crc32c.clone());
            return Err(ShardError::remote(&url, RemoteFault::IndexDigest { found, recorded }));
        }
        let table = parse(&text)?;
        self.cache.store(&item.index, &text, &|_| Dear::No)?;
        Ok(Some(table))
    }

    /// Fetches a shard without an index, and makes one.
    fn walk(&self, item: &Item) -> Result<(Table, Ends), ShardError> {
        let url = Path::new(&item.object.url);
        let mut crowded = None;
        let hold = loop {
            if let Some(hold) = self.cache.take(&item.name, item.about.bytes)? {
                break hold;
            }
            match self.cache.admit(&item.name, item.about.bytes, &|_| Dear::No)? {
                Admitted::Present => {}
                Admitted::Elsewhere => std::thread::sleep(self.patience.pause),
                // Threads beside this one hold shards for a moment each.
                Admitted::NoRoom { .. }
                    if crowded.get_or_insert_with(Instant::now).elapsed() < self.patience.room =>
                {
                    std::thread::sleep(self.patience.pause);
                }
                Admitted::NoRoom { kept } => {
                    let (bytes, bound) = (item.about.bytes, self.cache.bound());
                    let fault = RemoteFault::NoRoom { bytes, kept, bound };
                    return Err(ShardError::remote(&item.object.url, fault));
                }
                Admitted::Part(mut part) => {
                    let (patience, sha256) = (&self.patience, item.sha256.as_deref());
                    let (web, object, about) = (&self.web, &item.object, &item.about);
                    fetch::shard(web, patience, object, about, sha256, &mut part, &Alone)?;
                    part.flush()?;
                    part.finish()?;
                }
            }
        };
        let map = Map::open(&self.cache.path(&item.name))?;
        // Told by the URL, which is what the user knows.
        let text = IndexText::of(map.bytes()).map_err(|error| ShardError::tar(url, error))?;
        map.check()?;
        let text = text.finish();
        let found =
            Table::parse(text.as_bytes(), &url.with_extension("idx"), url, item.about.bytes)?;
        drop((map, hold));
        self.cache.store(&item.index, text.as_bytes(), &|_| Dear::No)?;
        Ok(found)
    }

    /// Refuses a cache that cannot hold what reading needs at once, or a disk that cannot hold it.
    fn check_room(&self, spec: &[String], items: &[Item]) -> Result<(), ShardError> {
        let largest = items.iter().max_by_key(|item| item.about.bytes);
        let Some(largest) = largest else { return Ok(()) };
        let (bytes, bound) = (largest.about.bytes, self.cache.bound());
        if bytes > bound {
            let fault = RemoteFault::NoRoom { bytes, kept: 0, bound };
            return Err(ShardError::remote(&largest.object.url, fault));
        }
        let total: u64 = items.iter().map(|item| item.about.bytes).sum();
        let used = self.cache.usage()?.bytes;
        let needed = total.min(bound).saturating_sub(used);
        match crate::cache::free(self.cache.folder()) {
            Some(free) if free < needed => {
                let folder = self.cache.folder().to_path_buf();
                let text = format!("{free} bytes are free, {needed} would be used");
                let fault = RemoteFault::DiskFull { folder, source: text.into() };
                Err(ShardError::remote(&spec.join(" "), fault))
            }
            _ => Ok(()),
        }
    }
}

/// Fetching while opening: nobody counts, and nothing is evicted for it.
struct Alone;

impl fetch::Watch for Alone {
    fn came(&self, _: u64) {}

    fn failed(&self, _: &Object, _: u32, _: &Cause) {}

    fn pause(&self, pause: std::time::Duration) -> bool {
        std::thread::sleep(pause);
        true
    }

    fn evicted(&self) -> Result<bool, ShardError> {
        Ok(false)
    }
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
    let (opened, records) = open_with_records(spec, options)?;
    let Opened { shards, remote, .. } = opened;
    let Some(remote) = remote else { return Ok(Report::default()) };
    let manifest = !remote.manifests.is_empty();
    let total = Mutex::new(Report { manifest, ..Report::default() });
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..workers.clamp(1, shards.len().max(1)) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(shard) = shards.get(at) else { break };
                    // Those before it may go when they are read.
                    remote.shelf.want((at as u32..shards.len() as u32).collect(), 1);
                    let one = match remote.shelf.hold(at as u32, &|| false) {
                        Ok(held) => {
                            let record = records[at].as_ref();
                            let mut one = verify::shard(held.path(), record, read);
                            one.faults.iter_mut().for_each(|fault| {
                                let extension = fault.file.extension().unwrap_or_default();
                                fault.file = shard.path().with_extension(extension);
                            });
                            one
                        }
                        Err(error) => {
                            let faults = vec![verify::fault_of(shard.path(), &error)];
                            Report { shards: 1, faults, ..Report::default() }
                        }
                    };
                    total.lock().unwrap_or_else(PoisonError::into_inner).add(one);
                }
            });
        }
    });
    let mut report = total.into_inner().unwrap_or_else(PoisonError::into_inner);
    report.faults.sort_by(|a, b| (&a.file, a.offset).cmp(&(&b.file, b.offset)));
    Ok(report)
}
