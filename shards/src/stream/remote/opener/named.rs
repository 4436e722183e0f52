//! The shards that a user's arguments name, and the manifests' records of them.

use std::collections::BTreeMap;

use super::super::address::{Address, shown, shown_all};
use crate::format::manifest::{Manifest, ShardRecord};
use crate::format::{RemoteFault, ShardError, SpecFault};
use crate::stream::braces;

/// A folder's manifests, each with its URL as it is shown.
pub(in super::super) struct Folder {
    pub(in super::super) manifests: Vec<(String, Manifest)>,
    /// The error, if it could not be read.
    pub(in super::super) refused: Option<RemoteFault>,
}

/// The shards that the user's arguments name.
#[derive(Default)]
pub(in super::super) struct Named {
    pub(in super::super) shards: Vec<Address>,
    /// By the folder's URL.
    pub(in super::super) folders: BTreeMap<String, Folder>,
}

/// The URLs that an argument of the user stands for.
pub(in super::super) fn addresses(word: &str) -> Result<Vec<Address>, ShardError> {
    let fail = |reason: String| {
        let fault = SpecFault::Pattern { reason };
        ShardError::Spec { spec: shown(word), fault }
    };
    // What is wrong is told without the word: it may hold a secret.
    let urls = braces::expand(word).map_err(fail)?;
    let address = |url: &String| {
        let address = Address::parse(url)?;
        match address.url().path().contains(['*', '[']) {
            true => Err(fail("URLs take braces, {000..012}, and no globs".into())),
            false => Ok(address),
        }
    };
    urls.iter().map(address).collect()
}

/// The manifests' records of shards, by folder and name.
type Records = BTreeMap<(String, String), ShardRecord>;

/// Classes, and the records of the shards that are named.
pub(in super::super) fn records(
    spec: &[String],
    named: &Named,
) -> Result<(Vec<String>, Option<SpecFault>, Records), ShardError> {
    let fail = |fault| ShardError::Spec { spec: shown_all(spec), fault };
    let mut records = BTreeMap::new();
    let mut classes: Option<(&str, &[String])> = None;
    // Training needs no classes: whoever does is told.
    let mut clash = None;
    for (url, folder) in &named.folders {
        for (manifest_url, manifest) in &folder.manifests {
            match classes {
                Some((one, names)) if names != manifest.classes => {
                    let (one, other) = (one.into(), manifest_url.into());
                    clash.get_or_insert(SpecFault::Classes { one, other });
                }
                _ => classes = Some((manifest_url, &manifest.classes)),
            }
            for record in &manifest.shards {
                records.insert((url.clone(), record.name.clone()), record.clone());
            }
        }
    }
    for shard in &named.shards {
        let folder = named.folders.get(shard.folder());
        let listed = folder.is_some_and(|folder| !folder.manifests.is_empty());
        if listed
            && shard.version().is_none()
            && !records.contains_key(&(shard.folder().to_owned(), shard.name()))
        {
            return Err(fail(SpecFault::Unlisted { shard: shard.shown().into() }));
        }
    }
    let classes = classes.filter(|_| clash.is_none());
    Ok((classes.map_or_else(Vec::new, |(_, names)| names.to_vec()), clash, records))
}
