//! The rendezvous: ranks meet at a store and check that they are about to run the same training.

use std::collections::BTreeMap;
use std::net::ToSocketAddrs;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::heartbeat::{self, Heartbeat, Limits, Missing};
use super::world::{ALONE, Spec};
use super::{DistError, rank_list};
use crate::config::Config;
use crate::shim::ShimError;
use crate::shim::c10d::{Member, Role, Store};

/// How long ranks wait for each other at the start, unless asked otherwise: a cluster may take
/// minutes to start the last of them.
pub const PATIENCE: Duration = Duration::from_secs(300);
/// Interval of checking for a key.
const LOOK: Duration = Duration::from_millis(20);
/// Interval of checking for lost ranks.
const LOOK_ROUND: Duration = Duration::from_secs(1);
/// A rank that has come and then sends no beat for so long is lost. Beats go on while a rank opens
/// thousands of shards.
const SILENT: Duration = Duration::from_secs(15);

/// Why the rendezvous failed.
#[derive(Debug, Error)]
pub enum RendezvousError {
    /// The store cannot be served or reached.
    #[error("cannot {verb} the store at {address}, {size} ranks: {source}\nhint: {ALONE}")]
    Store {
        /// Ranks in the world.
        size: usize,
        /// `serve` or `reach`.
        verb: &'static str,
        /// `host:port`.
        address: String,
        /// What libtorch said.
        source: ShimError,
    },
    /// The host name of rank 0 does not resolve.
    #[error(
        "after {seconds} s this machine knows no address of {master}, where rank 0 is to be found \
         (MASTER_ADDR, or the launcher's first node): {source}\nhint: {ALONE}"
    )]
    Name {
        /// The name.
        master: String,
        /// How long it was asked for.
        seconds: u64,
        /// What the system said.
        source: std::io::Error,
    },
    /// Another program listens at the store's address.
    #[error(
        "after {seconds} s nothing that answers at {address} is a store of this program: does another \
         one listen there? MASTER_ADDR and MASTER_PORT name the place where ranks meet\nhint: {ALONE}"
    )]
    Silent {
        /// `host:port`.
        address: String,
        /// How long it was waited for.
        seconds: u64,
    },
    /// Two processes claim the same rank.
    #[error(
        "two processes are rank {rank} of {size} at {address}: was RANK set for all of them alike, \
         or does another run use the same MASTER_PORT?"
    )]
    Twice {
        /// The rank.
        rank: usize,
        /// Ranks in the world.
        size: usize,
        /// `host:port`.
        address: String,
    },
    /// Ranks did not come in time.
    #[error(
        "after {seconds} s, rank {} of {size} is not here\nhint: --start-timeout SECONDS waits longer; {ALONE}",
        rank_list(missing)
    )]
    Missing {
        /// The ranks.
        missing: Vec<usize>,
        /// Ranks in the world.
        size: usize,
        /// How long they were waited for.
        seconds: u64,
    },
    /// The ranks were started with different programs, settings or data.
    #[error("the ranks do not fit together:\n  {}", .0.join("\n  "))]
    Differ(Vec<String>),
    /// A rank was lost meanwhile.
    #[error(transparent)]
    Dist(#[from] DistError),
}

/// What must be equal on all ranks: program, configuration, data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Card {
    /// Version and build of the program.
    pub program: String,
    /// The resolved configuration by dotted key, without what may differ between machines.
    pub config: BTreeMap<String, String>,
    /// Samples of the data set.
    pub samples: u64,
    /// [`detco_shards::stream::ShardSet::fingerprint`] of the data.
    pub fingerprint: u64,
}

/// The result of rank 0's comparison, as it is sent to the others.
#[derive(Serialize, Deserialize)]
enum Verdict {
    Fine,
    Missing { missing: Vec<usize>, seconds: u64 },
    Differ(Vec<String>),
}

/// Where the data lies, where and how much of it is kept, and how many threads read it may differ.
const OWN_KEYS: &[&str] =
    &["data.shards", "data.workers", "data.cache", "data.cache_size", "data.fetches"];

impl Card {
    /// For this program.
    pub fn new(config: &Config, samples: u64, fingerprint: u64) -> Card {
        let mut keys = config.flat();
        keys.retain(|key, _| !OWN_KEYS.contains(&key.as_str()));
        Card { program: program(), config: keys, samples, fingerprint }
    }

    /// Differences between this rank's card and rank 0's, one line each.
    fn differences(&self, rank: usize, first: &Card) -> Vec<String> {
        let mut lines = Vec::new();
        if self.program != first.program {
            lines.push(format!("rank {rank} runs {}, rank 0 {}", self.program, first.program));
        }
        let data = |card: &Card| {
            format!("{} samples, fingerprint {:016x}", card.samples, card.fingerprint)
        };
        if (self.samples, self.fingerprint) != (first.samples, first.fingerprint) {
            lines.push(format!("rank {rank} reads {}; rank 0 {}", data(self), data(first)));
        }
        let mut keys: Vec<&String> = self.config.keys().chain(first.config.keys()).collect();
        keys.sort();
        keys.dedup();
        let show = |value: Option<&String>| value.cloned().unwrap_or_else(|| "nothing".into());
        for key in keys {
            let (here, there) = (self.config.get(key), first.config.get(key));
            if here != there {
                let (here, there) = (show(here), show(there));
                lines.push(format!("{key} is {here} on rank {rank}, {there} on rank 0"));
            }
        }
        lines
    }
}

/// Version, libtorch and a checksum of the program's own file: builds of one version may differ.
fn program() -> String {
    let build = std::fs::read("/proc/self/exe").map_or(0, |bytes| crc32c::crc32c(&bytes));
    let libtorch = crate::shim::headers_version().unwrap_or_default();
    format!("detco {} (build {build:08x}, libtorch {libtorch})", env!("CARGO_PKG_VERSION"))
}

/// Waits until the name of rank 0's machine has an address: a cluster may make it known only when rank 0 has
/// been started.
fn resolve(spec: &Spec, patience: Duration) -> Result<(), RendezvousError> {
    let start = Instant::now();
    loop {
        let asked = (spec.master.clone(), spec.port);
        let limit = patience.saturating_sub(start.elapsed()).max(LOOK_ROUND);
        let found = heartbeat::within(limit, "resolve", move || {
            asked.to_socket_addrs().map(|mut addresses| addresses.next())
        });
        let source = match found {
            Some(Ok(Some(_))) => return Ok(()),
            Some(Ok(None)) => std::io::Error::other("the name has no address"),
            Some(Err(source)) => source,
            None => std::io::Error::other("the name service does not answer"),
        };
        if start.elapsed() >= patience {
            let (master, seconds) = (spec.master.clone(), patience.as_secs());
            return Err(RendezvousError::Name { master, seconds, source });
        }
        thread::sleep(LOOK_ROUND.min(patience.saturating_sub(start.elapsed())));
    }
}

/// A rank at the store, before the process group is made.
#[derive(Debug)]
pub struct Rendezvous {
    pub(super) spec: Spec,
    pub(super) store: Arc<Store>,
    pub(super) heartbeat: Heartbeat,
    patience: Duration,
}

impl Rendezvous {
    /// Connects to the store, or serves it; waits for it up to `patience`.
    ///
    /// # Errors
    /// When there is no store, or another process has this rank.
    pub fn join(
        spec: Spec,
        patience: Duration,
        exit_code: u8,
    ) -> Result<Rendezvous, RendezvousError> {
        let Member { rank, size } = spec.member;
        let address = spec.address();
        resolve(&spec, patience)?;
        let verb = if spec.role == Role::Serve { "serve" } else { "reach" };
        let fault = |source| {
            let address = address.clone();
            RendezvousError::Store { size, verb, address, source }
        };
        // libtorch gives up by itself where nobody listens, but not where somebody else does.
        let limit = 2 * patience + Duration::from_secs(5);
        let of = spec.clone();
        let open = move || Store::open(&of.master, of.port, of.role, &of.prefix, patience);
        let store = heartbeat::within(limit, "store", open);
        let silent =
            || RendezvousError::Silent { address: address.clone(), seconds: limit.as_secs() };
        let store = store.ok_or_else(silent)?.map_err(fault)?;
        if store.add(&format!("came/{rank}"), 1).map_err(fault)? > 1 {
            return Err(RendezvousError::Twice { rank, size, address });
        }
        let server = if spec.agent { "the launcher" } else { "rank 0" };
        let address = format!("{address}, served by {server},");
        let limits = Limits { slow: patience, timeout: SILENT.min(patience) };
        let heartbeat = Heartbeat::start(&store, spec.member, address, limits, exit_code);
        Ok(Rendezvous {
            heartbeat: heartbeat.map_err(fault)?,
            spec,
            store: Arc::new(store),
            patience,
        })
    }

    /// The place of this rank in the world.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Whether this is rank 0.
    pub fn is_first(&self) -> bool {
        self.spec.member.rank == 0
    }

    /// Tells the others why this rank ends.
    pub fn fail(&self, message: &str) {
        self.heartbeat.fail(&self.store, self.spec.role, message);
    }

    /// Broadcasts rank 0's text; the others pass none.
    ///
    /// # Errors
    /// When rank 0 is lost, or takes longer than the patience at the start.
    pub fn first_says(&self, key: &str, text: Option<&str>) -> Result<String, RendezvousError> {
        if let Some(text) = text {
            self.store.set(key, text.as_bytes()).map_err(|source| self.lost_store(source))?;
            return Ok(text.to_string());
        }
        let deadline = Instant::now() + self.patience;
        match self.hear(key, deadline)? {
            Some(text) => Ok(text),
            None => {
                let (size, seconds) = (self.spec.member.size, self.patience.as_secs());
                Err(RendezvousError::Missing { missing: vec![0], size, seconds })
            }
        }
    }

    /// Compares the cards of all ranks; either all continue or all get the same error.
    ///
    /// # Errors
    /// When a rank is missing, or its card differs from rank 0's.
    pub fn compare(&self, card: &Card) -> Result<(), RendezvousError> {
        let Member { rank, size } = self.spec.member;
        let text = serde_json::to_string(card).expect("texts and numbers have a JSON form");
        self.store
            .set(&format!("card/{rank}"), text.as_bytes())
            .map_err(|source| self.lost_store(source))?;
        let verdict =
            match self.is_first() {
                true => {
                    let verdict = self.judge(card, size)?;
                    let text = serde_json::to_string(&verdict).expect("texts have a JSON form");
                    self.first_says("verdict", Some(&text))?;
                    verdict
                }
                // What rank 0 has written is JSON; anything else would be another program's.
                false => serde_json::from_str(&self.first_says("verdict", None)?).unwrap_or_else(
                    |error| Verdict::Differ(vec![format!("rank 0's verdict: {error}")]),
                ),
            };
        match verdict {
            Verdict::Fine => Ok(()),
            Verdict::Missing { missing, seconds } => {
                Err(RendezvousError::Missing { missing, size, seconds })
            }
            Verdict::Differ(lines) => Err(RendezvousError::Differ(lines)),
        }
    }

    fn judge(&self, first: &Card, size: usize) -> Result<Verdict, RendezvousError> {
        let deadline = Instant::now() + self.patience;
        let (mut missing, mut lines) = (Vec::new(), Vec::new());
        for rank in 1..size {
            match self.hear(&format!("card/{rank}"), deadline)? {
                None => missing.push(rank),
                Some(text) => match serde_json::from_str::<Card>(&text) {
                    Ok(card) => lines.extend(card.differences(rank, first)),
                    // Another version may write its cards otherwise.
                    Err(error) => lines.push(format!("rank {rank} is another program: {error}")),
                },
            }
        }
        if !missing.is_empty() {
            let seconds = self.patience.as_secs();
            return Ok(Verdict::Missing { missing, seconds });
        }
        Ok(if lines.is_empty() { Verdict::Fine } else { Verdict::Differ(lines) })
    }

    /// A key's text, once it is there; none after the deadline.
    fn hear(&self, key: &str, deadline: Instant) -> Result<Option<String>, RendezvousError> {
        let (mut others, mut looked) = (self.heartbeat.others(), Instant::now());
        loop {
            if let Some(value) = self.store.get(key).map_err(|source| self.lost_store(source))? {
                return Ok(Some(String::from_utf8_lossy(&value).into_owned()));
            }
            let told = self.heartbeat.failure().map(|message| Missing::Ended { message });
            let lost = match told {
                None if looked.elapsed() > LOOK_ROUND => {
                    looked = Instant::now();
                    self.heartbeat.lost(&self.store, &mut others)
                }
                told => told,
            };
            if let Some(missing) = lost {
                let awaited = format!("the others to start (\"{key}\")");
                return Err(DistError::Awaited { awaited, missing }.into());
            }
            if Instant::now() > deadline {
                return Ok(None);
            }
            thread::sleep(LOOK);
        }
    }

    fn lost_store(&self, source: ShimError) -> RendezvousError {
        let (size, verb) = (self.spec.member.size, "reach");
        let address = self.spec.address();
        RendezvousError::Store { size, verb, address, source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_name_what_differs_and_nothing_else() {
        let config = |sets: &[&str]| {
            let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
            Config::load("detco-small", &sets).unwrap()
        };
        let first = Card::new(&config(&[]), 10, 1);
        // Where the data lies and how many threads read it is each machine's own.
        let own = Card::new(&config(&["data.shards=[\"x\"]", "data.workers=3"]), 10, 1);
        assert!(own.differences(1, &first).is_empty());

        let other = Card::new(&config(&["views.patches.crop.scale=[0.5, 1.0]", "seed=3"]), 10, 2);
        let other = Card { program: "detco 9".into(), ..other };
        let lines = other.differences(4, &first).join("\n");
        for part in [
            "rank 4 runs detco 9, rank 0 detco ",
            "rank 4 reads 10 samples, fingerprint 0000000000000002; rank 0 10 samples",
            "seed is 3 on rank 4, 0 on rank 0",
            "views.patches.crop.scale is [0.5, 1.0] on rank 4, [",
        ] {
            assert!(lines.contains(part), "{lines}");
        }
        assert_eq!(lines.lines().count(), 4);

        let recipe = Card::new(&Config::load("moco-v2-small", &[]).unwrap(), 10, 1);
        let lines = recipe.differences(1, &first).join("\n");
        assert!(lines.contains("base is \"moco-v2-small\" on rank 1, \"detco-small\""), "{lines}");
    }
}
