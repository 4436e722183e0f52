//! Finds what is behind URLs: manifests, indexes, sizes, and what has to be found out without them.

mod named;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use sha2::{Digest as _, Sha256};

use self::named::Folder;
pub(super) use self::named::{Named, addresses, records};
use super::address::{Address, shown_all};
use super::fetch::{self, Patience};
use super::prefetch::{self, Item};
use super::share;
use super::store::{About, Failure, Object, Told, Web};
use crate::cache::{Admitted, Cache, Priority};
use crate::files::hex;
use crate::format::index::{Ends, Table};
use crate::format::manifest::{Manifest, ShardRecord};
use crate::format::map::Map;
use crate::format::{Cause, ManifestFault, RemoteFault, ShardError, SpecFault, members, tar};

/// Threads that fetch indexes: each waits for a server most of its time.
const OPENERS: usize = 16;

/// Largest manifest in bytes: one of 60 million labelled samples.
const MANIFEST_MAX: u64 = 1 << 30;
/// Largest index in bytes; it is also never larger than its shard.
const INDEX_MAX: u64 = 256 << 20;

/// A shard that is to be opened.
pub(super) struct Job {
    pub(super) object: Object,
    pub(super) record: Option<ShardRecord>,
}

/// Notices to the user, each given once.
pub(super) struct Once {
    tell: Option<fn(&str)>,
    walking: AtomicBool,
    manifest: AtomicBool,
    index: AtomicBool,
}

impl Once {
    pub(super) fn new(tell: Option<fn(&str)>) -> Once {
        let not = AtomicBool::default;
        Once { tell, walking: not(), manifest: not(), index: not() }
    }

    fn say(&self, once: &AtomicBool, text: impl FnOnce() -> String) {
        if let Some(tell) = self.tell.filter(|_| !once.swap(true, Ordering::Relaxed)) {
            tell(&text());
        }
    }
}

/// Finds the shards behind URLs.
pub(super) struct Opener {
    pub(super) web: Web,
    pub(super) cache: Cache,
    pub(super) patience: Patience,
    pub(super) notices: Once,
}

/// The result of looking for a small object.
enum Small {
    There(Vec<u8>),
    /// It does not exist, as far as the server tells.
    None,
    /// Access is refused.
    Refused(RemoteFault),
    /// Something else is there.
    Other(String),
}

/// Whether the bytes begin like a manifest.
fn begins_as_manifest(bytes: &[u8]) -> bool {
    bytes.trim_ascii_start().starts_with(b"{")
}

impl Opener {
    /// Fetches a small object.
    fn small(
        &self,
        object: &Object,
        limit: u64,
        begins: fn(&[u8]) -> bool,
    ) -> Result<Small, ShardError> {
        fetch::again(&self.patience, object, "fetch it", || {
            match self.web.small(object, limit, begins) {
                Ok(bytes) => Ok(Small::There(bytes)),
                Err(Failure::Final(RemoteFault::Missing)) => Ok(Small::None),
                // S3 refuses what does not exist to those who may not list, and of a signed URL's
                // neighbours any server may think what it likes. If the shard itself is refused as
                // well, that will be said when it is fetched.
                Err(Failure::Final(
                    fault @ (RemoteFault::Denied { .. } | RemoteFault::Refused { .. }),
                )) => Ok(Small::Refused(fault)),
                Err(Failure::Final(RemoteFault::Page { what, begins })) => {
                    Ok(Small::Other(format!("it is {what}, beginning with `{begins}`")))
                }
                Err(failure) => Err(failure),
            }
        })
    }

    /// Fetches a manifest; `Err` in the pair says why it is unknown whether there is one.
    fn manifest(
        &self,
        address: &Address,
    ) -> Result<Result<Option<Manifest>, RemoteFault>, ShardError> {
        let object = self.web.object(address)?;
        let other = |why: &str| {
            self.notices.say(&self.notices.manifest, || {
                format!("{}: no manifest of this program: {why}; going on without", object.url)
            });
            Ok(Ok(None))
        };
        let text = match self.small(&object, MANIFEST_MAX, begins_as_manifest)? {
            Small::There(text) => text,
            Small::None => return Ok(Ok(None)),
            Small::Refused(fault) => return Ok(Err(fault)),
            Small::Other(why) => return other(&why),
        };
        if !Manifest::is_ours(&text) {
            return other("it is JSON of another kind");
        }
        let parsed = Manifest::parse(&text);
        let manifest = object.url.clone().into();
        parsed
            .map(|manifest| Ok(Some(manifest)))
            .map_err(|fault| ShardError::Manifest { manifest, fault })
    }

    /// From the user's arguments to URLs of shards and the manifests beside them.
    pub(super) fn names(
        &self,
        spec: &[String],
        words: Vec<Vec<Address>>,
    ) -> Result<Named, ShardError> {
        let mut named = Named::default();
        for address in words.into_iter().flatten() {
            if !address.name().ends_with(".tar") {
                self.folder(&address, &mut named)?;
                continue;
            }
            // Of a version of one object nobody says what was beside it.
            if address.version().is_none() {
                self.beside(&address, &mut named)?;
            }
            named.shards.push(address);
        }
        let mut seen = BTreeSet::new();
        if let Some(twice) = named.shards.iter().find(|shard| !seen.insert(shard.identity())) {
            let fault = SpecFault::Twice { shard: twice.shown().into() };
            return Err(ShardError::Spec { spec: shown_all(spec), fault });
        }
        Ok(named)
    }

    /// The manifests beside an object, if there are any.
    fn beside<'a>(
        &self,
        address: &Address,
        named: &'a mut Named,
    ) -> Result<&'a mut Folder, ShardError> {
        let key = address.folder().to_owned();
        if !named.folders.contains_key(&key) {
            let folder = self.manifests(address)?;
            named.folders.insert(key.clone(), folder);
        }
        let none = || Folder { manifests: Vec::new(), refused: None };
        Ok(named.folders.entry(key).or_insert_with(none))
    }

    /// `manifest.json`, or the manifests of all parts where the store lists what it has.
    fn manifests(&self, address: &Address) -> Result<Folder, ShardError> {
        let one = address.sibling("manifest.json");
        let shown = one.shown();
        let refused = match self.manifest(&one)? {
            Ok(Some(manifest)) => {
                return Ok(Folder { manifests: vec![(shown, manifest)], refused: None });
            }
            Ok(None) => None,
            Err(fault) => Some(fault),
        };
        let (names, denied) = match self.list(&address.sibling(""))? {
            Ok(names) => (names, None),
            Err(fault) => (Vec::new(), fault),
        };
        let refused = refused.or(denied);
        let mut manifests = Vec::new();
        for name in names.iter().filter(|name| Manifest::is_name(name)) {
            let part = address.sibling(name);
            if let Ok(Some(manifest)) = self.manifest(&part)? {
                manifests.push((part.shown(), manifest));
            }
        }
        Ok(Folder { manifests, refused })
    }

    /// The names in a folder, sorted, or the reason why the store does not list it.
    fn list(
        &self,
        folder: &Address,
    ) -> Result<Result<Vec<String>, Option<RemoteFault>>, ShardError> {
        // A plain HTTP server has no list that a program could read.
        if matches!(folder.url().scheme(), "http" | "https") {
            return Ok(Err(None));
        }
        let object = self.web.object(folder)?;
        fetch::again(&self.patience, &object, "list it", || match self.web.list(&object) {
            Ok(mut names) => {
                names.sort_unstable();
                Ok(Ok(names))
            }
            Err(Failure::Final(fault @ RemoteFault::Denied { .. })) => Ok(Err(Some(fault))),
            Err(failure) => Err(failure),
        })
    }

    /// All shards of a folder, by its manifests or by the store's listing.
    fn folder(&self, address: &Address, named: &mut Named) -> Result<(), ShardError> {
        let folder = address.as_folder();
        let shown = address.shown();
        let fail = |fault| ShardError::Spec { spec: shown.clone(), fault };
        let Folder { manifests, refused } = self.beside(&folder, named)?;
        if let Some(fault) = Manifest::incomplete(manifests) {
            return Err(fail(fault));
        }
        let records = manifests.iter().flat_map(|(_, one)| &one.shards);
        let mut found: Vec<Address> = records.map(|record| folder.sibling(&record.name)).collect();
        if manifests.is_empty() {
            let refused = refused.take();
            // Some servers have no names for what they give: `…/download?id=7`.
            if refused.is_none() && self.is_shard(address)? {
                named.shards.push(address.clone());
                return Ok(());
            }
            let names = self.list(&folder)?;
            let names = names.map_err(|denied| {
                let fault = denied.or(refused).unwrap_or(RemoteFault::NotListed);
                ShardError::remote(&shown, fault)
            })?;
            let tars = names.iter().filter(|name| name.ends_with(".tar") && !name.starts_with('.'));
            found = tars.map(|name| folder.sibling(name)).collect();
        }
        if found.is_empty() {
            return Err(fail(SpecFault::Empty));
        }
        found.sort_by_cached_key(Address::name);
        named.shards.extend(found);
        Ok(())
    }

    /// Whether the object at a URL without `.tar` begins like a tar.
    fn is_shard(&self, address: &Address) -> Result<bool, ShardError> {
        if !matches!(address.url().scheme(), "http" | "https") || address.name().is_empty() {
            return Ok(false);
        }
        let object = self.web.object(address)?;
        let told = fetch::again(&self.patience, &object, "ask for its size", || {
            match self.web.about(&object) {
                Ok(told) => Ok(Some(told)),
                Err(Failure::Final(_)) => Ok(None),
                Err(failure) => Err(failure),
            }
        })?;
        Ok(told.is_some_and(|told| tar::header_before(&told.head, tar::BLOCK).is_ok()))
    }

    pub(super) fn open_all(&self, jobs: &[Job]) -> Result<Vec<(Item, Table)>, ShardError> {
        let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
        let done = Mutex::new(Vec::with_capacity(jobs.len()));
        share(OPENERS.min(jobs.len()), &|| {
            while !failed.load(Ordering::Relaxed) {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(job) = jobs.get(at) else { break };
                let opened = self.open_one(job);
                failed.fetch_or(opened.is_err(), Ordering::Relaxed);
                done.lock().unwrap_or_else(PoisonError::into_inner).push((at, opened));
            }
        });
        let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
        // In order, so that of two faults the first in the data set is reported.
        done.sort_by_key(|(at, _)| *at);
        done.into_iter().map(|(_, opened)| opened).collect()
    }

    fn open_one(&self, job: &Job) -> Result<(Item, Table), ShardError> {
        let (object, record) = (job.object.clone(), job.record.as_ref());
        let (about, digest) = match record {
            // By its content where that is known.
            Some(record) => (About::recorded(record.bytes), record.sha256.clone()),
            None => self.about(&object)?,
        };
        let sha256 = record.map(|record| record.sha256.clone());
        let (name, index) = (format!("{digest}.tar"), format!("{digest}.idx"));
        let mut item = Item { object, about, sha256, name, index, ends: None };
        let (table, ends) = match self.index(&item, record)? {
            Some(found) => found,
            None => {
                self.notices.say(&self.notices.walking, || {
                    "shards without an index: each is fetched once to count its samples".into()
                });
                self.walk(&item)?
            }
        };
        item.ends = Some(ends);
        if let Some(record) = record.filter(|record| record.samples != table.len() as u64) {
            let (name, recorded) = (record.name.clone(), record.samples);
            let fault = ManifestFault::ShardSamples { name, samples: table.len() as u64, recorded };
            let manifest = item.object.address.sibling("manifest.json").shown().into();
            return Err(ShardError::Manifest { manifest, fault });
        }
        Ok((item, table))
    }

    /// What the store tells of an object without a record in a manifest, and the digest that names it in the
    /// cache: of everything that would change with the object, or of its bytes where the store tells nothing.
    fn about(&self, object: &Object) -> Result<(About, String), ShardError> {
        let ask = || self.web.about(object);
        let told = fetch::again(&self.patience, object, "ask for its size", ask)?;
        let identity = object.address.identity();
        let known = |bytes: u64, sha256: Option<String>, told: Told| {
            let Told { etag, modified, .. } = told;
            About { bytes, recorded: false, etag, modified, sha256 }
        };
        if let Some(bytes) = told.bytes {
            let name = hex(&Sha256::digest(format!("{identity} {bytes} {}", told.version)));
            return Ok((known(bytes, None, told), name));
        }
        let named = (!told.version.is_empty())
            .then(|| hex(&Sha256::digest(format!("{identity} {}", told.version))));
        if let Some(name) = &named
            && let Some(bytes) = self.cache.size(&format!("{name}.tar"))?
        {
            return Ok((known(bytes, None, told), name.clone()));
        }
        let measure = || self.web.measure(object, &told);
        let (bytes, sha256) = fetch::again(&self.patience, object, "count its bytes", measure)?;
        let name = named.unwrap_or_else(|| sha256.clone());
        Ok((known(bytes, Some(sha256), told), name))
    }

    /// The index of a shard, from the cache or from beside the shard, or the list of its files that
    /// was made when it was walked; `None` where there is neither.
    fn index(
        &self,
        item: &Item,
        record: Option<&ShardRecord>,
    ) -> Result<Option<(Table, Ends)>, ShardError> {
        let address = item.object.address.sibling(&index_name(&item.object.address.name()));
        let (url, shard) = (address.shown(), Path::new(&item.object.url));
        let sum = |text: &[u8]| format!("{:08x}", crc32c::crc32c(text));
        let sound = |text: &[u8]| record.is_none_or(|record| sum(text) == record.index_crc32c);
        let parse = |text: &[u8]| {
            let parsed = Table::parse(text, Path::new(&url), shard, item.about.bytes);
            parsed.map_err(|error| error.blame(item.blame()))
        };
        if let Some(text) = self.cache.read(&item.index)? {
            if sound(&text)
                && let Ok(found) = parse(&text)
            {
                return Ok(Some(found));
            }
            self.cache.remove(&item.index)?;
        }
        let list = list_name(item);
        if let Some(text) = self.cache.read(&list)? {
            if let Some(found) = members::read(&text, shard, item.about.bytes) {
                return found.map(Some);
            }
            self.cache.remove(&list)?;
        }
        if item.object.address.version().is_some() {
            return Ok(None);
        }
        let object = self.web.object(&address)?;
        let limit = item.about.bytes.min(INDEX_MAX);
        let text = match self.small(&object, limit, Table::is_index)? {
            Small::There(text) => text,
            Small::None | Small::Refused(_) => return Ok(None),
            Small::Other(why) => {
                self.notices.say(&self.notices.index, || {
                    format!("{url}: no index of this program: {why}; the shard is walked")
                });
                return Ok(None);
            }
        };
        if let Some(record) = record.filter(|_| !sound(&text)) {
            let (found, recorded) = (sum(&text), record.index_crc32c.clone());
            return Err(ShardError::remote(&url, RemoteFault::IndexDigest { found, recorded }));
        }
        let table = parse(&text)?;
        self.cache.store(&item.index, &text, &|_| Priority::Unneeded)?;
        Ok(Some(table))
    }

    /// Fetches a shard without an index, and lists its files.
    fn walk(&self, item: &Item) -> Result<(Table, Ends), ShardError> {
        let url = Path::new(&item.object.url);
        let mut crowded = None;
        let hold = loop {
            if let Some(hold) = self.cache.take(&item.name, item.about.bytes)? {
                break hold;
            }
            match self.cache.admit(&item.name, item.about.bytes, &|_| Priority::Unneeded)? {
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
                    let come =
                        fetch::shard(web, patience, object, about, sha256, &mut part, &Alone);
                    if let Err(error) = come.and_then(|()| part.flush()) {
                        return Err(prefetch::given_up(&self.cache, item, part, error));
                    }
                    part.finish()?;
                }
            }
        };
        let map = Map::open(&self.cache.path(&item.name))?;
        // Told by the URL, which is what the user knows.
        let list = members::list(map.bytes()).map_err(|error| ShardError::tar(url, error));
        map.check()?;
        let list = list?;
        let found = members::read(list.as_bytes(), url, item.about.bytes);
        drop((map, hold));
        self.cache.store(&list_name(item), list.as_bytes(), &|_| Priority::Unneeded)?;
        found.unwrap_or_else(|| Ok((Table::default(), Ends::default())))
    }

    /// Refuses a cache or a disk that cannot hold what reading needs at once.
    pub(super) fn check_room(&self, spec: &[String], items: &[Item]) -> Result<(), ShardError> {
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
                Err(ShardError::remote(&shown_all(spec), fault))
            }
            _ => Ok(()),
        }
    }
}

/// The observer of fetches while opening, which counts nothing and evicts nothing.
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

/// The name in the cache of the list of a shard's files, where it has no index.
fn list_name(item: &Item) -> String {
    item.index.replace(".idx", ".files.idx")
}

/// The name of the index beside a shard.
pub(super) fn index_name(shard: &str) -> String {
    format!("{}.idx", shard.strip_suffix(".tar").unwrap_or(shard))
}
