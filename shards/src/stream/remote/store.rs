//! The interface to stores: plain HTTP servers, and those of the crate `object_store`.
//!
//! Everything here is called from plain threads and blocks them; a small async runtime does the waiting. Each
//! call is one attempt; [`super::fetch`] retries. Secrets are removed from all errors.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::path::Path as ObjectPath;
use object_store::{
    ClientOptions, Error as StoreError, GetOptions, ObjectStore, ObjectStoreScheme, RetryConfig,
};
use sha2::{Digest as _, Sha256};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use url::{Position, Url};

use super::address::Address;
use super::credentials::Credentials;
use super::feed::{Came, Feed, Kind, Measured, Sink, Small, gzip, unpacked};
use super::http::{self, Answer, Asked, Http};
use super::secrets::Secrets;
use crate::files::hex;
use crate::format::{Cause, RemoteFault, ShardError};
use crate::limits;
use crate::pipe::can_start;

/// Timeout of a connection.
const CONNECT: Duration = Duration::from_secs(10);

/// The runtime and the opened stores.
#[derive(Debug)]
pub(super) struct Web {
    runtime: Runtime,
    environment: Variables,
    stall: Duration,
    secrets: Secrets,
    credentials: Arc<Credentials>,
    /// Made when it is first asked for: it reads the system's certificates.
    http: Mutex<Option<Arc<Http>>>,
    stores: Mutex<HashMap<String, Arc<dyn ObjectStore>>>,
    closing: watch::Sender<bool>,
}

/// An object: its address and its store.
#[derive(Debug, Clone)]
pub(super) struct Object {
    /// The URL for messages, without secrets.
    pub(super) url: String,
    pub(super) address: Address,
    pub(super) place: Place,
}

#[derive(Debug, Clone)]
pub(super) enum Place {
    /// A plain HTTP server.
    Http(Arc<Http>),
    /// A store of `object_store`.
    Store { store: Arc<dyn ObjectStore>, path: ObjectPath, version: Option<String> },
}

/// What a store tells of an object before it is fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Told {
    /// Its size; `None` if only fetching it tells.
    pub(super) bytes: Option<u64>,
    pub(super) etag: Option<String>,
    pub(super) modified: Option<String>,
    /// Its version, which changes when the object does; empty if the store tells none.
    pub(super) version: String,
    /// Its first bytes, if they came with the response.
    pub(super) head: Vec<u8>,
}

/// The expected size and version of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct About {
    pub(super) bytes: u64,
    /// Whether this is from the manifest; otherwise it is from the store when the set was opened.
    pub(super) recorded: bool,
    pub(super) etag: Option<String>,
    pub(super) modified: Option<String>,
    /// Of all of its bytes, where the store said no size and they were read to count them.
    pub(super) sha256: Option<String>,
}

impl About {
    /// From a manifest.
    pub(super) fn recorded(bytes: u64) -> About {
        About { bytes, recorded: true, etag: None, modified: None, sha256: None }
    }

    /// Whether an answer of this version belongs to another object.
    pub(super) fn differs(&self, etag: Option<&str>, modified: Option<&str>) -> bool {
        match (self.etag.as_deref(), etag) {
            (Some(before), Some(now)) => before != now,
            _ => self.modified.as_deref().zip(modified).is_some_and(|(before, now)| before != now),
        }
    }

    /// Whether the version is known, or a digest will be compared.
    pub(super) fn is_known(&self) -> bool {
        let About { recorded, etag, modified, sha256, .. } = self;
        *recorded || etag.is_some() || modified.is_some() || sha256.is_some()
    }

    pub(super) fn size_fault(&self, bytes: u64) -> RemoteFault {
        match self.recorded {
            true => RemoteFault::Size { bytes, recorded: self.bytes },
            false => RemoteFault::Replaced,
        }
    }
}

/// The failure of one attempt.
#[derive(Debug)]
pub(super) enum Failure {
    /// A final failure: another attempt would fail too.
    Final(RemoteFault),
    /// A temporary failure; the time is how long the server asks to wait, if it does.
    Passing(Cause, Option<Duration>),
    /// The server sends objects from their beginning only.
    NoRanges,
    /// A failure of the local disk.
    Here(ShardError),
}

impl From<ShardError> for Failure {
    fn from(error: ShardError) -> Failure {
        Failure::Here(error)
    }
}

/// Environment variables, whose values are never printed.
struct Variables(Vec<(String, String)>);

impl std::fmt::Debug for Variables {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(key, _)| key)).finish()
    }
}

fn no_store(error: impl Into<Cause>) -> ShardError {
    ShardError::remote("remote shards", RemoteFault::Store(error.into()))
}

/// The system refused a thread.
pub(super) fn no_thread(error: std::io::Error) -> ShardError {
    let hint = limits::of_threads(&error);
    no_store(format!("cannot start a thread: {error}{hint}"))
}

/// A runtime for sockets. It panics where the system gives it no thread, so the threads are tried
/// first; the one that looks names up stays.
fn runtime() -> Result<Runtime, std::io::Error> {
    can_start(2)?;
    let runtime = Builder::new_multi_thread()
        .worker_threads(1) // sockets only; bytes are digested and written by the fetching threads
        .max_blocking_threads(4) // looking names up
        .thread_keep_alive(Duration::from_secs(1 << 30))
        .thread_name("detco-remote")
        .enable_io()
        .enable_time()
        .build()?;
    // A thread that is there is not refused later.
    let there = runtime.block_on(runtime.spawn_blocking(|| ()));
    there.map_err(std::io::Error::other)?;
    Ok(runtime)
}

impl Web {
    /// `environment` holds the variables that stores are configured by; `stall` is how long a server
    /// may be silent.
    pub(super) fn new(
        environment: &[(String, String)],
        stall: Duration,
    ) -> Result<Web, ShardError> {
        // Fails where somebody in this process has chosen a provider before: then that one is used.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let runtime = runtime().map_err(no_thread)?;
        let (closing, _) = watch::channel(false);
        let credentials = Credentials::new(environment).map_err(no_store)?;
        let secrets = Secrets::new(environment, &credentials);
        let (environment, credentials) = (Variables(environment.to_vec()), Arc::new(credentials));
        let (http, stores) = (Mutex::default(), Mutex::default());
        Ok(Web { runtime, environment, stall, secrets, credentials, http, stores, closing })
    }

    /// Cancels all requests.
    pub(super) fn close(&self) {
        self.closing.send_replace(true);
    }

    /// The object at an address.
    pub(super) fn object(&self, address: &Address) -> Result<Object, ShardError> {
        let (url, shown) = (address.url(), address.shown());
        let fail = |reason: &str| {
            ShardError::remote(&shown, RemoteFault::Url { reason: reason.to_owned() })
        };
        let parsed = ObjectStoreScheme::parse(url);
        let is_http = matches!(url.scheme(), "http" | "https");
        // A query or a user is for the server that it is written for, whoever that belongs to.
        let plain = url.query().is_some() || address.login().is_some();
        let place = match parsed {
            Ok((scheme, path)) if !(is_http && (plain || scheme == ObjectStoreScheme::Http)) => {
                if address.has_more_than_a_version() || address.login().is_some() {
                    return Err(fail(
                        "of a query it takes versions only (versionId, generation), and no user: \
                         signed URLs begin with https://",
                    ));
                }
                let store = self.store(address, &scheme)?;
                let version = address.version().map(|(_, value)| value);
                Place::Store { store, path, version }
            }
            _ if is_http => Place::Http(self.http()?),
            _ => {
                let reason = "shards are fetched from s3://, gs://, az://, http:// and https://";
                return Err(fail(reason));
            }
        };
        Ok(Object { url: shown, address: address.clone(), place })
    }

    fn http(&self) -> Result<Arc<Http>, ShardError> {
        let mut http = self.http.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(http) = &*http {
            return Ok(Arc::clone(http));
        }
        let credentials = Arc::clone(&self.credentials);
        let built = Http::new(credentials, CONNECT, self.stall).map_err(no_store)?;
        Ok(Arc::clone(http.insert(Arc::new(built))))
    }

    fn store(
        &self,
        address: &Address,
        scheme: &ObjectStoreScheme,
    ) -> Result<Arc<dyn ObjectStore>, ShardError> {
        let url = address.url();
        let mut key = url[..Position::BeforePath].to_owned();
        if url.scheme() == "https" {
            // The bucket may be the first folder: each is a store.
            key += url.path().split_inclusive('/').nth(1).unwrap_or("");
        }
        let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(store) = stores.get(&key) {
            return Ok(Arc::clone(store));
        }
        let built = self.build(scheme, url).map_err(|error| {
            let cause = self.secrets.cause(&error, address);
            ShardError::remote(&address.shown(), RemoteFault::Store(cause))
        })?;
        stores.insert(key, Arc::clone(&built));
        Ok(built)
    }

    fn build(
        &self,
        scheme: &ObjectStoreScheme,
        url: &Url,
    ) -> Result<Arc<dyn ObjectStore>, StoreError> {
        // Attempts are counted and spaced in one place, which knows offsets.
        let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
        let mut client = ClientOptions::new()
            .with_connect_timeout(CONNECT)
            .with_read_timeout(self.stall)
            .with_timeout_disabled(); // a shard may take as long as bytes keep coming
        // An endpoint in plain HTTP was asked for by whoever wrote it.
        let plain = |(key, value): &(String, String)| {
            let names = key.contains("ENDPOINT") || key.contains("BASE_URL");
            names && value.starts_with("http://")
        };
        if url.scheme() == "http" || self.environment.0.iter().any(plain) {
            client = client.with_allow_http(true);
        }
        let variables = |prefix: &'static str| {
            let ours = self.environment.0.iter().filter(move |(key, _)| key.starts_with(prefix));
            ours.map(|(key, value)| (key.to_ascii_lowercase(), value.clone()))
        };
        Ok(match scheme {
            ObjectStoreScheme::AmazonS3 => {
                let builder = AmazonS3Builder::new().with_retry(retry).with_client_options(client);
                let set = |builder: AmazonS3Builder, (key, value): (String, String)| {
                    key.parse().into_iter().fold(builder, |b, key| b.with_config(key, &value))
                };
                Arc::new(variables("AWS_").fold(builder, set).with_url(url.as_str()).build()?)
            }
            ObjectStoreScheme::GoogleCloudStorage => {
                let builder =
                    GoogleCloudStorageBuilder::new().with_retry(retry).with_client_options(client);
                let set = |builder: GoogleCloudStorageBuilder, (key, value): (String, String)| {
                    key.parse().into_iter().fold(builder, |b, key| b.with_config(key, &value))
                };
                Arc::new(variables("GOOGLE_").fold(builder, set).with_url(url.as_str()).build()?)
            }
            ObjectStoreScheme::MicrosoftAzure => {
                let builder =
                    MicrosoftAzureBuilder::new().with_retry(retry).with_client_options(client);
                let set = |builder: MicrosoftAzureBuilder, (key, value): (String, String)| {
                    key.parse().into_iter().fold(builder, |b, key| b.with_config(key, &value))
                };
                Arc::new(variables("AZURE_").fold(builder, set).with_url(url.as_str()).build()?)
            }
            other => {
                let source = format!("{other:?} is no remote store").into();
                return Err(StoreError::NotSupported { source });
            }
        })
    }

    /// Waits for `work`, unless the store is closed.
    fn wait<T>(&self, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        let mut closing = self.closing.subscribe();
        self.runtime.block_on(async {
            tokio::pin!(work);
            let closed = closing.wait_for(|closing| *closing);
            match futures_util::future::select(work, std::pin::pin!(closed)).await {
                futures_util::future::Either::Left((done, _)) => done,
                futures_util::future::Either::Right(_) => Err(Failure::Final(RemoteFault::Closed)),
            }
        })
    }

    /// All of a small object: at most `limit` bytes, and what does not begin as it must is not read to
    /// its end.
    pub(super) fn small(
        &self,
        object: &Object,
        limit: u64,
        begins: fn(&[u8]) -> bool,
    ) -> Result<Vec<u8>, Failure> {
        let mut small = Small { bytes: Vec::new(), limit, begins };
        let about = About::recorded(u64::MAX);
        let came = self.body(object, &about, Kind::Small, &mut small);
        if small.is_other() || came.is_ok() && !begins(&small.bytes) {
            let page = self.secrets.page(&small.bytes, &object.address);
            let other = || RemoteFault::Page { what: "something", begins: "no text".into() };
            return Err(Failure::Final(page.unwrap_or_else(other)));
        }
        if small.bytes.len() as u64 > limit {
            return Err(Failure::Final(RemoteFault::TooLarge { limit }));
        }
        came.map(|_| small.bytes)
    }

    /// The size and the SHA-256 of an object whose server says no size: all of it is read.
    pub(super) fn measure(&self, object: &Object, told: &Told) -> Result<(u64, String), Failure> {
        let (etag, modified) = (told.etag.clone(), told.modified.clone());
        let about = About { recorded: false, etag, modified, ..About::recorded(u64::MAX) };
        let mut measured = Measured { bytes: 0, digest: Sha256::new() };
        self.body(object, &about, Kind::Unmeasured, &mut measured)?;
        Ok((measured.bytes, hex(&measured.digest.finalize())))
    }

    /// Asks for the size and version of an object.
    pub(super) fn about(&self, object: &Object) -> Result<Told, Failure> {
        self.wait(async {
            match &object.place {
                Place::Http(http) => self.http_about(http, object).await,
                Place::Store { store, path, version } => {
                    let version = version.clone();
                    let options = GetOptions { head: true, version, ..GetOptions::default() };
                    let found = store.get_opts(path, options).await;
                    let meta =
                        found.map_err(|error| self.secrets.store_failure(error, object))?.meta;
                    let etag = meta.e_tag.clone();
                    let version = format!("{:?} {:?} {}", etag, meta.version, meta.last_modified);
                    let (bytes, modified, head) = (Some(meta.size), None, Vec::new());
                    Ok(Told { bytes, etag, modified, version, head })
                }
            }
        })
    }

    async fn http_about(&self, http: &Http, object: &Object) -> Result<Told, Failure> {
        let ask = async |asked| http.ask(&object.address, asked, &self.secrets).await;
        let mut answer = match ask(Asked::Block).await {
            Err(Failure::NoRanges) => ask(Asked::Whole).await?,
            Ok(answer) if answer.start > 0 => ask(Asked::Whole).await?,
            answer => answer?,
        };
        let (mut head, mut decoder) = (Vec::new(), answer.gzip.then(gzip));
        while head.len() < http::BLOCK {
            let piece = answer.response.chunk().await;
            let piece = piece.map_err(|error| self.secrets.failure(error, &object.address))?;
            let Some(piece) = piece else { break };
            head.extend_from_slice(&unpacked(&mut decoder, &piece)?);
        }
        head.truncate(http::BLOCK);
        if let Some(page) = self.secrets.page(&head, &object.address) {
            return Err(Failure::Final(page));
        }
        let Answer { total: bytes, etag, modified, .. } = answer;
        let version = match (&etag, &modified) {
            (None, None) => String::new(),
            _ => format!("{etag:?} {modified:?}"),
        };
        Ok(Told { bytes, etag, modified, version, head })
    }

    /// The names of the objects directly below a URL that ends in a slash.
    pub(super) fn list(&self, folder: &Object) -> Result<Vec<String>, Failure> {
        let Place::Store { store, path, .. } = &folder.place else { return Ok(Vec::new()) };
        self.wait(async {
            let prefix = Some(path).filter(|path| !path.as_ref().is_empty());
            let found = store.list_with_delimiter(prefix).await;
            let found = found.map_err(|error| self.secrets.store_failure(error, folder))?;
            let name = |meta: object_store::ObjectMeta| meta.location.filename().map(str::to_owned);
            Ok(found.objects.into_iter().filter_map(name).collect())
        })
    }

    /// Fetches a shard's bytes from `sink.have()` on; returns whether the response was complete but ended
    /// before the end of the object.
    pub(super) fn stream(
        &self,
        object: &Object,
        about: &About,
        sink: &mut dyn Sink,
    ) -> Result<Came, Failure> {
        self.body(object, about, Kind::Shard, sink)
    }

    fn body(
        &self,
        object: &Object,
        about: &About,
        kind: Kind,
        sink: &mut dyn Sink,
    ) -> Result<Came, Failure> {
        self.wait(Feed::new(&self.secrets, object, about, kind, sink).ask())
    }
}
