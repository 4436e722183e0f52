//! The wall to object stores: the only place that names `object_store` and tokio.
//!
//! Everything here is called from plain threads and blocks them; a small runtime of its own does the
//! waiting. Each call is one attempt: who tries again, and when, is [`super::fetch`]'s business.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt as _;
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::path::Path as ObjectPath;
use object_store::{
    ClientOptions, Error as StoreError, GetOptions, GetRange, ObjectStore, ObjectStoreScheme,
    RetryConfig,
};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use url::{Position, Url};

use crate::format::{Cause, RemoteFault, ShardError};

/// A connection that is not there by then will not come.
const CONNECT: Duration = Duration::from_secs(10);
/// An object that is not a shard (a manifest, an index) has at most so many bytes: a manifest of
/// 100 million samples.
const SMALL_MAX: u64 = 4 << 30;

/// The runtime, and the stores that were asked for.
#[derive(Debug)]
pub(super) struct Web {
    runtime: Runtime,
    environment: Vec<(String, String)>,
    stall: Duration,
    stores: Mutex<HashMap<String, Arc<dyn ObjectStore>>>,
    closing: watch::Sender<bool>,
}

/// An object's address.
#[derive(Debug, Clone)]
pub(super) struct Object {
    pub(super) url: String,
    store: Arc<dyn ObjectStore>,
    path: ObjectPath,
}

/// What a store says of an object without sending it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct About {
    pub(super) bytes: u64,
    pub(super) etag: Option<String>,
    /// Changes when the object does, as far as the store tells.
    pub(super) version: String,
}

/// How one attempt failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// It would fail again.
    Final(RemoteFault),
    /// Perhaps it would not.
    Passing(Cause),
    /// The server sends objects from their beginning only.
    NoRanges,
    /// Our side: the disk.
    Here(ShardError),
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
        let runtime = Builder::new_multi_thread()
            .worker_threads(1) // sockets only; bytes are digested and written by the fetching threads
            .max_blocking_threads(4) // looking names up
            .thread_name("detco-remote")
            .enable_io()
            .enable_time()
            .build()
            .map_err(|error| {
                ShardError::remote("remote shards", RemoteFault::Store(error.into()))
            })?;
        let (closing, _) = watch::channel(false);
        let environment = environment.to_vec();
        Ok(Web { runtime, environment, stall, stores: Mutex::default(), closing })
    }

    /// Ends what is under way.
    pub(super) fn close(&self) {
        self.closing.send_replace(true);
    }

    /// The object at a URL.
    pub(super) fn object(&self, text: &str) -> Result<Object, ShardError> {
        let fail = |reason: String| ShardError::remote(text, RemoteFault::Url { reason });
        let url = Url::parse(text).map_err(|error| fail(error.to_string()))?;
        if url.query().is_some() || url.fragment().is_some() {
            return Err(fail("it has a query or a fragment".into()));
        }
        let (scheme, path) =
            ObjectStoreScheme::parse(&url).map_err(|error| fail(error.to_string()))?;
        let mut key = url[..Position::BeforePath].to_owned();
        if url.scheme() == "https" && scheme != ObjectStoreScheme::Http {
            // The bucket may be the first folder: each is a store.
            key += url.path().split_inclusive('/').nth(1).unwrap_or("");
        }
        let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
        let store = match stores.get(&key) {
            Some(store) => Arc::clone(store),
            None => {
                let built = self.build(&scheme, &url);
                let built = built
                    .map_err(|error| ShardError::remote(text, RemoteFault::Store(error.into())))?;
                stores.insert(key, Arc::clone(&built));
                built
            }
        };
        Ok(Object { url: text.to_owned(), store, path })
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
        if url.scheme() == "http" || self.environment.iter().any(plain) {
            client = client.with_allow_http(true);
        }
        let variables = |prefix: &'static str| {
            let ours = self.environment.iter().filter(move |(key, _)| key.starts_with(prefix));
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
            ObjectStoreScheme::Http => {
                let builder = HttpBuilder::new().with_retry(retry).with_client_options(client);
                Arc::new(builder.with_url(&url[..Position::BeforePath]).build()?)
            }
            other => {
                let source = format!("{other:?} is no remote store").into();
                return Err(StoreError::NotSupported { source });
            }
        })
    }

    /// Waits for `work`, unless everything ends.
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

    /// All of a small object.
    pub(super) fn small(&self, object: &Object) -> Result<Vec<u8>, Failure> {
        self.wait(async {
            let found = object.store.get_opts(&object.path, GetOptions::default()).await?;
            let (bytes, recorded) = (found.meta.size, SMALL_MAX);
            if bytes > SMALL_MAX {
                return Err(Failure::Final(RemoteFault::Size { bytes, recorded }));
            }
            Ok(found.bytes().await?.to_vec())
        })
    }

    /// Size and version of an object.
    pub(super) fn about(&self, object: &Object) -> Result<About, Failure> {
        self.wait(async {
            let options = GetOptions { head: true, ..GetOptions::default() };
            let meta = object.store.get_opts(&object.path, options).await?.meta;
            let etag = meta.e_tag.clone();
            let version = format!("{:?} {:?} {}", etag, meta.version, meta.last_modified);
            Ok(About { bytes: meta.size, etag, version })
        })
    }

    /// The names of the objects directly below a URL that ends in a slash.
    pub(super) fn list(&self, folder: &Object) -> Result<Vec<String>, Failure> {
        self.wait(async {
            let prefix = Some(&folder.path).filter(|path| !path.as_ref().is_empty());
            let found = folder.store.list_with_delimiter(prefix).await?;
            let name = |meta: object_store::ObjectMeta| meta.location.filename().map(str::to_owned);
            Ok(found.objects.into_iter().filter_map(name).collect())
        })
    }

    /// An object's bytes from `offset` on, piece by piece; `bytes` is the size it must have.
    pub(super) fn stream(
        &self,
        object: &Object,
        offset: u64,
        bytes: u64,
        etag: Option<&str>,
        take: &mut dyn FnMut(&[u8]) -> Result<(), ShardError>,
    ) -> Result<(), Failure> {
        self.wait(async {
            let range = (offset > 0).then_some(GetRange::Offset(offset));
            let if_match = etag.map(str::to_owned);
            let options = GetOptions { range, if_match, ..GetOptions::default() };
            let found = match object.store.get_opts(&object.path, options).await {
                // A server without ranges answers with the whole object.
                Err(StoreError::NotSupported { .. }) if offset > 0 => {
                    return Err(Failure::NoRanges);
                }
                found => found?,
            };
            if found.meta.size != bytes {
                let (bytes, recorded) = (found.meta.size, bytes);
                return Err(Failure::Final(RemoteFault::Size { bytes, recorded }));
            }
            let mut pieces = found.into_stream();
            while let Some(piece) = pieces.next().await {
                take(&piece?).map_err(Failure::Here)?;
            }
            Ok(())
        })
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Failure {
        match error {
            StoreError::NotFound { .. } => Failure::Final(RemoteFault::Missing),
            StoreError::PermissionDenied { .. } | StoreError::Unauthenticated { .. } => {
                Failure::Final(RemoteFault::Denied(error.into()))
            }
            StoreError::Precondition { .. } => Failure::Final(RemoteFault::Replaced),
            StoreError::NotSupported { .. }
            | StoreError::NotImplemented { .. }
            | StoreError::InvalidPath { .. }
            | StoreError::UnknownConfigurationKey { .. } => {
                Failure::Final(RemoteFault::Store(error.into()))
            }
            error => Failure::Passing(error.into()),
        }
    }
}
